"""Geodesics together with their velocities, in one solve."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._results import delivered
from manifoldflow._types import Point, Tangent
from manifoldflow.geometry._geodesics import GeodesicOptions, walk_along
from manifoldflow.manifolds import AbstractManifold


@checked
def geodesic_with_velocity(
    manifold: AbstractManifold,
    point: Point,
    velocity: Tangent,
    times: Float[Array, " times"],
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> tuple[Point, Tangent]:
    """γ(times) and γ′(times) for the geodesic with γ(0) = point and γ′(0) = velocity.

    Args:
        manifold: the manifold.
        point: γ(0), on the manifold.
        velocity: γ′(0); its tangent part counts.
        times: (T,) in order, away from 0 on one side of it; they are not looked at.
        walk: how to solve.
        throw: as for `geodesic`.

    Returns:
        The points and the velocities there, with a leading axis of T at each coordinate.
    """
    coordinates, _ = manifold.split(point)
    times = jnp.asarray(times, _tree.dtype_of(coordinates))
    vector = _tree.as_tangent(coordinates, velocity)
    path, vectors, result = walk_along(manifold, point, (vector,), times, walk or GeodesicOptions())
    path, moving = delivered((path, vectors[0]), result, throw)
    return path, moving
