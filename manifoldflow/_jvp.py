"""Functions that the derivative rules of loops and searches share."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point, Tangent


def filled(tangent: PyTree[Any], like: Coordinates) -> Tangent:
    """Zeros where a tangent is symbolically zero (None)."""
    return jax.tree.map(
        lambda x, dx: jnp.zeros_like(x) if dx is None and x is not None else dx,
        like,
        tangent,
        is_leaf=lambda leaf: leaf is None,
    )


def no_tangent(tree: PyTree[Any]) -> PyTree[None]:
    return jax.tree.map(lambda _: None, tree)


def constraint_dot(
    manifold: Any,
    manifold_dot: PyTree[Any],
    coordinates: Coordinates,
    remainder: Point,
    remainder_dot: PyTree[Any],
) -> PyTree[Any] | None:
    """The change of a constraint at a fixed point when its data (or frozen leaves) change."""
    if not jax.tree.leaves((manifold_dot, remainder_dot)):
        return None

    def value(manifold: Any, remainder: Point) -> PyTree[Any]:
        return manifold.constraint(_tree.join(coordinates, remainder))

    return eqx.filter_jvp(value, (manifold, remainder), (manifold_dot, remainder_dot))[1]
