"""Solves with the Gram matrix K = J Jᵀ, also where J loses rank.

Rows are brought to length one first: what one constraint is measured in, or by what it is
multiplied, changes nothing. Beyond that the policy was measured on the models whose limits lie
where J loses rank: Cholesky of K + μI with a tiny μ, corrected by applying it again (see
`_projection`). A truncated eigendecomposition costs ten times more, has NaN derivatives at
repeated eigenvalues and makes the vector field jump; it serves `rank` and `condition` only.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _mesh, _precision, _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._jit import jit_part
from manifoldflow._types import Flag, Scalar
from manifoldflow.linalg._distributed import (
    dense_cho_solve,
    dense_cholesky,
    distributed_cholesky,
    DistributedFactor,
    distributes,
)
from manifoldflow.linalg._memory import dense_fits
from manifoldflow.linalg.jacobian._operator import AbstractJacobian, mirrored

Factor = TypeVar("Factor")


class AbstractGramSolve(eqx.Module):
    """A Gram matrix K = JJᵀ made ready for many solves at one point.

    Attributes:
        row_scale: factors that give the rows of J length one, see `row_scale`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> prepared = linalg.DenseGram()(jacobian)
        >>> print(isinstance(prepared, linalg.AbstractGramSolve), prepared.eigenvalues().round(4))
        True [25.]
    """

    row_scale: eqx.AbstractVar[Float[Array, " n"]]  # that gives the rows length one, see there

    @abc.abstractmethod
    def row_norms_squared(self) -> Float[Array, " n"]:
        """The diagonal of K, the units of the rows."""

    @abc.abstractmethod
    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """An approximation of K⁻¹w, accurate enough to be corrected a few times."""

    @abc.abstractmethod
    def damped(self, damping: Scalar) -> "AbstractGramSolve":
        """The same for K + damping·diag(K) in place of K."""

    @abc.abstractmethod
    def eigenvalues(self) -> Float[Array, " n"]:
        """The spectrum of K in ascending order."""


class AbstractGram(eqx.Module):
    """A method of solving with Gram matrices: a value that manifolds carry.

    Examples:
        >>> from manifoldflow import linalg
        >>> print(isinstance(linalg.DenseGram(), linalg.AbstractGram))
        True
    """

    @abc.abstractmethod
    def __call__(self, jacobian: AbstractJacobian) -> AbstractGramSolve:
        """Prepare the solves at the point where this Jacobian was taken."""


class DenseGram(AbstractGram):
    """Cholesky factorisation of the n×n Gram matrix; n² numbers of memory, n³/3 operations.

    Within `with manifoldflow.mesh(…)` each device has the whole matrix, its factor and one
    temporary as long as these 3n² numbers fit in an eighth of its memory, or in 2 GiB where it
    does not tell: up to n = 13,377 in float32 and 9,459 in float64 there, up to 29,914 in
    float32 on a device of 80 GiB. Beyond that rows of the matrix and of its factor are cut over
    all devices, and none holds n² numbers; their number must divide n.

    Args:
        is_distributed: whether they are, whatever fits.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[3.0, 0.0], [0.0, 2.0]])
        >>> prepared = linalg.DenseGram()(linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows))
        >>> print(prepared.solve(jnp.array([9.0, 8.0])).round(4))
        [1. 2.]
    """

    is_distributed: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        checked_fields(self)

    def __call__(self, jacobian: AbstractJacobian) -> "DenseGramSolve | DistributedGramSolve":
        rows = jacobian.out_structure()
        if self._distributes(rows.size, rows.dtype.itemsize):
            matrix = jacobian.distributed_gram()
            norms_squared = _mesh.whole(_diagonal_by_rows(matrix))
            return DistributedGramSolve.of(matrix, norms_squared, jnp.zeros((), matrix.dtype))
        triangle = jacobian.gram_triangle()
        scale = row_scale(_diagonal(triangle))
        return DenseGramSolve.of(triangle, scale, jnp.zeros((), triangle.dtype))

    def _distributes(self, num_rows: int, itemsize: int) -> bool:
        is_possible = distributes(num_rows)
        if self.is_distributed and not is_possible:
            raise ValueError(
                "DenseGram: is_distributed=True needs a mesh in force of several devices, whose "
                f"number divides the {num_rows} rows; got {_mesh.num_devices()}. Call it within "
                "`with manifoldflow.mesh():`."
            )
        wanted = self.is_distributed
        return is_possible and (not dense_fits(num_rows, itemsize) if wanted is None else wanted)


class DenseGramSolve(AbstractGramSolve):
    # Only the upper triangle counts: half of the products of the Gram matrix.
    """Solves by the Cholesky factor of K, with rows brought to length one."""

    triangle: Float[Array, "n n"]
    row_scale: Float[Array, " n"]
    damping: Scalar
    cholesky: Float[Array, "n n"]  # of the matrix with rows of length one

    @classmethod
    def of(
        cls, triangle: Float[Array, "n n"], scale: Float[Array, " n"], damping: Scalar
    ) -> "DenseGramSolve":
        return cls(triangle, scale, damping, _cholesky(triangle, scale, damping))

    def row_norms_squared(self) -> Float[Array, " n"]:
        return _diagonal(self.triangle)

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # So derivatives are solves with the factor that is there: nothing differentiates
        # through the factorisation.
        def mv(vector: Array) -> Array:
            product = _precision.matmul(mirrored(self.triangle), vector)
            return product + self.damping * self.row_norms_squared() * vector

        def solve(_: Any, right: Array) -> Array:
            return self.row_scale * dense_cho_solve(self.cholesky, self.row_scale * right)

        return jax.lax.custom_linear_solve(mv, vector, solve, symmetric=True)

    def damped(self, damping: Scalar) -> "DenseGramSolve":
        # A damping in float64 would make a float32 factor one of float64.
        damping = damping.astype(self.triangle.dtype)
        # K is kept: another damping is one more factorisation, and no product with J.
        return DenseGramSolve.of(self.triangle, self.row_scale, damping)

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.linalg.eigvalsh(mirrored(self.triangle))


class DistributedGramSolve(AbstractGramSolve):
    # The rows of both are over all devices.
    matrix: Float[Array, "n n"]
    norms_squared: Float[Array, " n"]
    row_scale: Float[Array, " n"]
    damping: Scalar
    factor: DistributedFactor  # of the matrix with rows of length one

    @classmethod
    def of(
        cls, matrix: Float[Array, "n n"], norms_squared: Float[Array, " n"], damping: Scalar
    ) -> "DistributedGramSolve":
        # Derivatives are told by the equation in `solve`; the ladder is a loop without reverse
        # mode.
        frozen, scale = jax.lax.stop_gradient(matrix), row_scale(norms_squared)
        shift_of_rows = _shift_of(scale, damping)
        factor = _first_positive(
            lambda shift: distributed_cholesky(frozen, scale, shift_of_rows + shift),
            lambda factor: factor.has_failed,
            DistributedFactor.nothing(frozen),
            scale,
        )
        return cls(matrix, norms_squared, scale, damping, factor)

    def row_norms_squared(self) -> Float[Array, " n"]:
        return self.norms_squared

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        def mv(vector: Array) -> Array:
            product = _mesh.whole(_precision.matmul(self.matrix, vector))
            return product + self.damping * self.norms_squared * vector

        def solve(_: Any, right: Array) -> Array:
            return self.row_scale * self.factor.solve(self.row_scale * right)

        return jax.lax.custom_linear_solve(mv, _mesh.whole(vector), solve, symmetric=True)

    def damped(self, damping: Scalar) -> "DistributedGramSolve":
        damping = damping.astype(self.matrix.dtype)
        return DistributedGramSolve.of(self.matrix, self.norms_squared, damping)

    def eigenvalues(self) -> Float[Array, " n"]:
        """Of the whole matrix, on each device: for tests and diagnosis."""
        return jnp.linalg.eigvalsh(_mesh.whole(self.matrix))


@checked
def row_scale(norms_squared: Float[Array, " n"]) -> Float[Array, " n"]:
    """Factors that give the rows of J length one, whatever units they come in.

    The factor is 0 for a row that is the rounding error of the longest: it constrains nothing.

    Args:
        norms_squared: ‖∇fᵢ‖², (n,).

    Returns:
        (n,), not differentiated.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.row_scale(jnp.array([25.0, 0.0])).round(4))
        [0.2 0. ]
    """
    frozen = jax.lax.stop_gradient(norms_squared)
    # In float32 rounding is so coarse that rows in smaller units would be taken for it.
    floor = min(8 * _precision.eps_of_dtype(frozen), 1e-10)
    is_lost = frozen <= floor**2 * jnp.max(frozen)
    return _tree.where(is_lost, 0, 1 / jnp.sqrt(_tree.where(is_lost, 1, frozen)))


@checked
@jit_part
def equilibrated_eigenvalues(jacobian: AbstractJacobian) -> Float[Array, " n"]:
    """The eigenvalues of the Gram matrix of the rows of length one, ascending: they have a rank.

    Args:
        jacobian: J, (n, D).

    Returns:
        (n,).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[3.0, 0.0], [0.0, 1e-4]])  # in other units
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows)
        >>> print(linalg.equilibrated_eigenvalues(jacobian).round(4))
        [1. 1.]
    """
    triangle = jacobian.gram_triangle()
    scale = row_scale(_diagonal(triangle))
    return jnp.linalg.eigvalsh(mirrored(_equilibrated(triangle, scale)))


def _diagonal(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """The diagonal, as a strided slice: `jax.numpy.diagonal` gathers, in 17 operations."""
    return matrix.reshape(-1)[:: len(matrix) + 1]


def _equilibrated(triangle: Float[Array, "n n"], scale: Float[Array, " n"]) -> Array:
    """diag(scale)·K·diag(scale)."""
    along = lambda axis: jax.lax.broadcast_in_dim(scale, triangle.shape, (axis,))
    return along(0) * triangle * along(1)


def _diagonal_by_rows(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """The diagonal without a look at other rows: these are on other devices."""
    is_own = jnp.arange(len(matrix)) == jnp.arange(len(matrix))[:, None]
    return jnp.sum(jnp.where(is_own, matrix, 0), axis=1)


def _cholesky(
    triangle: Float[Array, "n n"], scale: Float[Array, " n"], damping: Scalar
) -> Float[Array, "n n"]:
    """Cholesky factor of the equilibrated K + (damping + μ)·I."""
    triangle = jax.lax.stop_gradient(triangle)
    shift_of_rows = _shift_of(scale, damping)
    identity = jnp.eye(len(triangle), dtype=triangle.dtype)

    def factorise(shift: Scalar) -> Array:
        # The transpose: LAPACK's column-major layout then stays away from the matrix products
        # that made the triangle, which would be several times slower in it.
        matrix = _equilibrated(triangle, scale).T
        return dense_cholesky(matrix + (shift_of_rows + shift) * identity)

    # A failed factorisation is NaN all over.
    has_failed = lambda factor: ~jnp.isfinite(factor[0, 0])
    return _first_positive(factorise, has_failed, jnp.full_like(triangle, jnp.nan), scale)


def _shift_of(scale: Float[Array, " n"], damping: Scalar) -> Float[Array, " n"]:
    """Rows that are lost have no equations; any diagonal gives them the right answer, zero."""
    return jax.lax.stop_gradient(damping) + (scale == 0).astype(scale.dtype)


def _first_positive(
    factorise: Callable[[Scalar], Factor],
    has_failed: Callable[[Factor], Flag],
    nothing: Factor,
    scale: Float[Array, " n"],
) -> Factor:
    """The factor with the smallest shift μ of a short ladder that succeeds."""
    size, eps = len(scale), _precision.eps_of_dtype(scale)
    # In float32 5·eps·n would already cost accuracy: first try without.
    # 5·eps·tr K: the trace of a matrix with rows of length one is n.
    smallest = 5 * eps * size
    first = smallest if eps < 1e-10 else 0.0

    def failed(state: tuple[Scalar, Factor, Int[Array, ""]]) -> Flag:
        _, factor, tries = state
        return has_failed(factor) & (tries < 7)

    def again(state: tuple[Scalar, Factor, Int[Array, ""]]) -> tuple[Scalar, Factor, Array]:
        shift, _, tries = state
        factor = factorise(shift)
        return jnp.maximum(10 * shift, smallest).astype(scale.dtype), factor, tries + 1

    # A loop, and not all rungs at once: mostly the first factorisation is the only one.
    # `nothing` counts as failed, so that the loop makes the first factor too: one copy in the
    # program.
    start = (jnp.asarray(first, scale.dtype), nothing, jnp.asarray(0))
    return jax.lax.while_loop(failed, again, start)[1]


@checked
def numerical_rank(eigenvalues: Float[Array, " n"]) -> Int[Array, ""]:
    """The number of eigenvalues of a Gram matrix above its rounding errors.

    Args:
        eigenvalues: (n,), in any order.

    Returns:
        An integer array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.numerical_rank(jnp.array([1e-20, 1.0, 4.0])))
        2
    """
    eps = _precision.eps_of_dtype(eigenvalues)
    # What the rounding of a factorisation makes of a zero, as in `numpy.linalg.matrix_rank`.
    threshold = len(eigenvalues) * eps * jnp.max(jnp.abs(eigenvalues))
    return jnp.sum(eigenvalues > threshold)


@checked
def condition_number(eigenvalues: Float[Array, " n"]) -> Scalar:
    """The ratio λ_max/λ_min of a Gram matrix, over the eigenvalues above its rounding errors.

    Args:
        eigenvalues: (n,), in any order.

    Returns:
        A scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.condition_number(jnp.array([1e-20, 1.0, 4.0])))
        4.0
    """
    eps = _precision.eps_of_dtype(eigenvalues)
    largest = jnp.max(eigenvalues)
    kept = eigenvalues > len(eigenvalues) * eps * largest
    return largest / jnp.min(_tree.where(kept, eigenvalues, jnp.inf))
