"""Low-rank covariances by their factors F, with Σ = F Fᵀ."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import shapes_of
from manifoldflow._types import Coordinates, Tangent
from manifoldflow.linalg.jacobian._operator import AbstractJacobian, register_with_lineax


@checked
def factor_operator(coordinates: Coordinates, columns: PyTree[Any]) -> lx.AbstractLinearOperator:
    """The operator of a factor F that is given by its columns.

    Args:
        coordinates: of a point.
        columns: a PyTree like them, or like the point; every array has the shape of its coordinate
            and a trailing axis of r columns.

    Returns:
        The operator from arrays (r,) to tangents.

    Raises:
        ValueError: another structure, or other shapes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> factor = linalg.factor_operator(
        ...     {"a": jnp.ones(2)}, {"a": jnp.array([[1.0, 0], [0, 2.0]])}
        ... )
        >>> print(factor.mv(jnp.array([3.0, 4.0])))
        {'a': Array([3., 8.], dtype=...)}
    """
    try:
        arrays = jax.tree.map(lambda _, leaf: jnp.asarray(leaf), coordinates, columns)
    except (ValueError, TypeError, AttributeError):  # static leaves of a whole model
        arrays = jax.tree.map(jnp.asarray, eqx.filter(columns, eqx.is_inexact_array))
    mistake = "its structure differs"
    if jax.tree.structure(arrays) == jax.tree.structure(coordinates):
        mistake = _mistake(list(zip(jax.tree.leaves(coordinates), jax.tree.leaves(arrays))))
    if mistake:
        raise ValueError(
            "A noise factor must be like the point's coordinates "
            f"{shapes_of(coordinates)}, every array with one more, trailing axis of r noise "
            f"columns; {mistake}: {shapes_of(columns)}."
        )
    arrays = jax.tree.map(lambda c, a: a.astype(c.dtype), coordinates, arrays)
    return lx.PyTreeLinearOperator(arrays, _tree.structure_of(coordinates))


def _mistake(pairs: list[tuple[Array, Array]]) -> str:
    if any(array.shape[:-1] != leaf.shape or not array.ndim for leaf, array in pairs):
        return "the leading axes differ"
    sizes = {array.shape[-1] for _, array in pairs}
    if len(sizes) > 1 or 0 in sizes:
        return "the trailing axes are not of one positive length"
    return ""


class ResidualFactor(lx.AbstractLinearOperator):
    """The factor F = JᵀG of noise that acts on a point through n residuals, with J their Jacobian.

    Such noise is normal to a manifold on which these residuals vanish: PF = 0.

    Args:
        jacobian: J, of the residuals at the point.
        small: G, an operator from the noise space to Rⁿ.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> factor = linalg.ResidualFactor(jacobian, lx.MatrixLinearOperator(jnp.array([[2.0]])))
        >>> print(factor.mv(jnp.ones(1)))
        [6. 8.]
    """

    jacobian: AbstractJacobian
    small: lx.AbstractLinearOperator

    def mv(self, vector: PyTree[Array]) -> Tangent:
        return self.jacobian.transpose_mv(self.small.mv(vector))

    def as_matrix(self) -> Float[Array, "D r"]:
        """The D×r matrix, for tests and small problems."""
        return _precision.matmul(self.jacobian.as_matrix().T, self.small.as_matrix())

    def transpose(self) -> lx.AbstractLinearOperator:
        return self.small.T @ self.jacobian

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.small.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.jacobian.in_structure()


register_with_lineax(
    ResidualFactor, lambda op: lx.materialise(op.jacobian.T) @ lx.materialise(op.small)
)
