"""A matrix product: z = W·a. Its row is δ ⊗ a, of which δ and a are kept.

⟨δᵢ ⊗ aᵢ, δⱼ ⊗ aⱼ⟩ = (δᵢ·δⱼ)(aᵢ·aⱼ),     ‖δᵢ ⊗ aᵢ‖² = ‖δᵢ‖²‖aᵢ‖².
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow.linalg.jacobian._block import (
    AbstractBlock,
    AbstractPositionBlock,
    accumulate,
    column_norms_of_rows,
    einsum,
    inner_products,
    LeafView,
    merge_positions,
    over_positions,
    Place,
    rearranged,
    times,
)
from manifoldflow.linalg.jacobian._use import (
    AbstractMatrixUse,
    Equation,
    Recognised,
    register_use,
)
from manifoldflow.linalg.jacobian._use_rows import RowBlock
from manifoldflow.linalg.jacobian._views import ints, is_selection, View

# Explicit rows are formed in pieces of at most this many numbers where they are not kept.
PIECE = 2**20


class OuterBlock(AbstractPositionBlock):
    """Rows Σ_t δ_t ⊗ a_t of a weight that is applied at T positions.

    The view brings the leaf to (B, F, C): B independent weights, each from C to F numbers.
    A factor that is the same for all outputs has a k axis of size one (the usual case for
    a, and the case of δ where a table is looked up).
    """

    delta: Float[Array, "n _ T B F"]
    factor: Float[Array, "n _ T B C"]
    leaf: LeafView = eqx.field(static=True)

    @property
    def is_rank_one(self) -> bool:
        return self.factor.shape[2:4] == (1, 1)

    def compact(self) -> AbstractBlock:
        """The rows themselves where they are fewer numbers than their factors.

        Their squares and products then are the cheaper ones as well: with one output F·C ≤
        T·(F + C) makes T·F·C, to form them, no more than T²·(F + C), for pairs of positions.
        """
        num_rows, num_factors = math.prod(_outer_shape(self)), self.delta.size + self.factor.size
        return self if self.is_rank_one or num_rows > num_factors else RowBlock(self.rows())

    def swapped(self, leaf: LeafView) -> "OuterBlock":
        """The same rows with F and C exchanged."""
        return OuterBlock(self.factor, self.delta, leaf)

    def merged(self) -> "OuterBlock":
        return OuterBlock(merge_positions(self.delta), merge_positions(self.factor), self.leaf)

    def joined(self, others: "Sequence[OuterBlock]") -> "OuterBlock":
        """One block with the positions of all."""
        delta = _concatenate_positions([block.delta for block in (self, *others)])
        factor = _concatenate_positions([block.factor for block in (self, *others)])
        return OuterBlock(delta, factor, self.leaf)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        weight = self.leaf.apply(leaf)
        return einsum("bfc,nktbc,nktbf->nk", weight, self.factor, self.delta)

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        weight = einsum("nk,nktbf,nktbc->bfc", weights, self.delta, self.factor)
        return self.leaf.pull(weight)

    def rows(self) -> Float[Array, "n k ..."]:
        rows = _outer_rows(self.delta, self.factor)
        pull = lambda row: self.leaf.pull(row)
        return jax.vmap(jax.vmap(pull))(rows)

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        if not isinstance(other, OuterBlock) or other.leaf != self.leaf:
            return RowBlock(self.rows()).cross_gram(other)
        if self.is_rank_one and other.is_rank_one:
            return _pair_gram(self, other, (0, 0, 0))
        if _prefers_pairs(self, other):
            counts = self.delta.shape[2], other.delta.shape[2], self.delta.shape[3]
            return over_positions(lambda at: _pair_gram(self, other, at), counts)
        return _over_pieces(lambda x, y: RowBlock(x).cross_gram(RowBlock(y)), self, other)

    def norms(self) -> Float[Array, "n k"]:
        if self.is_rank_one:
            axes = (2, 3, 4)
            return times(jnp.sum(self.delta**2, axis=axes), jnp.sum(self.factor**2, axis=axes))
        # ‖Σ_t δ_t ⊗ a_t‖² = Σ_ts (δ_t·δ_s)(a_t·a_s): T² numbers, where a row has F·C.
        pair = lambda x: einsum("nktbf,nksbf->nkbts", x, x)
        return jnp.sum(pair(self.delta) * pair(self.factor), axis=(2, 3, 4))

    def column_norms(self) -> Array:
        # Entries are added before they are squared: over positions, and where a view repeats some.
        if self.factor.shape[2] > 1 or not is_selection(self.leaf.steps):
            return column_norms_of_rows(self)
        return self.leaf.pull(einsum("nktbf,nktbc->bfc", self.delta**2, self.factor**2))


def _concatenate_positions(arrays: list[Array]) -> Array:
    size = max(array.shape[1] for array in arrays)
    # A factor that is the same for all outputs has a k axis of one; beside others it is repeated.
    full = [jnp.broadcast_to(x, (x.shape[0], size, *x.shape[2:])) for x in arrays]
    return jnp.concatenate(full, axis=2)


def _outer_rows(delta: Array, factor: Array) -> Float[Array, "n k B F C"]:
    return einsum("nktbf,nktbc->nkbfc", delta, factor)


def _pair_gram(x: OuterBlock, y: OuterBlock, at: Place) -> Float[Array, "n k m l"]:
    """(δᵢ·δⱼ)(aᵢ·aⱼ) for all pairs of rows at one pair of positions."""
    t, s, b = at
    deltas = inner_products(x.delta[:, :, t, b], y.delta[:, :, s, b])
    return times(deltas, inner_products(x.factor[:, :, t, b], y.factor[:, :, s, b]))


def _prefers_pairs(x: OuterBlock, y: OuterBlock) -> bool:
    """True where all pairs of positions cost less than products of explicit rows.

    Where many outputs share a, (Σ_s (a_t·a_s) δ_s)·δ_t takes fewer products than either, but as
    many small ones; on CPUs it was the slower.
    """
    num_pairs = x.delta.shape[2] * y.delta.shape[2]
    outputs = max(x.delta.shape[1], x.factor.shape[1]) * max(y.delta.shape[1], y.factor.shape[1])
    free, contracted = x.delta.shape[-1], x.factor.shape[-1]
    deltas = x.delta.shape[1] * y.delta.shape[1] * free
    factors = x.factor.shape[1] * y.factor.shape[1] * contracted
    return num_pairs * (deltas + factors) < outputs * free * contracted


def _over_pieces(fn: Callable[..., Array], *blocks: OuterBlock) -> Array:
    """Σ fn(rows, ...) over pieces of the F axis, so that all rows never exist at once."""
    free = blocks[0].delta.shape[-1]
    numbers = [math.prod(_outer_shape(block)) // free for block in blocks]
    # Equal pieces, so that one program serves for all of them.
    divisors = [size for size in range(1, free + 1) if free % size == 0]
    size = max([d for d in divisors if d * max(numbers) <= PIECE], default=1)

    def term(start: Any) -> Array:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
        return fn(*(_outer_rows(cut(block.delta), block.factor) for block in blocks))

    return term(0) if size == free else accumulate(term, jnp.arange(0, free, size))


def _outer_shape(block: OuterBlock) -> tuple[int, ...]:
    outputs = max(block.delta.shape[1], block.factor.shape[1])
    return (block.delta.shape[0], outputs, *block.delta.shape[3:], block.factor.shape[-1])


@register_use("dot_general")
class MatrixProduct(AbstractMatrixUse):
    """z = W·a, with W on either side and any axes contracted."""

    factor_steps: View = eqx.field(static=True)  # to (T, B, C)
    output_steps: View = eqx.field(static=True)  # to (T, B, F)

    @classmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        weight, other = equation.operands[index], equation.operands[1 - index]
        if all(equation.is_leaf) and weight.size <= equation.output.size:
            # Of a product of two weights the taps are as large as itself, rows may be smaller.
            raise NotImplementedError("a product of two weights")
        numbers = equation.params["dimension_numbers"]
        steps, *rest = _dot_dims(numbers, index, weight, other)
        return Recognised(cls(*rest), other, steps)

    def block(self, delta: Float[Array, "n k ..."], factor: Array, leaf: LeafView) -> OuterBlock:
        factor = rearranged(self.factor_steps, factor.astype(delta.dtype), 1)
        return OuterBlock(rearranged(self.output_steps, delta, 2), factor[:, None], leaf)


def _dot_dims(numbers: Any, side: int, weight: Array, other: Array) -> tuple[Any, ...]:
    """The axes that bring weight, factor and output to (B, F, C), (T, B, C) and (T, B, F).

    B are batch axes, C is contracted, F is free in the weight, T are the positions at which the
    weight is applied.
    """
    contracting, batch = numbers
    w_contract, x_contract = ints(contracting[side]), ints(contracting[1 - side])
    w_batch, x_batch = ints(batch[side]), ints(batch[1 - side])
    w_free = _others(weight.ndim, w_contract + w_batch)
    x_free = _others(other.ndim, x_contract + x_batch)
    num_batch, num_w, num_x = len(w_batch), len(w_free), len(x_free)
    free = ints(np.arange(num_batch, num_batch + num_w + num_x))
    z_free, z_positions = (
        (free[:num_w], free[num_w:]) if side == 0 else (free[num_x:], free[:num_x])
    )
    sizes = {
        "B": int(np.prod([weight.shape[axis] for axis in w_batch], dtype=int)),
        "F": int(np.prod([weight.shape[axis] for axis in w_free], dtype=int)),
        "C": int(np.prod([weight.shape[axis] for axis in w_contract], dtype=int)),
        "T": int(np.prod([other.shape[axis] for axis in x_free], dtype=int)),
    }
    shapes = [tuple(sizes[name] for name in names) for names in ("BFC", "TBC", "TBF")]
    perms = [
        w_batch + w_free + w_contract,
        x_free + x_batch + x_contract,
        z_positions + tuple(range(num_batch)) + z_free,
    ]
    return tuple(
        (("transpose", perm), ("reshape", shape)) for perm, shape in zip(perms, shapes, strict=True)
    )


def _others(ndim: int, used: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in used)
