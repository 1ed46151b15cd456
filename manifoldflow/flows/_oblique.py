"""The kernel and the range of a matrix that need not be symmetric, and its Lyapunov equation.

For A with ker A ⊕ range A = the whole space: the projector Π on the kernel along the range, the
group inverse A^# and the solution of A M + M Aᵀ = S on the range. Nothing here takes
eigenvectors of A, which have no safe derivatives: bases of the kernels are found once by a
singular value decomposition and from then on by linear equations that A + dA has as well.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Flag, Scalar

Matrix = Float[Array, "D D"]

_MAX_STEPS = 60  # of Newton's iteration for the sign; some 10 are enough at condition 1e12


class Splitting(eqx.Module):
    """The splitting of the space by A into its kernel and its range."""

    matrix: Matrix  # A in units of its largest singular value, plus Π: invertible
    size: Scalar  # that singular value
    tangent: Matrix  # Π, on ker A along range A
    inverse: Matrix  # A^#, zero on the kernel
    rank: Int[Array, ""]
    cosine: Scalar  # of the largest angle between ker A and ker Aᵀ: 0 where A is not semisimple

    def lyapunov_solve(self, rhs: Matrix) -> tuple[Matrix, Flag]:
        """The M with A M + M Aᵀ = Π̄ rhs Π̄ᵀ on the range, and True if A is stable there."""
        normal = jnp.eye(len(rhs), dtype=rhs.dtype) - self.tangent
        solution, is_stable = stable_lyapunov_solve(self.matrix, product(normal, rhs, normal.T))
        return solution / self.size, is_stable


def splitting(matrix: Matrix, rank: int | float) -> Splitting:
    """The splitting of A by its rank: a count, or the share of the largest singular value."""
    # Singular vectors of one null space are arbitrary, and have no derivative: only the solves with
    # the bordered matrix below are differentiated.
    left, values, right = _svd(jax.lax.stop_gradient(matrix))
    if isinstance(rank, int):
        inside = jnp.arange(len(values)) < rank
    else:
        inside = values > rank * values[0]
    size = _tree.where(values[0] > 0, values[0], 1)
    one = jnp.diag(inside.astype(matrix.dtype))
    left, right = (jnp.where(inside, 0, basis) for basis in (left, right.T))
    # Bases of both kernels that stay so, to first order, where A changes at constant rank.
    bordered = inverse(matrix / size + product(left, right.T))
    kernel, cokernel = product(bordered, left), product(bordered.T, right)
    # `one` fills the places of the range, so that the matrix is invertible whatever the rank is.
    crossing = product(cokernel.T, kernel) + one
    tangent = product(kernel, inverse(crossing), cokernel.T)
    whole = matrix / size + tangent
    angles = _svd(jax.lax.stop_gradient(product(left.T, right)) + one)[1]
    return Splitting(
        whole, size, tangent, (inverse(whole) - tangent) / size, jnp.sum(inside), angles[-1]
    )


def stable_lyapunov_solve(matrix: Matrix, rhs: Matrix) -> tuple[Matrix, Flag]:
    """The M with B M + M Bᵀ = rhs, and True if all eigenvalues of B have positive real parts.

    By Newton's iteration for the sign of [[B, rhs], [0, −Bᵀ]], which is [[1, 2M], [0, −1]] for
    those B only [Roberts1980]: D³ operations, where a linear system of D² unknowns takes D⁶.
    """

    def operator(m: Matrix) -> Matrix:
        return product(matrix, m) + product(m, matrix.T)

    def solve(_, right: Matrix) -> tuple[Matrix, Flag]:
        return _by_sign(matrix, right)

    def transpose_solve(_, right: Matrix) -> tuple[Matrix, Flag]:
        return _by_sign(matrix.T, right)

    # By the implicit function: the loop of Newton's iteration has no derivative in reverse mode.
    solution, is_stable = jax.lax.custom_linear_solve(
        operator, rhs, solve, transpose_solve, has_aux=True
    )
    return solution, is_stable


def _by_sign(matrix: Matrix, rhs: Matrix) -> tuple[Matrix, Flag]:
    cutoff = 10 * len(matrix) * _precision.eps_of_dtype(matrix)

    def is_going(carry):
        _, _, change, count = carry
        return ~(change <= cutoff) & (count < _MAX_STEPS)

    def step(carry):
        a, s, _, count = carry
        b = _plain_inverse(a)
        # In units in which A and its inverse are of one size: then few steps are enough.
        unit = (jnp.sum(a**2) / jnp.sum(b**2)) ** 0.25
        new = (a / unit + b * unit) / 2
        sheared = (s / unit + product(b, s, b.T) * unit) / 2
        change = jnp.sqrt(jnp.sum((new - a) ** 2) / jnp.sum(new**2))
        return new, sheared, change, count + 1

    start = matrix, rhs, jnp.asarray(jnp.inf, matrix.dtype), jnp.zeros((), int)
    sign, twice, _, _ = jax.lax.while_loop(is_going, step, start)
    off = jnp.max(jnp.abs(sign - jnp.eye(len(matrix), dtype=matrix.dtype)))
    # An eigenvalue on the imaginary axis, to rounding, has no sign. It gets one, and M is then as
    # large as it can be without solving anything.
    found = (product(matrix, twice) + product(twice, matrix.T)) / 2
    left = jnp.sqrt(jnp.sum((found - rhs) ** 2))
    return twice / 2, (off < 1e-2) & (left <= 1e-2 * jnp.sqrt(jnp.sum(rhs**2)))


def product(*factors: Array) -> Array:
    """The product of matrices, or of matrices and a vector, in full precision."""
    total = factors[0]
    for factor in factors[1:]:
        total = _precision.matmul(total, factor)
    return total


@linalg.one_by_one
def _plain_inverse(matrix: Array) -> Array:
    return jnp.linalg.inv(matrix)


@linalg.one_by_one
def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    left, values, right = jnp.linalg.svd(matrix)
    return left, values, right


@jax.custom_jvp
def inverse(matrix: Matrix) -> Matrix:
    """The inverse of a square matrix, by an LU factorisation, with derivatives of any order."""
    return _plain_inverse(matrix)


@inverse.defjvp
def _inverse_jvp(primals: tuple[Matrix], tangents: tuple[Matrix]) -> tuple[Matrix, Matrix]:
    value = inverse(*primals)
    return value, -product(value, tangents[0], value)


@jax.custom_jvp
def semidefinite_root(matrix: Matrix) -> Matrix:
    """The symmetric root of a symmetric matrix without negative eigenvalues.

    Its derivative is that at constant rank: finite where the matrix is singular.
    """
    return _root_parts(matrix)[0]


def _root_parts(matrix: Matrix) -> tuple[Matrix, Matrix, Array]:
    # Rounding makes some of the zero eigenvalues negative: their roots would be NaN.
    values, vectors, inside = linalg.range_spectrum(matrix)
    inside = inside & (values > 0)
    roots = _tree.where(inside, jnp.sqrt(_tree.where(inside, values, 1)), 0)
    return product(vectors * roots, vectors.T), vectors, roots


@semidefinite_root.defjvp
def _semidefinite_root_jvp(
    primals: tuple[Matrix], tangents: tuple[Matrix]
) -> tuple[Matrix, Matrix]:
    _, vectors, roots = _root_parts(*primals)
    sums = roots[:, None] + roots
    # dS solves S·dS + dS·S = dA; where both roots are 0, dA has no part at constant rank.
    quotients = _tree.where(sums > 0, 1 / _tree.where(sums > 0, sums, 1), 0)
    change = quotients * product(vectors.T, tangents[0], vectors)
    return semidefinite_root(*primals), product(vectors, change, vectors.T)
