"""The map of a step of mini-batch SGD on the second moments of the residuals, in n dimensions.

With Q = E[uuᵀ] for the residuals u, and K = A Aᵀ for A = ∂u of N examples with k rows each,

    Q → Q − η(KQ + QK) + η²K G(Q) K,    G(Q) = aQ + b·bd(Q),

bd keeping each example's k×k block. In the eigenbasis of K, and with Q = √F ∘ Y for Fᵢⱼ = λᵢλⱼ/(λᵢ
+ λⱼ), that is Y → Y − D ∘ (Y − ηSY), Dᵢⱼ = η(λᵢ + λⱼ), where Sʸ = √F ∘ G(√F ∘ Y) is self-adjoint
and positive: what there is to know are its largest eigenvalue, and solves with 1 − ηS. Outside the
range of K, where no residual ever goes, F is zero.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, linalg
from manifoldflow._types import Scalar

Matrix = Float[Array, "n n"]

# Lanczos' method looks at its tridiagonal matrix after each _STRIDE of at most _LONGEST products.
_STRIDE, _LONGEST = 8, 256
# The number of steps after which conjugate gradients give up.
_MOST = 2000


class Batches(eqx.Module):
    """The law of batches: G(Q) = whole·Q + own·bd(Q), over blocks of `rows` rows."""

    whole: float = eqx.field(static=True)
    own: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)

    @classmethod
    def of(cls, num_examples: int, rows: int, batch_size: int, replacement: bool) -> "Batches":
        if replacement or num_examples == 1:
            return cls(1 - 1 / batch_size, num_examples / batch_size, rows)
        pairs = batch_size * (num_examples - 1)
        whole = num_examples * (batch_size - 1) / pairs
        return cls(whole, num_examples * (num_examples - batch_size) / pairs, rows)


class Moments(eqx.Module):
    """The operator S of a matrix K and batches, in the eigenbasis of K."""

    values: Float[Array, " n"]  # ascending; zero in place of what is negative by rounding
    vectors: Matrix
    batches: Batches

    @classmethod
    def of(cls, gram: Matrix, batches: Batches) -> "Moments":
        # Where the range ends is not asked: in single precision many small eigenvalues would go,
        # which together count. F is continuous there, and what rounding makes of zeros as small.
        values, vectors = linalg.eigh(gram)
        return cls(jnp.maximum(values, 0), vectors, batches)

    @property
    def sums(self) -> Matrix:
        """λᵢ + λⱼ, 1 where that is zero."""
        sums = self.values[:, None] + self.values[None, :]
        # In the null space of K nothing moves: √F is zero there, whatever it is divided by.
        return jnp.where(sums > 0, sums, 1)

    @property
    def root(self) -> Matrix:
        """√F."""
        roots = jnp.sqrt(self.values)
        return roots[:, None] * roots[None, :] / jnp.sqrt(self.sums)

    def gathered(self, moments: Matrix) -> Matrix:
        """G(Q), in two products: of the blocks alone, the rest is not formed."""
        shape = (-1, self.batches.rows, len(moments))
        turned = _precision.matmul(self.vectors, moments).reshape(shape)
        blocks = _precision.einsum("nki,nli->nkl", turned, self.vectors.reshape(shape))
        back = _precision.einsum("nkl,nli->nki", blocks, self.vectors.reshape(shape))
        own = _precision.matmul(self.vectors.T, back.reshape(moments.shape))
        return self.batches.whole * moments + self.batches.own * own

    def mv(self, y: Matrix) -> Matrix:
        """Sy."""
        return self.root * self.gathered(self.root * y)

    def turned(self, matrix: Matrix) -> Matrix:
        """The matrix in the eigenbasis."""
        return _precision.matmul(self.vectors.T, _precision.matmul(matrix, self.vectors))

    def turned_back(self, matrix: Matrix) -> Matrix:
        """The matrix in the original basis."""
        return _precision.matmul(self.vectors, _precision.matmul(matrix, self.vectors.T))


class Top(eqx.Module):
    """The largest eigenvalue of S, and how far an eigenvalue may be from it."""

    value: Scalar
    residual: Scalar
    num_steps: Int[Array, ""]


class _Chain(eqx.Module):
    """Lanczos' recurrence without the vectors that it has passed."""

    previous: Matrix
    present: Matrix
    diagonal: Float[Array, " m"]
    beside: Float[Array, " m"]
    sum: Matrix  # Σ coefficients·vectors so far
    count: Int[Array, ""]


def _start(moments: Moments) -> _Chain:
    # S maps positive to positive, so that it has a top eigenvector y with √F ∘ y positive: no
    # such one is orthogonal to √F on the diagonal.
    first = jnp.diag(jnp.diagonal(moments.root))
    size = jnp.linalg.norm(first)
    zeros = jnp.zeros(_LONGEST, first.dtype)
    nothing = jnp.zeros_like(first)
    present = first / jnp.where(size > 0, size, 1)
    return _Chain(nothing, present, zeros, zeros, nothing, jnp.asarray(0))


def _next(moments: Moments, chain: _Chain, coefficient: Scalar | None = None) -> _Chain:
    before = jnp.where(chain.count > 0, chain.beside[chain.count - 1], 0)
    image = moments.mv(chain.present) - before * chain.previous
    along = _precision.vdot(chain.present, image)
    image = image - along * chain.present
    beyond = jnp.linalg.norm(image)
    total = chain.sum if coefficient is None else chain.sum + coefficient * chain.present
    return _Chain(
        chain.present,
        image / jnp.where(beyond > 0, beyond, 1),
        chain.diagonal.at[chain.count].set(along),
        chain.beside.at[chain.count].set(beyond),
        total,
        chain.count + 1,
    )


def _ritz(chain: _Chain) -> tuple[Scalar, Scalar, Float[Array, " m"]]:
    """The largest Ritz value, what its vector leaves over, and its coefficients."""
    # What is not there yet is zero, below all of a positive operator.
    beside = jnp.where(jnp.arange(_LONGEST) < chain.count - 1, chain.beside, 0)[:-1]
    matrix = jnp.diag(chain.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = linalg.eigh(matrix)
    last = jnp.maximum(chain.count - 1, 0)
    left = chain.beside[last] * jnp.abs(vectors[last, -1])
    return values[-1], left, vectors[:, -1]


def largest_eigenvalue(moments: Moments) -> Top:
    """The largest eigenvalue of S by Lanczos' method, in the memory of three n×n matrices.

    Without orthogonalisation eigenvalues come back as copies of themselves; the largest stays what
    it is, and so does its residual.
    """

    def is_going(state: tuple[_Chain, Scalar, Scalar]) -> Array:
        chain, value, left = state
        return (left > 0.5 * tolerance(value)) & (chain.count < _LONGEST)

    def cycle(state: tuple[_Chain, Scalar, Scalar]) -> tuple[_Chain, Scalar, Scalar]:
        chain = jax.lax.fori_loop(0, _STRIDE, lambda _, c: _next(moments, c), state[0])
        return chain, *_ritz(chain)[:2]

    start = _start(moments)
    none, infinite = (jnp.asarray(x, start.present.dtype) for x in (0, jnp.inf))
    chain, value, left = jax.lax.while_loop(is_going, cycle, (start, none, infinite))
    return Top(value, left, chain.count)


def tolerance(value: Scalar) -> Scalar:
    """The residual at which the largest eigenvalue is found; its error is of second order."""
    return _precision.eps_of_dtype(value) ** 0.5 * jnp.abs(value)


def solve(moments: Moments, rate: Scalar, right: Matrix) -> Matrix:
    """(1 − ηS)⁻¹ of a matrix, for η below the threshold; NaN where it was not found.

    By conjugate gradients, and its derivatives by the same.
    """
    dots = _precision.vdot
    bound = _precision.eps_of_dtype(right) ** 0.75

    def mv(z: Matrix) -> Matrix:
        return z - rate * moments.mv(z)

    def found(mv: Callable[[Matrix], Matrix], right: Matrix) -> Matrix:
        def is_going(state: tuple[Matrix, Matrix, Matrix, Scalar, Array]) -> Array:
            *_, left, count = state
            return (left > bound**2 * dots(right, right)) & (count < _MOST)

        def step(state: tuple[Matrix, Matrix, Matrix, Scalar, Array]) -> Any:
            z, residual, direction, left, count = state
            image = mv(direction)
            length = left / dots(direction, image)
            residual = residual - length * image
            new = dots(residual, residual)
            turned = residual + new / left * direction
            return z + length * direction, residual, turned, new, count + 1

        start = jnp.zeros_like(right), right, right, dots(right, right), jnp.asarray(0)
        z, *_ = jax.lax.while_loop(is_going, step, start)
        left = right - mv(z)
        is_found = dots(left, left) <= (10 * bound) ** 2 * dots(right, right)
        return jnp.where(is_found, z, jnp.nan)

    # Derivatives by the equation: a while_loop has no reverse mode.
    return jax.lax.custom_linear_solve(mv, right, found, symmetric=True)


def eigenvector(moments: Moments) -> Matrix:
    """The unit eigenvector of the largest eigenvalue, by going through the recurrence again."""
    start = _start(moments)
    count = largest_eigenvalue(moments).num_steps
    first = jax.lax.fori_loop(0, count, lambda _, chain: _next(moments, chain), start)
    coefficients = _ritz(first)[2]
    again = lambda index, chain: _next(moments, chain, coefficients[index])
    vector = jax.lax.fori_loop(0, count, again, start).sum
    size = jnp.linalg.norm(vector)
    return vector / jnp.where(size > 0, size, 1)


@eqx.filter_custom_jvp
def following(value: Scalar, gram: Matrix, moments: Moments) -> Scalar:
    """The largest eigenvalue of S, found already, as a function of K; differentiable once."""
    del gram, moments
    return value


@following.def_jvp
def _following_jvp(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    """dλ = 2⟨dK, WWᵀ⟩/λ, Wᵢⱼ = G(Q)ᵢⱼ·λⱼ/(λᵢ + λⱼ), Q = √F ∘ y with ‖y‖ = 1.

    In the space of the parameters H = AᵀA = ΣHᵢ, and what SGD makes of V = A†QA†ᵀ is the
    self-adjoint pencil aHVH + bΣHᵢVHᵢ = λ(HV + VH): its derivative at fixed V, in terms of K,
    also where K is singular. What of dK acts within the null space is zero.
    """
    value, _, moments = primals
    change = tangents[1]
    if change is None:
        return value, jnp.zeros_like(value)
    gathered = moments.gathered(moments.root * eigenvector(moments))
    halves = gathered * moments.values[None, :] / moments.sums
    square = _precision.matmul(halves, halves.T)
    return value, 2 * jnp.sum(moments.turned(change) * square) / value
