"""Blocks from the derivatives of taps: several uses of one leaf in one form make one block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow.linalg.jacobian._block import (
    AbstractBlock,
    AbstractPositionBlock,
    LeafView,
)
from manifoldflow.linalg.jacobian._interpreter import Record, Site
from manifoldflow.linalg.jacobian._taps import Group, Uses
from manifoldflow.linalg.jacobian._use import AbstractElementwise, AbstractMatrixUse
from manifoldflow.linalg.jacobian._use_convolution import Convolution
from manifoldflow.linalg.jacobian._use_look_up import LookUpBlock
from manifoldflow.linalg.jacobian._use_matrix_product import MatrixProduct, OuterBlock
from manifoldflow.linalg.jacobian._use_pairs import PairBlock
from manifoldflow.linalg.jacobian._use_rows import RowBlock
from manifoldflow.linalg.jacobian._use_shift import Shift


def block_of(
    sites: tuple[Site, ...], group: Group, deltas: Any, records: Any, leaf: Array
) -> AbstractBlock:
    """One group of uses, from tap derivatives (n, k, ...) and records (n, ...)."""
    blocks = []
    for index in group.sites:
        blocks.append(_read(sites[index], deltas[index], records[index], leaf))
    block = _sum_of_blocks(blocks, group.swapped)
    # Only after the sum: which form is the smaller one depends on the number of all positions.
    return block.compact() if isinstance(block, OuterBlock | PairBlock) else block


def _read(site: Site, delta: Array, record: Record, leaf: Array) -> AbstractBlock:
    """The content of a site's block, from its tap derivatives (n, k, …)."""

    def one(delta: Array, record: Record) -> AbstractBlock:
        # Layers may compute in bfloat16: rows are kept in the precision of the leaf.
        delta = delta.astype(leaf.dtype)
        if record.scale is not None:
            delta = jax.vmap(jnp.multiply)(delta, jnp.asarray(record.scale, leaf.dtype))
        return site.use.block(delta, record.factor, LeafView(site.view, leaf.shape))

    if not site.steps:
        return one(delta, record)
    # The steps of all scans around are positions, or terms of a sum.
    depth, shape = len(site.steps), delta.shape
    delta = delta.reshape(*shape[:2], -1, *shape[2 + depth :])
    record = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[1 + depth :]), record)
    block = jax.vmap(one, in_axes=(2, 1))(delta, record)
    if isinstance(block, AbstractPositionBlock):
        return block.merged()
    # These rows have the size of the leaf. Kept apart, they would cost that for every step.
    return RowBlock(jnp.sum(jax.vmap(lambda block: block.rows())(block), 0))


def _sum_of_blocks(blocks: list[Any], swapped: tuple[bool, ...]) -> AbstractBlock:
    """Uses of one form are further positions of one weight, or a sum of rows."""
    if len(blocks) == 1:
        return blocks[0]
    if any(not isinstance(block, AbstractPositionBlock) for block in blocks):
        rows = [block.rows() for block in blocks]
        return RowBlock(functools.reduce(jnp.add, rows))
    if isinstance(blocks[0], PairBlock):
        return blocks[0].joined(blocks[1:])
    if all(isinstance(block, LookUpBlock) for block in blocks) and not any(swapped):
        return blocks[0].joined(blocks[1:])
    leaf = blocks[0].leaf
    blocks = [block.as_outer() if isinstance(block, LookUpBlock) else block for block in blocks]
    blocks = [b.swapped(leaf) if s else b for b, s in zip(blocks, swapped, strict=True)]
    return blocks[0].joined(blocks[1:])


def label_of(sites: Any, blocks: tuple[Any, ...], groups: Any) -> str:
    """The treatment of a leaf with these blocks, in words."""
    names = []
    for block, group in zip(blocks, groups, strict=True):
        kinds = {type(sites[index].use) for index in group.sites}
        summed = ", summed" if isinstance(block, RowBlock) else ""
        if all(issubclass(kind, AbstractElementwise) for kind in kinds):
            names.append("elementwise")
        elif isinstance(block, LookUpBlock):
            names.append("embedding")
        elif kinds == {Convolution}:
            names.append("convolution" + summed)
        elif all(issubclass(kind, AbstractMatrixUse) for kind in kinds):
            rank_one = isinstance(block, OuterBlock) and block.is_rank_one
            names.append("rank one" if rank_one else "positions" + summed)
        else:
            (kind,) = kinds
            names.append(kind.__name__ + summed)
    return " + ".join(dict.fromkeys(names)) or "unused"


def twins_of(uses: Uses, deltas: Any, records: Any, blocks: Any) -> tuple[tuple[int, int], ...]:
    """The biases whose rows are the δ of a weight, as pairs of leaves: (bias, weight).

    In z = W·a + b the row of W is δ ⊗ a and the row of b is δ, the same numbers: the two are twins.
    What is sent or multiplied for one of them serves both.
    """

    def leaf_by_delta(use: type, kind: type) -> dict[tuple[int, Any], int]:
        """The leaves with one use of this type, by the array that is their δ."""
        found = {}
        for leaf, groups in uses.groups.items():
            # Several uses are a sum, and no longer one δ.
            index = groups[0].sites[0] if [len(group.sites) for group in groups] == [1] else None
            if index is None or leaf in uses.opaque:
                continue
            site, (block,) = uses.sites[index], blocks[leaf]
            # Steps of a scan, a scale (z = y − b) and positions change δ on the way to the block.
            is_plain = not site.steps and records[index].scale is None and deltas[index].ndim == 3
            if is_plain and type(site.use) is use and isinstance(block, kind):
                is_outer = isinstance(block, OuterBlock)
                numbers = block.delta if is_outer else block.rows()
                # A bias that is sliced or repeated has other rows than δ.
                if numbers.size == deltas[index].size and (is_outer or not site.view):
                    # Whether two traced arrays have equal numbers cannot be asked, but whether they
                    # are one object can: an addition hands its cotangent on to both terms as it
                    # is. A pair that is missed (a JAX that copies) costs time only. No array is
                    # freed meanwhile, so that no number of an object is used twice. The dtype is in
                    # the key because a leaf may round δ to its own.
                    found[id(deltas[index]), numbers.dtype] = leaf
        return found

    weights = leaf_by_delta(MatrixProduct, OuterBlock)
    biases = leaf_by_delta(Shift, RowBlock)
    return tuple((bias, weights[delta]) for delta, bias in biases.items() if delta in weights)
