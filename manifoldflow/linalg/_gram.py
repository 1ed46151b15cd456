"""Solves with the Gram matrix K = J Jᵀ, also where J loses rank.

The policy was measured on the models whose limits lie where J loses rank: Cholesky of
K + μI with a tiny μ, corrected by applying it again (see `_projection`). A truncated
eigendecomposition costs ten times more, has NaN derivatives at repeated eigenvalues and
makes the vector field jump; it serves `rank` and `condition` only.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow._boundary import checked
from manifoldflow._types import Scalar
from manifoldflow.linalg._lapack import cho_solve, cholesky
from manifoldflow.linalg._operator import AbstractJacobian, mirrored


class AbstractGramSolve(eqx.Module):
    """A Gram matrix made ready for many solves at one point."""

    @abc.abstractmethod
    def trace(self) -> Scalar:
        """tr K = ‖J‖²_F, the scale of rounding errors."""

    @abc.abstractmethod
    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """An approximation of K⁻¹w, accurate enough to be corrected once or twice."""

    @abc.abstractmethod
    def damped_solve(self, vector: Float[Array, " n"], damping: Scalar) -> Float[Array, " n"]:
        """(K + damping·I)⁻¹ w."""

    @abc.abstractmethod
    def eigenvalues(self) -> Float[Array, " n"]:
        """The spectrum of K in ascending order."""


class AbstractGram(eqx.Module):
    """A way of solving with Gram matrices: a value that manifolds carry."""

    @abc.abstractmethod
    def __call__(self, jacobian: AbstractJacobian) -> AbstractGramSolve:
        """Prepare the solves at the point where this Jacobian was taken."""


class DenseGram(AbstractGram):
    """Cholesky of the n×n Gram matrix; n² numbers of memory, n³/3 operations."""

    def __call__(self, jacobian: AbstractJacobian) -> "DenseGramSolve":
        triangle = jacobian.gram_triangle()
        return DenseGramSolve(triangle, _regularised_cholesky(triangle))


class DenseGramSolve(AbstractGramSolve):
    # Only the upper triangle counts: half of the products of the Gram matrix.
    triangle: Float[Array, "n n"]
    cholesky: Float[Array, "n n"]

    def trace(self) -> Scalar:
        return jnp.trace(self.triangle)

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        return _solve(self.triangle, self.cholesky, vector)

    def damped_solve(self, vector: Float[Array, " n"], damping: Scalar) -> Float[Array, " n"]:
        damped = self.triangle + damping * jnp.eye(len(vector), dtype=vector.dtype)
        return _solve(damped, _regularised_cholesky(damped), vector)

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.linalg.eigvalsh(mirrored(self.triangle))


def _regularised_cholesky(triangle: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Cholesky factor of K + μI with the smallest μ of a short ladder that succeeds."""
    # The transpose: LAPACK's column-major layout then stays away from the matrix products
    # that made the triangle, which would be several times slower in it.
    matrix = jax.lax.stop_gradient(triangle).T
    eps = jnp.finfo(matrix.dtype).eps
    trace = jnp.trace(matrix)
    # A zero Jacobian has no normal space: any positive μ gives the right answer, zero.
    smallest = jnp.where(trace > 0, 5 * eps * trace, 1).astype(matrix.dtype)

    def factorise(shift: Scalar) -> Array:
        shifted = matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
        return cholesky(shifted)

    def failed(state: tuple[Scalar, Array, Int[Array, ""]]) -> Array:
        _, factor, tries = state
        # A failed factorisation is NaN all over.
        return ~jnp.isfinite(factor[0, 0]) & (tries < 6)

    def again(state: tuple[Scalar, Array, Int[Array, ""]]) -> tuple[Scalar, Array, Array]:
        shift = jnp.maximum(10 * state[0], smallest)
        return shift, factorise(shift), state[2] + 1

    # In float32 5·eps·tr K would already cost accuracy: first try without.
    first = smallest if eps < 1e-10 else jnp.where(trace > 0, 0, smallest).astype(matrix.dtype)
    start = (first, factorise(first), jnp.asarray(0))
    # The loop copies what it carries, which is worth avoiding in the usual case.
    climb = lambda: jax.lax.while_loop(failed, again, start)[1]
    return jax.lax.cond(failed(start), climb, lambda: start[1])


def _solve(triangle: Array, cholesky: Array, vector: Array) -> Array:
    # So derivatives are solves with the factor that is there: nothing differentiates through
    # the factorisation.
    def mv(vector: Array) -> Array:
        return jnp.matmul(mirrored(triangle), vector, precision=jax.lax.Precision.HIGHEST)

    solve = lambda _, right: cho_solve(cholesky, right)
    return jax.lax.custom_linear_solve(mv, vector, solve, symmetric=True)


@checked
def numerical_rank(eigenvalues: Float[Array, " n"]) -> Int[Array, ""]:
    """How many eigenvalues of a Gram matrix stand above its rounding errors."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    threshold = len(eigenvalues) * eps * jnp.max(jnp.abs(eigenvalues))
    return jnp.sum(eigenvalues > threshold)


@checked
def condition_number(eigenvalues: Float[Array, " n"]) -> Scalar:
    """λ_max/λ_min of a Gram matrix over the eigenvalues above its rounding errors."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    largest = jnp.max(eigenvalues)
    kept = eigenvalues > len(eigenvalues) * eps * largest
    return largest / jnp.min(jnp.where(kept, eigenvalues, jnp.inf))
