"""Covariances Σ of tangents, in the three forms that they come in."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._errors import shapes_of
from manifoldflow._types import Coordinates
from manifoldflow.linalg._factors import factor_operator


class AbstractSigma(eqx.Module):
    """A covariance Σ of tangents: a `Covariance`, a `Factor` or a `NormalFactor`.

    Attributes:
        operator: a lineax operator, which the subclass gives its meaning.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> sigma = linalg.as_sigma(jnp.ones(2), jnp.ones((2, 1)))
        >>> print(isinstance(sigma, linalg.AbstractSigma), type(sigma).__name__)
        True Factor
    """

    operator: eqx.AbstractVar[lx.AbstractLinearOperator]

    def __check_init__(self):
        checked_fields(self)


class Covariance(AbstractSigma):
    """A covariance Σ that is given as an operator on tangents.

    Args:
        operator: Σ, self-adjoint and positive semidefinite.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> sigma = linalg.Covariance(lx.DiagonalLinearOperator(jnp.array([1.0, 4.0])))
        >>> print(sigma.operator.mv(jnp.ones(2)))
        [1. 4.]
    """

    operator: lx.AbstractLinearOperator


class Factor(AbstractSigma):
    """A covariance Σ = FFᵀ that is given by its factor.

    Args:
        operator: F, from any space to tangents.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> sigma = linalg.Factor(lx.MatrixLinearOperator(jnp.array([[1.0], [2.0]])))
        >>> print(sigma.operator.mv(jnp.ones(1)))
        [1. 2.]
    """

    operator: lx.AbstractLinearOperator


class NormalFactor(AbstractSigma):
    """A covariance Σ = JᵀG(JᵀG)ᵀ that acts through n residuals with the Jacobian J.

    Args:
        operator: G, from any space to Rⁿ.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> sigma = linalg.NormalFactor(lx.MatrixLinearOperator(0.1 * jnp.eye(3)))
        >>> print(sigma.operator.out_size())
        3
    """

    operator: lx.AbstractLinearOperator


@checked
def as_sigma(
    coordinates: Coordinates,
    given: lx.AbstractLinearOperator | PyTree[Any],
    is_factor: bool | None = None,
) -> Covariance | Factor:
    """The covariance of tangents that is given by an operator on them, or by a factor.

    Args:
        coordinates: of the point.
        given: Σ as a lineax operator on tangents, whose symmetric part counts; or a factor F with Σ
            = FFᵀ: an operator from another space to tangents, or a PyTree like the point whose
            arrays have a trailing axis of columns.
        is_factor: True where an operator is F; None decides by its spaces: it is F if it does not
            act on tangents.

    Returns:
        A `Covariance` or a `Factor`, in the dtypes of the coordinates.

    Raises:
        ValueError: `given` is neither, or a square array that could be both.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> matrix = lx.MatrixLinearOperator(jnp.array([[1.0, 2.0], [0.0, 1.0]]))
        >>> print(linalg.as_sigma(jnp.ones(2), matrix).operator.as_matrix().tolist())  # symmetrised
        [[1.0, 1.0], [1.0, 1.0]]
    """
    tangents = _tree.structure_of(coordinates)
    if not isinstance(given, lx.AbstractLinearOperator):
        _refuse_square(tangents, given)
        return Factor(factor_operator(coordinates, given))
    if not _have_shapes(given.out_structure(), tangents):
        raise ValueError(
            "The covariance must be an operator to tangents, which are like the point's "
            f"coordinates {shapes_of(tangents)}; this one maps to "
            f"{shapes_of(given.out_structure())}."
        )
    acts_on_tangents = _have_shapes(given.in_structure(), tangents)
    if is_factor is False and not acts_on_tangents:
        raise ValueError(
            "A covariance acts on tangents, which are like the point's coordinates "
            f"{shapes_of(tangents)}; this operator takes {shapes_of(given.in_structure())}. "
            "Leave out is_factor=False if it is a factor F of Σ = F Fᵀ."
        )
    if is_factor or not acts_on_tangents:
        return Factor(_cast(given, given.in_structure(), tangents))
    # Second derivatives see the symmetric part only; products with Σ must agree with them.
    symmetric = given if lx.is_symmetric(given) else (given + given.T) / 2
    return Covariance(_cast(symmetric, tangents, tangents))


def _cast(
    operator: lx.AbstractLinearOperator, inputs: PyTree[Any], outputs: PyTree[Any]
) -> lx.AbstractLinearOperator:
    """The operator between spaces of these dtypes, for data in another precision."""
    given = operator.in_structure(), operator.out_structure()
    if _dtypes(given) == _dtypes((inputs, outputs)):
        return operator

    def cast(tree: PyTree[Array], like: PyTree[Any]) -> PyTree[Array]:
        return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)

    return lx.FunctionLinearOperator(
        lambda v: cast(operator.mv(cast(v, given[0])), outputs), inputs
    )


def _dtypes(tree: PyTree[Any]) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _refuse_square(tangents: PyTree[Any], given: PyTree[Any]) -> None:
    leaves, like = jax.tree.leaves(given), jax.tree.leaves(tangents)
    if len(leaves) == len(like) == 1 and jnp.shape(leaves[0]) == (math.prod(like[0].shape),) * 2:
        raise ValueError(
            f"A plain square array {jnp.shape(leaves[0])} can be a covariance or a factor. Hand "
            "over lineax.MatrixLinearOperator(array), for a factor with is_factor=True."
        )


def _have_shapes(structure: PyTree[Any], like: PyTree[Any]) -> bool:
    shapes = lambda tree: (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
    return shapes(structure) == shapes(like)
