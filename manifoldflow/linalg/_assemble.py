"""From the derivatives of taps to the blocks of a Jacobian."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow.linalg import _taps, _views, _walk
from manifoldflow.linalg._blocks import AbstractBlock, LookUpBlock, OuterBlock, RowBlock


def block_of(
    sites: tuple[_walk.Site, ...], group: _taps.Group, deltas: Any, records: Any, leaf: Array
) -> AbstractBlock:
    """One group of uses, from tap derivatives (n, k, ...) and records (n, ...)."""
    blocks = []
    for index in group.sites:
        read = lambda delta, record, site=sites[index]: _read(site, delta, record, leaf)
        parts = jax.vmap(read)(deltas[index], records[index])
        blocks.append(_BLOCKS[sites[index].kind](*parts, sites[index].view, leaf.shape))
    block = _sum_of_blocks(blocks, group.swapped)
    return block.compact() if isinstance(block, OuterBlock) else block


def _sum_of_blocks(blocks: list[Any], swapped: tuple[bool, ...]) -> AbstractBlock:
    """Uses of one form are further positions of one weight, or a sum of rows."""
    if len(blocks) == 1:
        return blocks[0]
    if any(isinstance(block, RowBlock) for block in blocks):
        blocks = [RowBlock(block.rows()) for block in blocks]
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
        adds = adds or len(parts) == 1
        return tuple(jnp.sum(part, 1) if adds else _merge(part) for part in parts)
    delta = delta.astype(leaf.dtype)
    if record.scale is not None:
        delta = delta * jnp.asarray(record.scale, leaf.dtype)
    if adds:
        return (_elementwise_rows(site, delta, record.factor, leaf),)
    delta = jax.vmap(lambda x: _views.apply_view(site.dims[-1], x))(delta)
    if site.kind == "look-up":
        # An index of -1 says that no entry of the table was used.
        return jnp.maximum(record.factor, 0), jnp.where(record.factor[:, None] >= 0, delta, 0)
    factor = record.factor.astype(leaf.dtype)
    if site.kind == "convolution":
        return _kernel_parts(site, delta, factor, leaf)
    return delta, _views.apply_view(site.dims[0], factor)[None]


def _kernel_parts(
    site: _walk.Site, delta: Float[Array, "k T G F"], slabs: Array, leaf: Array
) -> tuple[Array, ...]:
    """The rows of a kernel, or δ and the patches where these are fewer numbers."""
    kernel, (num_outputs, num_places, *_) = site.dims[0], delta.shape
    num_factors = delta.size + num_places * kernel.size * slabs.shape[-1]
    if num_outputs * leaf.size > num_factors:
        return delta, kernel.patches(slabs)[None]
    pull = lambda row: _views.pull_view(site.view, leaf.shape, row)
    return (jax.vmap(pull)(kernel.rows(slabs, delta)),)


def _merge(part: Float[Array, "k steps T ..."]) -> Float[Array, "k stepsT ..."]:
    return part.reshape(part.shape[0], -1, *part.shape[3:])


def _elementwise_rows(
    site: _walk.Site, delta: Float[Array, "k ..."], factor: Array | None, leaf: Array
) -> Float[Array, "k ..."]:
    """Rows of z = x ⊙ view(leaf), or of z = view(leaf) + …: summed over broadcast axes."""

    def use(x: Array) -> Array:
        seen = _views.apply_view(site.view, x)
        seen = seen if factor is None else seen * factor.astype(leaf.dtype)
        return jnp.broadcast_to(seen, site.tap.shape)

    structure = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.vmap(lambda d: jax.linear_transpose(use, structure)(d)[0])(delta)


_BLOCKS: dict[str, Callable[..., AbstractBlock]] = {
    "dot": OuterBlock,
    "convolution": lambda *parts: RowBlock(parts[0]) if len(parts) == 3 else OuterBlock(*parts),
    "look-up": LookUpBlock,
    "sum": lambda rows, view, shape: RowBlock(rows),
    "product": lambda rows, view, shape: RowBlock(rows),
}


def label_of(sites: Any, blocks: tuple[Any, ...], groups: Any) -> str:
    names = []
    for block, group in zip(blocks, groups, strict=True):
        kinds = {sites[index].kind for index in group.sites}
        summed = ", summed" if isinstance(block, RowBlock) else ""
        if kinds <= {"sum", "product"}:
            names.append("elementwise")
        elif isinstance(block, LookUpBlock):
            names.append("embedding")
        elif kinds == {"convolution"}:
            names.append("convolution" + summed)
        else:
            rank_one = isinstance(block, OuterBlock) and block.is_rank_one
            names.append("rank one" if rank_one else "positions" + summed)
    return " + ".join(dict.fromkeys(names)) or "unused"
