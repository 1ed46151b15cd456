"""Calculus on a manifold: functions that take the manifold first."""

from collections.abc import Callable
from typing import Any

import jax

from manifoldflow import _tree
from manifoldflow._types import Point, Tangent
from manifoldflow.manifolds._base import AbstractManifold


def riemannian_gradient(
    manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point
) -> Tangent:
    """P∇fn(point), the gradient of a function along the manifold.

    Args:
        manifold: the manifold.
        fn: point → scalar.
        point: a point of the manifold; off it, the projection there is used.
    """
    coordinates, remainder = manifold.split(point)
    gradient = jax.grad(lambda x: fn(_tree.join(x, remainder)))(coordinates)
    return manifold.normal_space(point).tangent(gradient)
