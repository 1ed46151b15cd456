"""The Jacobian of many small functions as a lineax operator.

Everything that the geometry needs of a Jacobian is one of five products; whoever offers
them (dense rows here, structured rows elsewhere) can stand behind every manifold.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Example, Tangent

# TF32 is the default for float32 matrix products on NVIDIA GPUs and loses the
# projections three digits; every product here asks for full float32.
HIGHEST = jax.lax.Precision.HIGHEST


class AbstractJacobian(lx.AbstractLinearOperator):
    """A Jacobian J: tangents (PyTrees of D numbers) → residuals (n numbers)."""

    @abc.abstractmethod
    def transpose_mv(self, vector: Float[Array, " n"]) -> Tangent:
        """Jᵀw."""

    @abc.abstractmethod
    def gram(self) -> Float[Array, "n n"]:
        """K = J Jᵀ, the empirical neural tangent kernel."""

    @abc.abstractmethod
    def cross_gram(self, other: Any) -> Float[Array, "n m"]:
        """J J'ᵀ with the Jacobian J' at another point or on other data."""

    @abc.abstractmethod
    def row_norms_squared(self) -> Float[Array, " n"]:
        """‖∇fᵢ‖² for every residual."""

    def transpose(self) -> lx.AbstractLinearOperator:
        return lx.FunctionLinearOperator(self.transpose_mv, self.out_structure())


class DenseJacobian(AbstractJacobian):
    """Explicit rows: for every leaf of the point an array (n, *leaf.shape)."""

    rows: PyTree[Float[Array, "n ..."]]

    @property
    def num_rows(self) -> int:
        return jax.tree.leaves(self.rows)[0].shape[0]

    def matrices(self) -> list[Float[Array, "n _"]]:
        return [leaf.reshape(self.num_rows, -1) for leaf in jax.tree.leaves(self.rows)]

    def mv(self, vector: Tangent) -> Float[Array, " n"]:
        parts = [leaf.reshape(-1) for leaf in jax.tree.leaves(vector)]
        pairs = zip(self.matrices(), parts, strict=True)
        return sum(jnp.matmul(rows, part, precision=HIGHEST) for rows, part in pairs)

    def transpose_mv(self, vector: Float[Array, " n"]) -> Tangent:
        return jax.tree.map(
            lambda rows: jnp.tensordot(vector, rows, axes=1, precision=HIGHEST), self.rows
        )

    def gram(self) -> Float[Array, "n n"]:
        return self.cross_gram(self)

    def cross_gram(self, other: "DenseJacobian") -> Float[Array, "n m"]:
        pairs = zip(self.matrices(), other.matrices(), strict=True)
        return sum(jnp.matmul(a, b.T, precision=HIGHEST) for a, b in pairs)

    def row_norms_squared(self) -> Float[Array, " n"]:
        return sum(jnp.sum(rows**2, axis=1) for rows in self.matrices())

    def as_matrix(self) -> Float[Array, "n D"]:
        return jnp.concatenate(self.matrices(), axis=1)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), self.rows
        )

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.num_rows,), _tree.dtype_of(self.rows))


def jacobian(
    fn: Callable[[Coordinates, Example], Array],
    coordinates: Coordinates,
    data: PyTree[Array],
) -> AbstractJacobian:
    """Jacobian of all outputs of `fn` on all examples, in the order of the examples.

    Args:
        fn: maps coordinates and one example to an array of k numbers.
        coordinates: where to differentiate.
        data: PyTree with a leading axis of N examples.

    Returns:
        An operator with n = N·k rows; row i·k + c is ∇ of output c on example i.
    """

    def rows_of_one(example: Example) -> PyTree[Array]:
        return jax.jacrev(lambda x: fn(x, example).reshape(-1))(coordinates)

    rows = jax.vmap(rows_of_one)(data)
    return DenseJacobian(jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:]), rows))


def gram(jacobian: AbstractJacobian) -> lx.MatrixLinearOperator:
    """The Gram matrix K = J Jᵀ as a positive semidefinite lineax operator."""
    return lx.MatrixLinearOperator(jacobian.gram(), lx.positive_semidefinite_tag)


def gauss_newton(jacobian: AbstractJacobian, scale: Any = 1.0) -> lx.AbstractLinearOperator:
    """The Gauss-Newton operator scale·JᵀJ on tangents, never built as a matrix."""

    def mv(vector: Tangent) -> Tangent:
        return _tree.scale(scale, jacobian.transpose_mv(jacobian.mv(vector)))

    return lx.FunctionLinearOperator(
        mv, jacobian.in_structure(), lx.positive_semidefinite_tag
    )


def _is_never(_: AbstractJacobian) -> bool:
    return False


def _register_with_lineax() -> None:
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
        question.register(AbstractJacobian)(_is_never)
    for same in (lx.linearise, lx.materialise, lx.conj):
        same.register(AbstractJacobian)(lambda operator: operator)
    lx.diagonal.register(AbstractJacobian)(lambda op: jnp.diag(op.as_matrix()))


_register_with_lineax()
