"""Products of the rows of two Jacobians: the sum of those of all layers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _mesh
from manifoldflow.linalg.jacobian._block import AbstractBlock

# Layers of one shape are multiplied in a loop on TPUs: from so many rows on, and up to so many
# bytes of the factors of one, since the loop needs a copy of them.
_LARGE, _STACKED = 512, 2**26

Layer = list[tuple[AbstractBlock, AbstractBlock]]
"""The blocks of a weight and its bias, each with its partner in the other Jacobian."""


def products(
    total: Float[Array, "rows other_rows"], layers: list[Layer]
) -> Float[Array, "rows other_rows"]:
    """The total, with the products of all layers added."""
    for alike in _alike([layer for layer in layers if layer]):
        if len(alike) > 1 and len(total) >= _LARGE:
            # XLA for TPUs takes a second to compile each of these products. For CPUs it takes
            # none, and there the loop runs half as long again.
            total = jax.lax.platform_dependent(total, alike, tpu=_in_loop, default=_in_turn)
        else:
            total = _in_turn(total, alike)
    return total


def _in_turn(total: Array, layers: list[Layer]) -> Array:
    for layer in layers:
        # Without an order XLA may gather all layers first, and a device then holds the whole model.
        total = _added(total, _mesh.in_turn(total, layer))
    return total


def _in_loop(total: Array, layers: list[Layer]) -> Array:
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    return jax.lax.scan(lambda sum, layer: (_added(sum, layer), None), total, stacked)[0]


def _added(total: Array, layer: Layer) -> Array:
    for block, partner in layer:
        block, partner = _mesh.rows_cut(block), _mesh.columns_cut(partner)
        total = total + block.cross_gram(partner).reshape(total.shape)
    return _mesh.in_blocks(total)


def _alike(layers: list[Layer]) -> list[list[Layer]]:
    """The layers in groups of one shape; large ones by themselves."""
    groups: dict[Any, list[Layer]] = {}
    for number, layer in enumerate(layers):
        arrays, treedef = jax.tree.flatten(layer)
        is_small = sum(array.nbytes for array in arrays) <= _STACKED
        shapes = tuple((array.shape, array.dtype) for array in arrays)
        groups.setdefault((treedef, shapes) if is_small else number, []).append(layer)
    return list(groups.values())
