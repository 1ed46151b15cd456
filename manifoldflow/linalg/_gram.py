"""Solves with the Gram matrix K = J Jᵀ, also where J loses rank.

The policy was measured on the models whose limits lie where J loses rank: Cholesky of
K + μI with a tiny μ, every projection applied again to what is left. A truncated
eigendecomposition costs ten times more, has NaN derivatives at repeated eigenvalues and
makes the vector field jump; it serves `rank` and `condition` only.
"""

import abc
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _tree
from manifoldflow._types import Scalar, Tangent
from manifoldflow.linalg._operator import AbstractJacobian


class AbstractGramSolve(eqx.Module):
    """A Gram matrix made ready for many solves at one point."""

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
        matrix = jacobian.gram()
        return DenseGramSolve(matrix, _regularised_cholesky(matrix))


class DenseGramSolve(AbstractGramSolve):
    matrix: Float[Array, "n n"]
    cholesky: Float[Array, "n n"]

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        return _solve(self.matrix, self.cholesky, vector)

    def damped_solve(self, vector: Float[Array, " n"], damping: Scalar) -> Float[Array, " n"]:
        damped = self.matrix + damping * jnp.eye(len(vector), dtype=vector.dtype)
        return _solve(damped, _regularised_cholesky(damped), vector)

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.linalg.eigvalsh(self.matrix)


def _regularised_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Cholesky factor of K + μI with the smallest μ of a short ladder that succeeds."""
    # The transpose of a symmetric matrix: LAPACK's column-major layout then stays away
    # from the matrix products that made it, which would be several times slower in it.
    matrix = jax.lax.stop_gradient(matrix).T
    eps = jnp.finfo(matrix.dtype).eps
    trace = jnp.trace(matrix)
    # A zero Jacobian has no normal space: any positive μ gives the right answer, zero.
    smallest = jnp.where(trace > 0, 5 * eps * trace, 1).astype(matrix.dtype)
    # In float32 5·eps·tr K would already cost accuracy: first try without.
    first = smallest if eps < 1e-10 else jnp.where(trace > 0, 0, smallest)

    def factorise(shift: Scalar) -> Array:
        shifted = matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jnp.linalg.cholesky(shifted, symmetrize_input=False)

    def failed(state: tuple[Scalar, Array, Int[Array, ""]]) -> Array:
        _, factor, tries = state
        return ~jnp.all(jnp.isfinite(factor)) & (tries < 6)

    def again(state: tuple[Scalar, Array, Int[Array, ""]]) -> tuple[Scalar, Array, Array]:
        shift = jnp.maximum(10 * state[0], smallest)
        return shift, factorise(shift), state[2] + 1

    first = first.astype(matrix.dtype)
    start = (first, factorise(first), jnp.asarray(0))
    return jax.lax.while_loop(failed, again, start)[1]


@partial(jax.custom_jvp)
def _solve(matrix: Array, cholesky: Array, vector: Array) -> Array:
    del matrix
    return jax.scipy.linalg.cho_solve((cholesky, True), vector)


@_solve.defjvp
def _solve_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    # d(K⁻¹w) = K⁻¹(dw − dK K⁻¹w): the factor that is there serves again, and nothing
    # differentiates through the factorisation.
    matrix, cholesky, vector = primals
    matrix_dot, _, vector_dot = tangents
    solution = _solve(matrix, cholesky, vector)
    change = jnp.matmul(matrix_dot, solution, precision=jax.lax.Precision.HIGHEST)
    return solution, _solve(matrix, cholesky, vector_dot - change)


def num_passes(dtype: jnp.dtype) -> int:
    """How often a projection is applied to what is left: tangency needs it."""
    return 2 if jnp.finfo(dtype).eps < 1e-10 else 3


def pseudo_inverse_mv(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Float[Array, " n"]
) -> Tangent:
    """J†w = Jᵀ K⁻¹ w, refined."""
    lifted = jacobian.transpose_mv(gram.solve(vector))
    for _ in range(num_passes(vector.dtype) - 1):
        left = vector - jacobian.mv(lifted)
        lifted = _tree.add(lifted, jacobian.transpose_mv(gram.solve(left)))
    return lifted


def normal_component(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Tangent
) -> Tangent:
    """P⊥v = Jᵀ K⁻¹ J v, refined: (I − P⊥) is applied two or three times."""
    remainder = vector
    for _ in range(num_passes(_tree.dtype_of(vector))):
        multipliers = gram.solve(jacobian.mv(remainder))
        remainder = _tree.subtract(remainder, jacobian.transpose_mv(multipliers))
    return _tree.subtract(vector, remainder)


def numerical_rank(eigenvalues: Float[Array, " n"]) -> Int[Array, ""]:
    """How many eigenvalues of a Gram matrix stand above its rounding errors."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    threshold = len(eigenvalues) * eps * jnp.max(jnp.abs(eigenvalues))
    return jnp.sum(eigenvalues > threshold)


def condition_number(eigenvalues: Float[Array, " n"]) -> Scalar:
    """λ_max/λ_min of a Gram matrix over the eigenvalues above its rounding errors."""
    eps = jnp.finfo(eigenvalues.dtype).eps
    largest = jnp.max(eigenvalues)
    kept = eigenvalues > len(eigenvalues) * eps * largest
    return largest / jnp.min(jnp.where(kept, eigenvalues, jnp.inf))
