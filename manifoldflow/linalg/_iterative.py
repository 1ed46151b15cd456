"""Gram solves by conjugate gradients, and the choice between them and dense ones."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._jit import jit_part
from manifoldflow._types import Scalar
from manifoldflow.linalg._gram import AbstractGram, AbstractGramSolve, DenseGram, row_scale
from manifoldflow.linalg._memory import memory_budget
from manifoldflow.linalg.jacobian import AbstractJacobian


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

    def __check_init__(self):
        checked_fields(self)
        checked_count("IterativeGram: max_steps", self.max_steps)
        _check_sketch(self.preconditioner_rank)
        if self.rtol is not None:
            checked_positive("IterativeGram: rtol", self.rtol)

    def __call__(self, jacobian: AbstractJacobian) -> "IterativeGramSolve":
        norms_squared = jax.lax.stop_gradient(jacobian.row_norms_squared())
        frozen = jax.lax.stop_gradient(jacobian)
        wants_sketch = self.inverse is None and self.preconditioner_rank > 0
        scale = row_scale(norms_squared)
        product = partial(_equilibrated_mv, frozen, scale)
        structure, rank = jacobian.out_structure(), self.preconditioner_rank
        sketch = nystroem_sketch(product, structure, rank) if wants_sketch else None
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
        weights = (self.values[-1] + shift) / (self.values + shift) - 1
        return vector + _precision.matmul(self.vectors, weights * inside)


def nystroem_sketch(
    product: Callable[[Array], Array], structure: jax.ShapeDtypeStruct, rank: int
) -> Sketch:
    """The randomised Nyström approximation of a matrix from `rank` products with it."""
    rank = min(rank, structure.shape[0])
    probes = jr.normal(jr.key(0), (structure.shape[0], rank), structure.dtype)
    probes, _ = jnp.linalg.qr(probes)
    images = jax.lax.map(product, probes.T).T
    shift = _precision.eps_of_dtype(structure) * jnp.linalg.norm(images)
    images = images + shift * probes
    core = _precision.matmul(probes.T, images)
    factor = jnp.linalg.cholesky((core + core.T) / 2)
    root = jax.scipy.linalg.solve_triangular(factor, images.T, lower=True).T
    vectors, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    return Sketch(vectors, jnp.maximum(singular**2 - shift, 0))


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
        eps, scale = _precision.eps_of_dtype(vector), self.row_scale
        shift = self.damping + 5 * eps * len(vector)

        def mv(w: Float[Array, " n"]) -> Float[Array, " n"]:
            return _equilibrated_mv(self.jacobian, scale, w) + shift * w

        structure = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
        operator = lx.FunctionLinearOperator(mv, structure, lx.positive_semidefinite_tag)
        rtol = eps**0.5 if self.rtol is None else self.rtol
        solver = lx.CG(rtol=rtol, atol=0.0, max_steps=self.max_steps)
        options = {}
        if self.sketch is not None or self.inverse is not None:
            options["preconditioner"] = lx.FunctionLinearOperator(
                lambda w: self._precondition(w, scale, shift),
                structure,
                lx.positive_semidefinite_tag,
            )
        found = lx.linear_solve(operator, scale * vector, solver, options=options, throw=False)
        return scale * found.value

    def _precondition(self, vector: Array, scale: Array, shift: Scalar) -> Array:
        if self.inverse is not None:
            norms = 1 / jnp.where(scale > 0, scale, 1)
            return norms * _precision.matmul(self.inverse, norms * vector)
        assert self.sketch is not None
        return self.sketch.precondition(vector, shift)

    def eigenvalues(self) -> Float[Array, " n"]:
        """The eigenvalues of the n×n matrix, built for the purpose: for tests and diagnosis."""
        return jnp.linalg.eigvalsh(self.jacobian.gram())


class AutoGram(AbstractGram):
    """The choice of `DenseGram` where n² numbers fit and factorising pays, else `IterativeGram`.

    Dense if the matrix, its factor and one temporary, 3n² numbers, take at most `memory` and n ≤
    60·√D: the n³/3 operations of a factorisation then are no more than those of 300 products with J
    and Jᵀ at 4nD each. Iterative beyond, with a Nyström sketch.

    Args:
        memory: bytes; by default an eighth of the device's memory, or 2 GiB where the device does
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
        fits = 3 * num_rows**2 * rows.dtype.itemsize <= memory
        if fits and num_rows**2 <= 3600 * num_coordinates:
            return DenseGram()(jacobian)
        return IterativeGram(preconditioner_rank=self.preconditioner_rank)(jacobian)
