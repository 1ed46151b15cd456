"""Gram solves by conjugate gradients, and the choice between them and dense ones."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from manifoldflow import _mesh, _precision, _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._jit import jit_part
from manifoldflow._types import Flag, Key, Scalar
from manifoldflow.linalg._distributed import distributes
from manifoldflow.linalg._gram import AbstractGram, AbstractGramSolve, DenseGram, row_scale
from manifoldflow.linalg._lapack import one_by_one
from manifoldflow.linalg._memory import dense_fits, memory_budget
from manifoldflow.linalg.jacobian import AbstractJacobian

Module = TypeVar("Module", bound=eqx.Module)


class IterativeGram(AbstractGram):
    """Conjugate gradients on JJᵀ, by products only: never an n×n matrix to factorise.

    Args:
        rtol: of each solve; projections solve twice or three times, so that errors multiply.
            Default: eps^½.
        max_steps: iterations of one solve.
        preconditioner_rank: size of a randomised Nyström sketch of K that preconditions the
            iteration (Frangella, Tropp, Udell, SIAM J. Matrix Anal. Appl. 44(2), 2023); 0 for none.
            Costs that many products to prepare, and n × rank numbers.
        inverse: an explicit (n, n) inverse of K at a point nearby, to precondition with instead:
            `inverse_gram(jacobian)`. Good as long as the point has moved by some per cent.
        key: of the sketch; by default the same for all.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[3.0, 0.0], [0.0, 2.0]])
        >>> gram = linalg.IterativeGram(preconditioner_rank=2)
        >>> prepared = gram(linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows))
        >>> print(prepared.solve(jnp.array([9.0, 8.0])).round(3))
        [1. 2.]
    """

    rtol: float | None = eqx.field(static=True, default=None)
    max_steps: int = eqx.field(static=True, default=500)
    preconditioner_rank: int = eqx.field(static=True, default=0)
    inverse: Float[Array, "n n"] | None = None
    key: Key | None = None

    def __check_init__(self):
        checked_fields(self)
        checked_count("IterativeGram: max_steps", self.max_steps)
        _check_sketch(self.preconditioner_rank)
        if self.rtol is not None:
            checked_positive("IterativeGram: rtol", self.rtol)

    def __call__(self, jacobian: AbstractJacobian) -> "IterativeGramSolve":
        # What prepares the solves has no derivative: that of a solve is told by its equation.
        norms_squared = jax.lax.stop_gradient(jacobian.row_norms_squared())
        still = frozen(jacobian)
        wants_sketch = self.inverse is None and self.preconditioner_rank > 0
        scale = row_scale(norms_squared)
        product = partial(_equilibrated_mv, still, scale)
        structure, rank = jacobian.out_structure(), self.preconditioner_rank
        key = jr.key(0) if self.key is None else self.key
        sketch = nystroem_sketch(product, structure, rank, key) if wants_sketch else None
        damping = jnp.zeros((), norms_squared.dtype)
        return IterativeGramSolve(
            jacobian=jacobian,
            norms_squared=norms_squared,
            row_scale=scale,
            damping=damping,
            sketch=sketch,
            inverse=self.inverse,
            rtol=self.rtol,
            max_steps=self.max_steps,
        )


def frozen(module: Module) -> Module:
    """The same without derivatives; of arrays only, as a function may have a jaxpr for a leaf."""
    arrays, static = eqx.partition(module, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), static)


def _equilibrated_mv(
    jacobian: AbstractJacobian, scale: Float[Array, " n"], vector: Float[Array, " n"]
) -> Float[Array, " n"]:
    """J Jᵀw for rows of length one."""
    return scale * jacobian.mv(jacobian.transpose_mv(scale * vector))


def _check_sketch(rank: int) -> None:
    if rank < 0:
        raise ValueError(f"preconditioner_rank must be 0, for none, or positive; got {rank}.")


class Sketch(eqx.Module):
    """K ≈ U diag(λ) Uᵀ with orthonormal columns U, λ descending."""

    vectors: Float[Array, "n r"]
    values: Float[Array, " r"]

    def precondition(self, vector: Float[Array, " n"], shift: Scalar) -> Float[Array, " n"]:
        """(U diag(λ) Uᵀ + λ_r(I − UUᵀ) + shift)⁻¹ w, up to a factor."""
        inside = _precision.matmul(self.vectors.T, vector)
        # Times λ_r + shift, which leaves the complement of U as it is. Conjugate gradients do not
        # see a factor.
        weights = (self.values[-1] + shift) / (self.values + shift) - 1
        return vector + _precision.matmul(self.vectors, weights * inside)


def nystroem_sketch(
    product: Callable[[Array], Array], structure: jax.ShapeDtypeStruct, rank: int, key: Key
) -> Sketch:
    """The randomised Nyström approximation of a matrix from `rank` products with it."""
    rank = min(rank, structure.shape[0])
    probes = jr.normal(key, (structure.shape[0], rank), structure.dtype)
    probes = _orthonormal(probes)
    # One after the other: each product may be a pass through the whole model.
    images = jax.lax.map(product, probes.T).T
    # The core of a matrix of low rank is singular, and its Cholesky factor would be NaN. The shift
    # prevents that, and is taken off the eigenvalues in the end.
    shift = _precision.eps_of_dtype(structure) * jnp.linalg.norm(images)
    images = images + shift * probes
    core = _precision.matmul(probes.T, images)
    vectors, singular = _root(images, (core + core.T) / 2)
    return Sketch(vectors, jnp.maximum(singular**2 - shift, 0))


@one_by_one
def _orthonormal(probes: Float[Array, "n rank"]) -> Float[Array, "n rank"]:
    return jnp.linalg.qr(probes)[0]


@one_by_one
def _root(
    images: Float[Array, "n rank"], core: Float[Array, "rank rank"]
) -> tuple[Float[Array, "n rank"], Float[Array, " rank"]]:
    """The left singular vectors and the singular values of B·L⁻ᵀ, with LLᵀ the core."""
    factor = jnp.linalg.cholesky(core)
    root = jax.scipy.linalg.solve_triangular(factor, images.T, lower=True).T
    vectors, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    return vectors, singular


def conjugate_gradients(
    mv: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    right: Float[Array, " n"],
    rtol: float,
    max_steps: int,
) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """The x with A x = b until ‖b − A x‖ ≤ rtol·‖b‖, and the number of steps.

    Where nothing is left to do, it ends: an exact solution has no next direction.
    """
    target = rtol * _tree.norm(right)

    def is_going(state: _State) -> Flag:
        has_more = (_tree.norm(state.left) > target) & (state.size > 0)
        return has_more & (state.num_steps < max_steps)

    def step(state: _State) -> _State:
        change = mv(state.direction)
        curvature = _precision.vdot(state.direction, change)
        # Of a positive matrix: else rounding has the word, and the iteration ends.
        is_seen = curvature > 0
        length = _tree.where(is_seen, state.size / _tree.where(is_seen, curvature, 1), 0)
        solution = state.solution + length * state.direction
        # Now and then from the solution itself, before rounding piles up.
        left = jax.lax.cond(
            state.num_steps % 10 == 9,
            lambda: right - mv(solution),
            lambda: state.left - length * change,
        )
        preconditioned = precondition(left)
        size = _tree.where(is_seen, _precision.vdot(left, preconditioned), 0)
        direction = preconditioned + size / state.size * state.direction
        return _State(solution, left, direction, size, state.num_steps + 1)

    first = precondition(right)
    size = _precision.vdot(right, first)
    start = _State(jnp.zeros_like(right), right, first, size, jnp.asarray(0))
    found = jax.lax.while_loop(is_going, step, start)
    return found.solution, found.num_steps


class _State(eqx.Module):
    solution: Float[Array, " n"]
    left: Float[Array, " n"]
    direction: Float[Array, " n"]
    size: Scalar
    num_steps: Int[Array, ""]


@checked
@jit_part
def inverse_gram(jacobian: AbstractJacobian) -> Float[Array, "n n"]:
    """The inverse K⁻¹ as a matrix, to precondition solves at points nearby.

    Args:
        jacobian: J, (n, D).

    Returns:
        (n, n), for `IterativeGram(inverse=…)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[2.0, 0.0], [0.0, 1.0]])
        >>> print(linalg.inverse_gram(linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows)).round(4))
        [[0.25 0.  ]
         [0.   1.  ]]
    """
    prepared = DenseGram()(jacobian)
    identity = jnp.eye(jacobian.out_structure().shape[0], dtype=jacobian.out_structure().dtype)
    return jax.vmap(prepared.solve, in_axes=1, out_axes=1)(identity)


class IterativeGramSolve(AbstractGramSolve):
    jacobian: AbstractJacobian
    norms_squared: Float[Array, " n"]
    row_scale: Float[Array, " n"]
    damping: Scalar
    sketch: Sketch | None
    inverse: Float[Array, "n n"] | None
    rtol: float | None = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def row_norms_squared(self) -> Float[Array, " n"]:
        return self.norms_squared

    def damped(self, damping: Scalar) -> "IterativeGramSolve":
        return eqx.tree_at(lambda s: s.damping, self, damping.astype(self.damping.dtype))

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        # Derivatives are solves again: nothing differentiates through the iteration.
        def mv(vector: Array) -> Array:
            product = self.jacobian.mv(self.jacobian.transpose_mv(vector))
            return product + self.damping * self.norms_squared * vector

        still = frozen(self)
        solve = lambda _, right: still.solve_with_info(right)[0]
        return jax.lax.custom_linear_solve(mv, vector, solve, symmetric=True)

    def solve_with_info(
        self, vector: Float[Array, " n"]
    ) -> tuple[Float[Array, " n"], Int[Array, ""]]:
        """The solution and the number of iterations."""
        scale = self.row_scale

        def mv(w: Float[Array, " n"]) -> Float[Array, " n"]:
            return _equilibrated_mv(self.jacobian, scale, w) + self._shift * w

        rtol = _precision.eps_of_dtype(vector) ** 0.5 if self.rtol is None else self.rtol
        # In units of the right side: in float32 the squares of small ones are zero.
        size = _tree.size_of(scale * vector)
        right = scale * vector / size
        right = _mesh.whole(right) if _mesh.num_devices() > 1 else right
        found, num_steps = conjugate_gradients(
            mv, self._equilibrated_precondition, right, rtol, self.max_steps
        )
        return scale * found * size, num_steps

    @property
    def _shift(self) -> Scalar:
        # 5·eps·tr K, since rows of length one have the trace n: as the first rung of a dense solve.
        return self.damping + 5 * _precision.eps_of_dtype(self.row_scale) * len(self.row_scale)

    def precondition(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """The iteration's approximation of K⁻¹w, up to a factor: by the sketch or the inverse."""
        return self.row_scale * self._equilibrated_precondition(self.row_scale * vector)

    def _equilibrated_precondition(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        if self.inverse is not None:
            # The inverse is of K as it is, the iteration for rows of length one.
            norms = 1 / jnp.where(self.row_scale > 0, self.row_scale, 1)
            return norms * _precision.matmul(self.inverse, norms * vector)
        return vector if self.sketch is None else self.sketch.precondition(vector, self._shift)

    def eigenvalues(self) -> Float[Array, " n"]:
        """The eigenvalues of the n×n matrix, built for the purpose: for tests and diagnosis."""
        return jnp.linalg.eigvalsh(self.jacobian.gram())


class AutoGram(AbstractGram):
    """The choice of `DenseGram` where n² numbers fit and factorising pays, else `IterativeGram`.

    Dense if the matrix, its factor and one temporary, 3n² numbers, take at most `memory` and n ≤
    60·√D: the n³/3 operations of a factorisation then are no more than those of 300 products with J
    and Jᵀ at 4nD each. Within `with manifoldflow.mesh(…)` the memory of all its devices counts:
    what does not fit on one is cut over all. Iterative beyond, with a Nyström sketch.

    Args:
        memory: bytes on each device; by default an eighth of its memory, or 2 GiB where it does
            not tell.
        preconditioner_rank: of the sketch.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> for memory in (2**30, 1):
        ...     print(type(linalg.AutoGram(memory=memory)(jacobian)).__name__)
        DenseGramSolve
        IterativeGramSolve
    """

    memory: int | None = eqx.field(static=True, default=None)
    preconditioner_rank: int = eqx.field(static=True, default=256)

    def __check_init__(self):
        checked_fields(self)
        _check_sketch(self.preconditioner_rank)
        if self.memory is not None:
            checked_count("AutoGram: memory", self.memory)

    def __call__(self, jacobian: AbstractJacobian) -> AbstractGramSolve:
        rows = jacobian.out_structure()
        num_rows, num_coordinates = rows.size, _tree.size(jacobian.in_structure())
        memory = memory_budget() if self.memory is None else self.memory
        # n ≤ 60·√D, in integers.
        if num_rows**2 <= 3600 * num_coordinates:
            if dense_fits(num_rows, rows.dtype.itemsize, memory):
                # Said outright: by itself `DenseGram` would ask the device, and not `memory`.
                return DenseGram(is_distributed=False)(jacobian)
            share = memory * _mesh.num_devices()
            if dense_fits(num_rows, rows.dtype.itemsize, share) and distributes(num_rows):
                return DenseGram(is_distributed=True)(jacobian)
        return IterativeGram(preconditioner_rank=self.preconditioner_rank)(jacobian)
