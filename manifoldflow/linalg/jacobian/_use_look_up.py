"""A look-up in a table, as of an embedding: its row is Σ_t e_{index t} ⊗ δ_t.

⟨rowᵢ, rowⱼ⟩ = Σ_{t, s} [indexᵢₜ = indexⱼₛ] δᵢₜ·δⱼₛ.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from manifoldflow.linalg.jacobian._block import (
    AbstractBlock,
    AbstractPositionBlock,
    column_norms_of_rows,
    einsum,
    inner_products,
    LeafView,
    merge_positions,
    over_positions,
    Place,
    rearranged,
)
from manifoldflow.linalg.jacobian._use import (
    AbstractMatrixUse,
    Equation,
    Recognised,
    register_use,
)
from manifoldflow.linalg.jacobian._use_matrix_product import OuterBlock
from manifoldflow.linalg.jacobian._use_rows import RowBlock
from manifoldflow.linalg.jacobian._views import ints, View


class LookUpBlock(AbstractPositionBlock):
    """Rows Σ_t e_{index t} ⊗ δ_t of a table (V, d), the index being the same for all outputs."""

    index: Int[Array, "n T"]
    delta: Float[Array, "n k T d"]
    leaf: LeafView = eqx.field(static=True)

    @property
    def _num_entries(self) -> int:
        return math.prod(self.leaf.shape) // self.delta.shape[-1]

    def as_outer(self) -> OuterBlock:
        """The block with explicit unit vectors, as one more use of a weight matrix."""
        units = jax.nn.one_hot(self.index, self._num_entries, dtype=self.delta.dtype)
        return OuterBlock(units[:, None, :, None], self.delta[:, :, :, None], self.leaf)

    def merged(self) -> "LookUpBlock":
        index = jnp.moveaxis(self.index, 0, 1)
        index = index.reshape(index.shape[0], -1)
        return LookUpBlock(index, merge_positions(self.delta), self.leaf)

    def joined(self, others: "Sequence[LookUpBlock]") -> "LookUpBlock":
        """One block with the positions of all."""
        index = jnp.concatenate([block.index for block in (self, *others)], axis=1)
        delta = jnp.concatenate([block.delta for block in (self, *others)], axis=2)
        return LookUpBlock(index, delta, self.leaf)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        table = self.leaf.apply(leaf)[0]
        return einsum("nktd,ntd->nk", self.delta, table[self.index])

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        delta = einsum("nk,nktd->ntd", weights, self.delta)
        table = jnp.zeros((self._num_entries, delta.shape[-1]), delta.dtype)
        # `add`, since the same row may be taken at several positions.
        return self.leaf.pull(table.at[self.index].add(delta)[None])

    def rows(self) -> Float[Array, "n k ..."]:
        return self.as_outer().rows()

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        if not isinstance(other, LookUpBlock) or other.leaf != self.leaf:
            return RowBlock(self.rows()).cross_gram(other)
        counts = self.index.shape[1], other.index.shape[1], 1
        # Long texts over short tables: products with unit vectors are cheaper than all pairs of
        # positions.
        if counts[0] * counts[1] > self._num_entries:
            flip = (("transpose", (0, 2, 1)),)
            pair = [block.as_outer().swapped(self.leaf.then(flip)) for block in (self, other)]
            return pair[0].cross_gram(pair[1])

        def term(at: Place) -> Array:
            same = self.index[:, at[0], None] == other.index[:, at[1]]
            return (
                inner_products(self.delta[:, :, at[0]], other.delta[:, :, at[1]])
                * same[:, None, :, None]
            )

        return term((0, 0, 0)) if counts == (1, 1, 1) else over_positions(term, counts)

    def column_norms(self) -> Array:
        return column_norms_of_rows(self)

    def norms(self) -> Float[Array, "n k"]:
        same = self.index[:, :, None] == self.index[:, None, :]
        return jnp.sum(einsum("nktd,nksd->nkts", self.delta, self.delta) * same[:, None], (2, 3))


@register_use("gather")
@register_use("dynamic_slice")
class LookUp(AbstractMatrixUse):
    """Rows of a table by integer index (`gather`, or `dynamic_slice` for a single row)."""

    output_steps: View = eqx.field(static=True)  # to (T, d)

    @classmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        table, *rest = equation.operands
        shape, z = table.shape, equation.output
        sizes = ints(equation.params["slice_sizes"])
        numbers = equation.params["dimension_numbers"] if equation.name == "gather" else None
        batched = numbers is not None and numbers.operand_batching_dims
        if index != 0 or not shape or sizes != (1, *shape[1:]) or batched:
            raise NotImplementedError("a look-up of parts of rows")
        offsets = tuple(range(len(shape))) if numbers is None else ints(numbers.offset_dims)
        # The same look-up in a table of row numbers says which rows were taken; where a shifted
        # table gives no other answer, the index was out of bounds and JAX filled in a constant.
        names = lax.broadcasted_iota(np.int32, shape, 0)
        taken, shifted = (equation.evaluate(x, *rest) for x in (names, names + 1))
        entries = jnp.where(shifted == taken, -1, taken)
        entries = entries[tuple(0 if axis in offsets else slice(None) for axis in range(z.ndim))]
        width = math.prod(shape[1:])
        positions = tuple(axis for axis in range(z.ndim) if axis not in offsets)
        steps = (("transpose", positions + offsets), ("reshape", (entries.size, width)))
        table_steps = (("reshape", (1, shape[0], width)),)
        return Recognised(cls(steps), entries.reshape(-1), table_steps)

    def block(
        self, delta: Float[Array, "n k ..."], factor: Int[Array, "n T"], leaf: LeafView
    ) -> LookUpBlock:
        def seen(delta: Array, index: Int[Array, " T"]) -> tuple[Array, Array]:
            # An index of -1 says that no entry of the table was used.
            return jnp.maximum(index, 0), jnp.where(index[:, None] >= 0, delta, 0)

        index, delta = jax.vmap(seen)(rearranged(self.output_steps, delta, 2), factor)
        return LookUpBlock(index, delta, leaf)
