"""What is kept of a Jacobian's columns for one leaf, and the products of such blocks."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow.linalg import _views

# On NVIDIA GPUs float32 products default to TF32, three digits: too few for projections.
_HIGHEST = jax.lax.Precision.HIGHEST

# Explicit rows are formed in pieces of at most this many numbers where they are not kept.
PIECE = 2**20


def _einsum(spec: str, *arrays: Array) -> Array:
    """`jax.numpy.einsum` in which axes of size one are broadcast, and cost no operations."""
    inputs, output = spec.split("->")
    kept, squeezed, sizes = [], [], {}
    for letters, array in zip(inputs.split(","), arrays, strict=True):
        named = dict(zip(letters, array.shape, strict=True))
        long = {letter: size for letter, size in named.items() if size != 1}
        sizes |= long
        kept.append("".join(long))
        squeezed.append(array.reshape(tuple(long.values())))
    found = "".join(letter for letter in output if letter in sizes)
    product = jnp.einsum(",".join(kept) + "->" + found, *squeezed, precision=_HIGHEST)
    return product.reshape([sizes.get(letter, 1) for letter in output])


def _times(x: Array, y: Array) -> Array:
    """x·y, broadcast in one operation: `jax.numpy` takes three."""
    shape = jnp.broadcast_shapes(x.shape, y.shape)

    def full(z: Array) -> Array:
        axes = [axis for axis, size in enumerate(z.shape) if size == shape[axis]]
        return jax.lax.broadcast_in_dim(z.reshape([shape[axis] for axis in axes]), shape, axes)

    return (x if x.shape == shape else full(x)) * (y if y.shape == shape else full(y))


class AbstractBlock(eqx.Module):
    """The columns of J that belong to one leaf: k rows for each of n examples."""

    @abc.abstractmethod
    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        """J v for a vector that lives on this leaf."""

    @abc.abstractmethod
    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        """Jᵀ w, in the shape of the leaf."""

    @abc.abstractmethod
    def rows(self) -> Float[Array, "n k ..."]:
        """The rows themselves, n·k times the size of the leaf."""

    @abc.abstractmethod
    def cross_gram(self, other: "AbstractBlock") -> Float[Array, "n k m l"]:
        """Inner products with the rows of another block of the same leaf."""

    @abc.abstractmethod
    def norms(self) -> Float[Array, "n k"]:
        """Squared norms of the rows."""


class RowBlock(AbstractBlock):
    """Explicit rows."""

    array: Float[Array, "n k ..."]

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        return jnp.tensordot(self.array, leaf, axes=leaf.ndim, precision=_HIGHEST)

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        return jnp.tensordot(weights, self.array, axes=2, precision=_HIGHEST)

    def rows(self) -> Float[Array, "n k ..."]:
        return self.array

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        axes = tuple(range(2, self.array.ndim))
        return jnp.tensordot(self.array, other.rows(), axes=(axes, axes), precision=_HIGHEST)

    def norms(self) -> Float[Array, "n k"]:
        return jnp.sum(self.array**2, axis=tuple(range(2, self.array.ndim)))


class OuterBlock(AbstractBlock):
    """Rows Σ_t δ_t ⊗ a_t of a weight that is applied at T positions.

    The view brings the leaf to (B, F, C): B independent weights, each from C to F numbers.
    A factor that is the same for all outputs has a k axis of size one (the usual case for
    a, and the case of δ where a table is looked up).
    """

    delta: Float[Array, "n _ T B F"]
    factor: Float[Array, "n _ T B C"]
    view: _views.View = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

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

    def swapped(self, view: _views.View) -> "OuterBlock":
        """The same rows with F and C exchanged."""
        return OuterBlock(self.factor, self.delta, view, self.shape)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        weight = _views.apply_view(self.view, leaf)
        return _einsum("bfc,nktbc,nktbf->nk", weight, self.factor, self.delta)

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        weight = _einsum("nk,nktbf,nktbc->bfc", weights, self.delta, self.factor)
        return _views.pull_view(self.view, self.shape, weight)

    def rows(self) -> Float[Array, "n k ..."]:
        rows = _outer_rows(self.delta, self.factor)
        pull = lambda row: _views.pull_view(self.view, self.shape, row)
        return jax.vmap(jax.vmap(pull))(rows)

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        if not isinstance(other, OuterBlock) or other.view != self.view:
            return RowBlock(self.rows()).cross_gram(other)
        if self.is_rank_one and other.is_rank_one:
            return _pair_gram(self, other, (0, 0, 0))
        if _prefers_pairs(self, other):
            counts = self.delta.shape[2], other.delta.shape[2], self.delta.shape[3]
            return _over_positions(lambda at: _pair_gram(self, other, at), counts)
        return _over_pieces(lambda x, y: RowBlock(x).cross_gram(RowBlock(y)), self, other)

    def norms(self) -> Float[Array, "n k"]:
        if self.is_rank_one:
            axes = (2, 3, 4)
            return _times(jnp.sum(self.delta**2, axis=axes), jnp.sum(self.factor**2, axis=axes))
        pair = lambda x: _einsum("nktbf,nksbf->nkbts", x, x)
        return jnp.sum(pair(self.delta) * pair(self.factor), axis=(2, 3, 4))


def _outer_rows(delta: Array, factor: Array) -> Float[Array, "n k B F C"]:
    return _einsum("nktbf,nktbc->nkbfc", delta, factor)


def _inner(x: Float[Array, "n k f"], y: Float[Array, "m l f"]) -> Float[Array, "n k m l"]:
    return _einsum("nkf,mlf->nkml", x, y)


Place = tuple[Any, Any, Any]
"""Position in the first block, position in the second, batch index of the weight."""


def _pair_gram(x: OuterBlock, y: OuterBlock, at: Place) -> Float[Array, "n k m l"]:
    """(δᵢ·δⱼ)(aᵢ·aⱼ) for all pairs of rows at one pair of positions."""
    t, s, b = at
    deltas = _inner(x.delta[:, :, t, b], y.delta[:, :, s, b])
    return _times(deltas, _inner(x.factor[:, :, t, b], y.factor[:, :, s, b]))


def _prefers_pairs(x: OuterBlock, y: OuterBlock) -> bool:
    """Whether all pairs of positions cost less than products of explicit rows.

    Where many outputs share a, (Σ_s (a_t·a_s) δ_s)·δ_t takes fewer products than either, but
    as many small ones; on CPUs it was the slower.
    """
    num_pairs = x.delta.shape[2] * y.delta.shape[2]
    outputs = max(x.delta.shape[1], x.factor.shape[1]) * max(y.delta.shape[1], y.factor.shape[1])
    free, contracted = x.delta.shape[-1], x.factor.shape[-1]
    deltas = x.delta.shape[1] * y.delta.shape[1] * free
    factors = x.factor.shape[1] * y.factor.shape[1] * contracted
    return num_pairs * (deltas + factors) < outputs * free * contracted


def _accumulate(fn: Callable[[Any], Array], xs: Any) -> Array:
    """Σ fn(x), with the memory of one term in reverse mode too."""
    structure = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))
    step = jax.checkpoint(lambda total, x: (total + fn(x), None))
    return jax.lax.scan(step, jnp.zeros(structure.shape, structure.dtype), xs)[0]


def _over_positions(fn: Callable[[Place], Array], counts: tuple[int, int, int]) -> Array:
    grid = jnp.meshgrid(*map(jnp.arange, counts), indexing="ij")
    return _accumulate(fn, tuple(axis.reshape(-1) for axis in grid))


def _over_pieces(fn: Callable[..., Array], *blocks: OuterBlock) -> Array:
    """Σ fn(rows, ...) over pieces of the F axis, so that all rows never exist at once."""
    free = blocks[0].delta.shape[-1]
    numbers = [math.prod(_outer_shape(block)) // free for block in blocks]
    divisors = [size for size in range(1, free + 1) if free % size == 0]
    size = max([d for d in divisors if d * max(numbers) <= PIECE], default=1)

    def term(start: Any) -> Array:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
        return fn(*(_outer_rows(cut(block.delta), block.factor) for block in blocks))

    return term(0) if size == free else _accumulate(term, jnp.arange(0, free, size))


def _outer_shape(block: OuterBlock) -> tuple[int, ...]:
    outputs = max(block.delta.shape[1], block.factor.shape[1])
    return (block.delta.shape[0], outputs, *block.delta.shape[3:], block.factor.shape[-1])


class LookUpBlock(AbstractBlock):
    """Rows Σ_t e_{index t} ⊗ δ_t of a table (V, d), the index being the same for all outputs."""

    index: Int[Array, "n T"]
    delta: Float[Array, "n k T d"]
    view: _views.View = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def _num_entries(self) -> int:
        return math.prod(self.shape) // self.delta.shape[-1]

    def as_outer(self) -> OuterBlock:
        """With explicit unit vectors, as one more use of a weight matrix."""
        units = jax.nn.one_hot(self.index, self._num_entries, dtype=self.delta.dtype)
        return OuterBlock(units[:, None, :, None], self.delta[:, :, :, None], self.view, self.shape)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        table = _views.apply_view(self.view, leaf)[0]
        return _einsum("nktd,ntd->nk", self.delta, table[self.index])

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        delta = _einsum("nk,nktd->ntd", weights, self.delta)
        table = jnp.zeros((self._num_entries, delta.shape[-1]), delta.dtype)
        return _views.pull_view(self.view, self.shape, table.at[self.index].add(delta)[None])

    def rows(self) -> Float[Array, "n k ..."]:
        return self.as_outer().rows()

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        if not isinstance(other, LookUpBlock) or other.view != self.view:
            return RowBlock(self.rows()).cross_gram(other)
        counts = self.index.shape[1], other.index.shape[1], 1
        if counts[0] * counts[1] > self._num_entries:
            flip = (("transpose", (0, 2, 1)),)
            pair = [block.as_outer().swapped(self.view + flip) for block in (self, other)]
            return pair[0].cross_gram(pair[1])

        def term(at: Place) -> Array:
            same = self.index[:, at[0], None] == other.index[:, at[1]]
            return (
                _inner(self.delta[:, :, at[0]], other.delta[:, :, at[1]]) * same[:, None, :, None]
            )

        return term((0, 0, 0)) if counts == (1, 1, 1) else _over_positions(term, counts)

    def norms(self) -> Float[Array, "n k"]:
        same = self.index[:, :, None] == self.index[:, None, :]
        return jnp.sum(_einsum("nktd,nksd->nkts", self.delta, self.delta) * same[:, None], (2, 3))
