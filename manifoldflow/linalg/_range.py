"""Functions of symmetric matrices that are singular on purpose, on their range.

H is a Hessian with a null space (the tangent space) and a range (the normal space). The eigenvalues
of the range are told by `rank`: a count, or a relative size. The derivatives divide only by
differences between range and null space, so that repeated eigenvalues do no harm.
"""

from functools import partial

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Scalar
from manifoldflow.linalg._lapack import eigh

Matrix = Float[Array, "n n"]


Rank = int | float | None


def checked_rank(rank: Rank, size: int) -> Rank:
    """The rank, refused unless it is a count from 0 to n, or a relative size in [0, 1)."""
    if rank is None:
        return None
    is_count = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if not (0 <= rank <= size if is_count else isinstance(rank, float) and 0 <= rank < 1):
        raise ValueError(
            f"rank must be an integer from 0 to {size}, the size of the matrix, which counts "
            f"eigenvalues, or a float in [0, 1), a share of the largest; got {rank!r}."
        )
    return int(rank) if is_count else rank


@checked
def range_spectrum(
    matrix: Matrix, rank: Rank = None
) -> tuple[Float[Array, " n"], Matrix, Bool[Array, " n"]]:
    """The spectrum of a symmetric matrix, and the part of it that makes the range.

    Args:
        matrix: symmetric, (n, n).
        rank: an integer counts the largest eigenvalues; a float below 1 takes those with |λ| >
            rank·max|λ|; None takes those with |λ| > n·eps·max|λ|.

    Returns:
        (λ, V, inside): eigenvalues in ascending order, eigenvectors as columns, and a mask that is
        True for the eigenvalues of the range.

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> values, _, inside = linalg.range_spectrum(jnp.diag(jnp.array([2.0, 0.0])))
        >>> print(values, inside)
        [0. 2.] [False  True]
    """
    rank = checked_rank(rank, len(matrix))
    values, vectors = eigh(matrix)
    if isinstance(rank, int):
        return values, vectors, jnp.arange(len(values)) >= len(values) - rank
    cutoff = len(values) * _precision.eps_of_dtype(values) if rank is None else rank
    return values, vectors, jnp.abs(values) > cutoff * jnp.max(jnp.abs(values))


def _rotate(vectors: Array, matrix: Array) -> Array:
    return _precision.matmul(_precision.matmul(vectors, matrix), vectors.T)


def _difference_quotients(
    values: Array, inside: Bool[Array, " n"], applied: Array, both: Array
) -> Array:
    """The quotients (g(λⱼ) − g(λₖ))/(λⱼ − λₖ), where g vanishes outside the range."""
    # Only gaps between range and null space are divided by: repeated eigenvalues make no NaN.
    across = inside[:, None] ^ inside[None, :]
    gap = _tree.where(across, values[:, None] - values[None, :], 1)
    between = (applied[:, None] - applied[None, :]) / gap
    within = inside[:, None] & inside[None, :]
    return _tree.where(across, between, _tree.where(within, both, 0))


@checked
@jit_part
def pseudo_inverse(matrix: Matrix, rank: Rank = None) -> Matrix:
    """The Moore-Penrose inverse H† of a symmetric matrix, on its range.

    Args:
        matrix: H, symmetric, (n, n).
        rank: tells the eigenvalues of the range, see `range_spectrum`.

    Returns:
        (n, n). Differentiable at constant rank, also where eigenvalues repeat.

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.pseudo_inverse(jnp.diag(jnp.array([2.0, 0.0]))).tolist())
        [[0.5, 0.0], [0.0, 0.0]]
    """
    return _pseudo_inverse(matrix, checked_rank(rank, len(matrix)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pseudo_inverse(matrix: Matrix, rank: Rank) -> Matrix:
    values, vectors, inside = range_spectrum(matrix, rank)
    return _rotate(vectors, jnp.diag(_tree.where(inside, 1 / _tree.where(inside, values, 1), 0)))


@_pseudo_inverse.defjvp
def _pseudo_inverse_jvp(rank, primals, tangents):
    (matrix,), (matrix_dot,) = primals, tangents
    values, vectors, inside = range_spectrum(matrix, rank)
    inverse = _tree.where(inside, 1 / _tree.where(inside, values, 1), 0)
    # (1/λⱼ − 1/λₖ)/(λⱼ − λₖ) in closed form, which equal eigenvalues do not harm.
    both = -inverse[:, None] * inverse[None, :]
    quotients = _difference_quotients(values, inside, inverse, both)
    rotated = _rotate(vectors.T, matrix_dot)
    return _rotate(vectors, jnp.diag(inverse)), _rotate(vectors, quotients * rotated)


@checked
@jit_part
def range_projection(matrix: Matrix, rank: Rank = None) -> Matrix:
    """The orthogonal projector on the range of a symmetric matrix.

    Args:
        matrix: symmetric, (n, n).
        rank: tells the eigenvalues of the range, see `range_spectrum`.

    Returns:
        (n, n). Differentiable at constant rank.

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.range_projection(jnp.full((2, 2), 3.0)).round(4).tolist())
        [[0.5, 0.5], [0.5, 0.5]]
    """
    return _range_projection(matrix, checked_rank(rank, len(matrix)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _range_projection(matrix: Matrix, rank: Rank) -> Matrix:
    _, vectors, inside = range_spectrum(matrix, rank)
    return _rotate(vectors, jnp.diag(inside.astype(matrix.dtype)))


@_range_projection.defjvp
def _range_projection_jvp(rank, primals, tangents):
    (matrix,), (matrix_dot,) = primals, tangents
    values, vectors, inside = range_spectrum(matrix, rank)
    ones = inside.astype(matrix.dtype)
    # The projector is 1 on all of the range, so that there its quotients are 0.
    quotients = _difference_quotients(values, inside, ones, jnp.zeros((), matrix.dtype))
    rotated = _rotate(vectors.T, matrix_dot)
    return _rotate(vectors, jnp.diag(ones)), _rotate(vectors, quotients * rotated)


@checked
@jit_part
def log_pseudo_determinant(matrix: Matrix, rank: Rank = None) -> Scalar:
    """The logarithm ln|H|₊ of the product of the eigenvalues on the range.

    Its derivative at constant rank is tr(H†·dH).

    Args:
        matrix: H, symmetric, (n, n).
        rank: tells the eigenvalues of the range, see `range_spectrum`.

    Returns:
        A scalar; NaN where an eigenvalue of the range is negative.

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> singular = jnp.diag(jnp.array([2.0, 3.0, 0.0]))
        >>> print(f"{linalg.log_pseudo_determinant(singular):.4f}")  # ln 6
        1.7918
    """
    return _log_pseudo_determinant(matrix, checked_rank(rank, len(matrix)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_pseudo_determinant(matrix: Matrix, rank: Rank) -> Scalar:
    values, _, inside = range_spectrum(matrix, rank)
    return jnp.sum(_tree.where(inside, jnp.log(_tree.where(inside, values, 1)), 0))


@_log_pseudo_determinant.defjvp
def _log_pseudo_determinant_jvp(rank, primals, tangents):
    (matrix,), (matrix_dot,) = primals, tangents
    # By functions with rules of their own, so that further derivatives pass no `eigh` of this one.
    change = jnp.sum(pseudo_inverse(matrix, rank) * matrix_dot)
    return log_pseudo_determinant(matrix, rank), change


@checked
@jit_part
def square_root(matrix: Matrix, rank: Rank = None) -> Matrix:
    """The symmetric square root of the positive part of a symmetric matrix, on its range.

    Negative eigenvalues count as zeros. Where an eigenvalue of the range comes close to zero, its
    derivatives grow without bound.

    Args:
        matrix: symmetric, (n, n).
        rank: tells the eigenvalues of the range, see `range_spectrum`.

    Returns:
        (n, n).

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.square_root(jnp.diag(jnp.array([4.0, 0.0]))).tolist())
        [[2.0, 0.0], [0.0, 0.0]]
    """
    return _square_root(matrix, checked_rank(rank, len(matrix)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _square_root(matrix: Matrix, rank: Rank) -> Matrix:
    values, vectors, inside = range_spectrum(matrix, rank)
    inside = inside & (values > 0)
    return _rotate(vectors, jnp.diag(_root_of(values, inside)))


@_square_root.defjvp
def _square_root_jvp(rank, primals, tangents):
    (matrix,), (matrix_dot,) = primals, tangents
    values, vectors, inside = range_spectrum(matrix, rank)
    inside = inside & (values > 0)
    roots = _root_of(values, inside)
    sums = _tree.where(inside[:, None] & inside[None, :], roots[:, None] + roots[None, :], 1)
    # (√λⱼ − √λₖ)/(λⱼ − λₖ) = 1/(√λⱼ + √λₖ), which equal eigenvalues do not harm.
    quotients = _difference_quotients(values, inside, roots, 1 / sums)
    return _rotate(vectors, jnp.diag(roots)), _rotate(
        vectors, quotients * _rotate(vectors.T, matrix_dot)
    )


def _root_of(values: Array, inside: Bool[Array, " n"]) -> Array:
    return _tree.where(inside, jnp.sqrt(_tree.where(inside, values, 1)), 0)


@checked
def lyapunov_operator(matrix: Matrix) -> lx.AbstractLinearOperator:
    """The operator S ↦ HS + SH on matrices, self-adjoint.

    Args:
        matrix: H, symmetric, (n, n).

    Returns:
        A lineax operator from (n, n) to (n, n).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(
        ...     linalg.lyapunov_operator(jnp.diag(jnp.array([1.0, 2.0])))
        ...     .mv(jnp.ones((2, 2)))
        ...     .tolist()
        ... )
        [[2.0, 3.0], [3.0, 4.0]]
    """

    def mv(s: Matrix) -> Matrix:
        return _precision.matmul(matrix, s) + _precision.matmul(s, matrix)

    structure = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
    return lx.FunctionLinearOperator(mv, structure, lx.symmetric_tag)


@checked
@jit_part
def lyapunov_solve(matrix: Matrix, rhs: Matrix, rank: Rank = None) -> Matrix:
    """The S with HS + SH = rhs whose rows and columns lie in the range of H.

    The part of `rhs` outside the range is ignored [LiWangArora2022, Lemma 4.5].

    Args:
        matrix: H, symmetric, (n, n).
        rhs: (n, n).
        rank: tells the eigenvalues of the range, see `range_spectrum`.

    Returns:
        S, (n, n). Differentiable at constant rank.

    Raises:
        ValueError: a rank out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> hessian = jnp.diag(jnp.array([2.0, 0.0]))
        >>> print(linalg.lyapunov_solve(hessian, jnp.ones((2, 2))).tolist())
        [[0.25, 0.0], [0.0, 0.0]]
    """
    return _lyapunov_solve(matrix, rhs, checked_rank(rank, len(matrix)))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _lyapunov_solve(matrix: Matrix, rhs: Matrix, rank: Rank) -> Matrix:
    values, vectors, inside = range_spectrum(matrix, rank)
    within = inside[:, None] & inside[None, :]
    sums = _tree.where(within, values[:, None] + values[None, :], 1)
    rotated = _rotate(vectors.T, rhs)
    return _rotate(vectors, _tree.where(within, rotated / sums, 0))


@_lyapunov_solve.defjvp
def _lyapunov_solve_jvp(rank, primals, tangents):
    (matrix, rhs), (matrix_dot, rhs_dot) = primals, tangents

    def matmul(x: Matrix, y: Matrix) -> Matrix:
        return _precision.matmul(x, y)

    solution = lyapunov_solve(matrix, rhs, rank)
    # The range itself turns with H: S = ΠSΠ solves HS + SH = Π·rhs·Π.
    _, turn = jax.jvp(lambda m: range_projection(m, rank), (matrix,), (matrix_dot,))
    taken = matmul(turn, rhs) + matmul(rhs, turn)
    moved = matmul(matrix_dot, solution) + matmul(solution, matrix_dot)
    inner = lyapunov_solve(matrix, rhs_dot + taken - moved, rank)
    return solution, inner + matmul(turn, solution) + matmul(solution, turn)
