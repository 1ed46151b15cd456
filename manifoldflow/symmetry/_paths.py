"""Leaves of networks by their paths, and the names of the layers that they belong to."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from manifoldflow._types import Coordinates

# What libraries call the arrays of a layer.
_OF_A_LAYER = {"weight", "bias", "kernel", "scale", "w", "b", "embedding", "embeddings", "offset"}


class Leaf(NamedTuple):
    """An array of a network, with its path and the layer that it belongs to.

    Attributes:
        path: its own.
        layer: the path of the layer that it is the weight or the bias of, else its own.
        parents: the paths of all nodes above it, the nearest first.
        shape: of the array.
    """

    path: str
    layer: str
    parents: tuple[str, ...]
    shape: tuple[int, ...]


def leaves_of(coordinates: Coordinates) -> list[Leaf]:
    """All leaves, in the order of the tree."""
    return [_leaf(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(coordinates)]


def _leaf(path: Sequence[Any], leaf: Any) -> Leaf:
    shown = jax.tree_util.keystr
    # Flax wraps its arrays once more.
    while path and str(getattr(path[-1], "name", "")) == "value":
        path = path[:-1]
    last = path[-1] if path else None
    word = str(getattr(last, "name", getattr(last, "key", ""))).lower()
    is_of_layer = len(path) > 1 and word in _OF_A_LAYER
    parents = tuple(shown(tuple(path[:i])) for i in range(len(path) - 1, -1, -1))
    layer = path[:-1] if is_of_layer else path
    return Leaf(shown(tuple(path)), shown(tuple(layer)), parents, leaf.shape)


def layer_names(leaves: Sequence[Leaf], numbers: Sequence[int]) -> str:
    """The layers of these leaves, each once, as words of a sentence."""
    names = list(dict.fromkeys(leaves[number].layer for number in numbers))
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
