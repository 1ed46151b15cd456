"""A Jacobian as a lineax operator, and what the geometry needs of it beside its products."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_number
from manifoldflow._types import Tangent


class AbstractJacobian(lx.AbstractLinearOperator):
    """A Jacobian J: an operator from tangents (PyTrees of D numbers) to n residuals.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> jacobian = loss.jacobian(jnp.zeros(2))
        >>> print(isinstance(jacobian, mf.linalg.AbstractJacobian), jacobian.gram().tolist())
        True [[1.0, 0.0], [0.0, 1.0]]
    """

    @abc.abstractmethod
    def transpose_mv(self, vector: Float[Array, " n"]) -> Tangent:
        """Jᵀw."""

    @abc.abstractmethod
    def cross_gram(self, other: Any) -> Float[Array, "n m"]:
        """J J'ᵀ with the Jacobian J' of the same function at another point or on other data."""

    @abc.abstractmethod
    def gram_triangle(self) -> Float[Array, "n n"]:
        """K, of which only the upper triangle need be right: for factorisations."""

    @abc.abstractmethod
    def row_norms_squared(self) -> Float[Array, " n"]:
        """‖∇fᵢ‖² for every residual, the diagonal of the Gram matrix."""

    @abc.abstractmethod
    def column_norms_squared(self) -> Tangent:
        """Σᵢ (∂fᵢ/∂θⱼ)² for every coordinate, the diagonal of JᵀJ."""

    @abc.abstractmethod
    def rows(self) -> PyTree[Float[Array, "n ..."]]:
        """All rows, explicitly: for every leaf of the point an array (n, *leaf.shape)."""

    def gram(self) -> Float[Array, "n n"]:
        """K = J Jᵀ, the empirical neural tangent kernel."""
        return mirrored(self.gram_triangle())

    @abc.abstractmethod
    def distributed_gram(self) -> Float[Array, "n n"]:
        """K with its rows over all devices of the mesh in force; none holds n² numbers."""

    def as_matrix(self) -> Float[Array, "n D"]:
        """The n×D matrix, for tests and small problems."""
        num_rows = self.out_structure().shape[0]
        rows = [leaf.reshape(num_rows, -1) for leaf in jax.tree.leaves(self.rows())]
        return jnp.concatenate(rows, axis=1)

    def transpose(self) -> "TransposedJacobian":
        return TransposedJacobian(self)


def mirrored(triangle: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The symmetric matrix with this upper triangle."""
    return jnp.triu(triangle) + jnp.triu(triangle, 1).T


class TransposedJacobian(lx.AbstractLinearOperator):
    """Jᵀ: residuals → tangents."""

    jacobian: AbstractJacobian

    def mv(self, vector: Float[Array, " n"]) -> Tangent:
        return self.jacobian.transpose_mv(vector)

    def as_matrix(self) -> Float[Array, "D n"]:
        return self.jacobian.as_matrix().T

    def transpose(self) -> AbstractJacobian:
        return self.jacobian

    def in_structure(self) -> jax.ShapeDtypeStruct:
        return self.jacobian.out_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.jacobian.in_structure()


@checked
def gram(jacobian: AbstractJacobian) -> lx.MatrixLinearOperator:
    """The Gram matrix K = JJᵀ as a positive semidefinite lineax operator.

    Args:
        jacobian: J, (n, D).

    Returns:
        An operator from (n,) to (n,).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> print(linalg.gram(jacobian).mv(jnp.ones(1)))
        [25.]
    """
    return lx.MatrixLinearOperator(jacobian.gram(), lx.positive_semidefinite_tag)


@checked
def gauss_newton(jacobian: AbstractJacobian, scale: Any = 1.0) -> lx.AbstractLinearOperator:
    """The Gauss-Newton operator scale·JᵀJ on tangents, never built as a matrix.

    Args:
        jacobian: J, (n, D).
        scale: a number.

    Returns:
        A positive semidefinite operator on tangents.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> print(linalg.gauss_newton(jacobian, 0.5).mv(jnp.array([1.0, 0.0])))
        [4.5 6. ]
    """
    scale = checked_number("gauss_newton: scale", scale)

    def mv(vector: Tangent) -> Tangent:
        return _tree.scale(scale, jacobian.transpose_mv(jacobian.mv(vector)))

    return lx.FunctionLinearOperator(mv, jacobian.in_structure(), lx.positive_semidefinite_tag)


def register_with_lineax(
    kind: type[lx.AbstractLinearOperator], materialise: Callable[[Any], Any]
) -> None:
    """Tell lineax what operators of this kind are: general, real, and already linear."""
    # Lineax asks these of every operator, and raises for a class that has no answer.
    for question in (
        lx.is_symmetric,
        lx.is_diagonal,
        lx.is_tridiagonal,
        lx.has_unit_diagonal,
        lx.is_lower_triangular,
        lx.is_upper_triangular,
        lx.is_positive_semidefinite,
        lx.is_negative_semidefinite,
    ):
        question.register(kind, lambda _: False)
    for same in (lx.linearise, lx.conj):
        same.register(kind, lambda operator: operator)
    lx.diagonal.register(kind, lambda operator: jnp.diag(operator.as_matrix()))
    lx.materialise.register(kind, materialise)


register_with_lineax(
    AbstractJacobian, lambda jac: lx.PyTreeLinearOperator(jac.rows(), jac.out_structure())
)
register_with_lineax(TransposedJacobian, lambda op: lx.materialise(op.jacobian).T)
