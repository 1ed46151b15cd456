"""Geodesics together with their velocities, in one solve."""

from typing import Any

from jaxtyping import Array, Float

from manifoldflow._boundary import checked
from manifoldflow._types import Point, Tangent
from manifoldflow.geometry._geodesics import GeodesicOptions, path_along
from manifoldflow.manifolds import AbstractManifold


@checked
def geodesic_with_velocity(
    manifold: AbstractManifold,
    point: Point,
    velocity: Tangent,
    times: Float[Array, " times"] | Any,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> tuple[Point, Tangent]:
    """γ(times) and γ′(times) for the geodesic with γ(0) = point and γ′(0) = velocity.

    Args:
        manifold: the manifold.
        point: γ(0), on the manifold.
        velocity: γ′(0); its tangent part counts.
        times: (T,) in order, away from 0 on one side of it; may be traced.
        walk: how to solve.
        throw: as for `geodesic`.

    Raises:
        ValueError: times out of order.
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Returns:
        The points and the velocities there, with a leading axis of T at each coordinate.
    """
    path, vectors = path_along(manifold, point, (velocity,), times, walk, throw)
    return path, vectors[0]
