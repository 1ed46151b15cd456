"""What is kept of a Jacobian's columns for one leaf, and the products of such blocks."""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow.linalg import _taps, _walk

# On NVIDIA GPUs float32 products default to TF32, three digits: too few for projections.
_HIGHEST = jax.lax.Precision.HIGHEST

# Explicit rows are formed in pieces of at most this many numbers where they are not kept.
PIECE = 2**20


def _einsum(spec: str, *arrays: Array) -> Array:
    return jnp.einsum(spec, *arrays, precision=_HIGHEST)


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

    def _matrix(self) -> Float[Array, "nk d"]:
        num_examples, num_outputs, *shape = self.array.shape
        return self.array.reshape(num_examples * num_outputs, math.prod(shape))

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        product = jnp.matmul(self._matrix(), leaf.reshape(-1), precision=_HIGHEST)
        return product.reshape(self.array.shape[:2])

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        product = jnp.matmul(weights.reshape(-1), self._matrix(), precision=_HIGHEST)
        return product.reshape(self.array.shape[2:])

    def rows(self) -> Float[Array, "n k ..."]:
        return self.array

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        right = RowBlock(other.rows())
        product = jnp.matmul(self._matrix(), right._matrix().T, precision=_HIGHEST)
        return product.reshape(self.array.shape[:2] + right.array.shape[:2])

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
    view: _walk.View = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def is_rank_one(self) -> bool:
        return self.factor.shape[2:4] == (1, 1)

    def swapped(self, view: _walk.View) -> "OuterBlock":
        """The same rows with F and C exchanged."""
        return OuterBlock(self.factor, self.delta, view, self.shape)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        weight = _walk.apply_view(self.view, leaf)
        outputs = _einsum("bfc,nktbc->nktbf", weight, self.factor)
        return _einsum("nktbf,nktbf->nk", *_with_common_outputs(self.delta, outputs))

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        # The sum over outputs comes first where the factor is common to them.
        delta = weights[:, :, None, None, None] * self.delta
        factor = self.factor
        if factor.shape[1] == 1:
            delta = jnp.sum(delta, axis=1, keepdims=True)
        delta, factor = _with_common_outputs(delta, factor)
        weight = _einsum("nktbf,nktbc->bfc", delta, factor)
        return _walk.pull_view(self.view, self.shape, weight)

    def rows(self) -> Float[Array, "n k ..."]:
        rows = _outer_rows(self.delta, self.factor)
        pull = lambda row: _walk.pull_view(self.view, self.shape, row)
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
            return jnp.sum(self.delta**2, axis=axes) * jnp.sum(self.factor**2, axis=axes)
        positions, free, contracted = (
            self.delta.shape[2],
            self.delta.shape[-1],
            self.factor.shape[-1],
        )
        if positions * (free + contracted) < free * contracted:
            pair = lambda x: _einsum("nktbf,nksbf->nkbts", x, x)
            return jnp.sum(pair(self.delta) * pair(self.factor), axis=(2, 3, 4))
        return _over_pieces(lambda rows: jnp.sum(rows**2, axis=(2, 3, 4)), self)


def _with_common_outputs(x: Array, y: Array) -> tuple[Array, Array]:
    size = max(x.shape[1], y.shape[1])
    broadcast = lambda z: jnp.broadcast_to(z, (z.shape[0], size, *z.shape[2:]))
    return broadcast(x), broadcast(y)


def _outer_rows(delta: Array, factor: Array) -> Float[Array, "n k B F C"]:
    if factor.shape[1] == 1:
        return _einsum("nktbf,ntbc->nkbfc", delta, factor[:, 0])
    if delta.shape[1] == 1:
        return _einsum("ntbf,nktbc->nkbfc", delta[:, 0], factor)
    return _einsum("nktbf,nktbc->nkbfc", delta, factor)


def _inner(x: Float[Array, "n k f"], y: Float[Array, "m l f"]) -> Float[Array, "n k m l"]:
    """All inner products, as one plain matrix product."""
    product = jnp.matmul(
        x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).T, precision=_HIGHEST
    )
    return product.reshape(x.shape[:2] + y.shape[:2])


Place = tuple[Any, Any, Any]
"""Position in the first block, position in the second, batch index of the weight."""


def _pair_gram(x: OuterBlock, y: OuterBlock, at: Place) -> Float[Array, "n k m l"]:
    """(δᵢ·δⱼ)(aᵢ·aⱼ) for all pairs of rows at one pair of positions."""
    t, s, b = at
    deltas = _inner(x.delta[:, :, t, b], y.delta[:, :, s, b])
    return deltas * _inner(x.factor[:, :, t, b], y.factor[:, :, s, b])


def _prefers_pairs(x: OuterBlock, y: OuterBlock) -> bool:
    """Whether all pairs of positions cost less than products of explicit rows."""
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
    view: _walk.View = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def _num_entries(self) -> int:
        return math.prod(self.shape) // self.delta.shape[-1]

    def as_outer(self) -> OuterBlock:
        """With explicit unit vectors, as one more use of a weight matrix."""
        units = jax.nn.one_hot(self.index, self._num_entries, dtype=self.delta.dtype)
        return OuterBlock(units[:, None, :, None], self.delta[:, :, :, None], self.view, self.shape)

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        table = _walk.apply_view(self.view, leaf)[0]
        return _einsum("nktd,ntd->nk", self.delta, table[self.index])

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        delta = _einsum("nk,nktd->ntd", weights, self.delta)
        table = jnp.zeros((self._num_entries, delta.shape[-1]), delta.dtype)
        return _walk.pull_view(self.view, self.shape, table.at[self.index].add(delta)[None])

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


def block_of(
    sites: tuple[_walk.Site, ...], group: _taps.Group, deltas: Any, records: Any, leaf: Array
) -> AbstractBlock:
    """One group of uses, from tap derivatives (n, k, ...) and records (n, ...)."""
    blocks = []
    for index in group.sites:
        read = lambda delta, record, site=sites[index]: _read(site, delta, record, leaf)
        parts = jax.vmap(read)(deltas[index], records[index])
        blocks.append(_BLOCKS[sites[index].kind](*parts, sites[index].view, leaf.shape))
    return _sum_of_blocks(blocks, group.swapped)


def _sum_of_blocks(blocks: list[Any], swapped: tuple[bool, ...]) -> AbstractBlock:
    """Uses of one form are further positions of one weight, or a sum of rows."""
    if len(blocks) == 1:
        return blocks[0]
    if isinstance(blocks[0], RowBlock):
        return RowBlock(functools.reduce(jnp.add, [block.array for block in blocks]))
    view, shape = blocks[0].view, blocks[0].shape
    if all(isinstance(block, LookUpBlock) for block in blocks) and not any(swapped):
        index = jnp.concatenate([block.index for block in blocks], axis=1)
        delta = jnp.concatenate([block.delta for block in blocks], axis=2)
        return LookUpBlock(index, delta, view, shape)
    blocks = [block.as_outer() if isinstance(block, LookUpBlock) else block for block in blocks]
    blocks = [b.swapped(view) if s else b for b, s in zip(blocks, swapped, strict=True)]
    delta = _concatenate_positions([block.delta for block in blocks])
    factor = _concatenate_positions([block.factor for block in blocks])
    return OuterBlock(delta, factor, view, shape)


def _concatenate_positions(arrays: list[Array]) -> Array:
    size = max(array.shape[1] for array in arrays)
    full = [jnp.broadcast_to(x, (x.shape[0], size, *x.shape[2:])) for x in arrays]
    return jnp.concatenate(full, axis=2)


def _read(site: _walk.Site, delta: Array, record: _walk.Record, leaf: Array) -> tuple[Array, ...]:
    """One example: what the block of a site keeps, from its tap derivative (k, ...)."""
    adds = site.kind in ("sum", "product")
    if site.steps:  # the steps of a scan are positions, or terms of a sum
        inner = site._replace(
            steps=site.steps[1:], tap=jax.ShapeDtypeStruct(site.tap.shape[1:], site.tap.dtype)
        )
        step = lambda d, r: _read(inner, d, r, leaf)
        if site.kind == "look-up":
            index, deltas = jax.vmap(step, in_axes=(1, 0), out_axes=(0, 1))(delta, record)
            return index.reshape(-1), _merge(deltas)
        parts = jax.vmap(step, in_axes=(1, 0), out_axes=1)(delta, record)
        return tuple(jnp.sum(part, 1) if adds else _merge(part) for part in parts)
    delta = delta.astype(leaf.dtype)
    if record.scale is not None:
        delta = delta * jnp.asarray(record.scale, leaf.dtype)
    if adds:
        return (_elementwise_rows(site, delta, record.factor, leaf),)
    delta = jax.vmap(lambda x: _walk.apply_view(site.dims[-1], x))(delta)
    if site.kind == "look-up":
        # An index of -1 says that no entry of the table was used.
        return jnp.maximum(record.factor, 0), jnp.where(record.factor[:, None] >= 0, delta, 0)
    return delta, _walk.apply_view(site.dims[0], record.factor.astype(leaf.dtype))[None]


def _merge(part: Float[Array, "k steps T ..."]) -> Float[Array, "k stepsT ..."]:
    return part.reshape(part.shape[0], -1, *part.shape[3:])


def _elementwise_rows(
    site: _walk.Site, delta: Float[Array, "k ..."], factor: Array | None, leaf: Array
) -> Float[Array, "k ..."]:
    """Rows of z = x ⊙ view(leaf), or of z = view(leaf) + …: summed over broadcast axes."""

    def use(x: Array) -> Array:
        seen = _walk.apply_view(site.view, x)
        seen = seen if factor is None else seen * factor.astype(leaf.dtype)
        return jnp.broadcast_to(seen, site.tap.shape)

    structure = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.vmap(lambda d: jax.linear_transpose(use, structure)(d)[0])(delta)


_BLOCKS: dict[str, Callable[..., AbstractBlock]] = {
    "dot": OuterBlock,
    "convolution": OuterBlock,
    "look-up": LookUpBlock,
    "sum": lambda rows, view, shape: RowBlock(rows),
    "product": lambda rows, view, shape: RowBlock(rows),
}


def label_of(sites: Any, blocks: tuple[Any, ...], groups: Any) -> str:
    names = []
    for block, group in zip(blocks, groups, strict=True):
        kinds = {sites[index].kind for index in group.sites}
        if isinstance(block, RowBlock):
            names.append("elementwise")
        elif isinstance(block, LookUpBlock):
            names.append("embedding")
        elif kinds == {"convolution"}:
            names.append("convolution")
        else:
            names.append("rank one" if block.is_rank_one else "positions")
    return " + ".join(dict.fromkeys(names)) or "unused"
