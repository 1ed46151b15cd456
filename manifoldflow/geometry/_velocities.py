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
    """The points and velocities γ(times), γ′(times) of the geodesic from `point` with `velocity`.

    Args:
        manifold: the manifold.
        point: γ(0), on the manifold.
        velocity: γ′(0); its tangent part counts.
        times: (T,) in order, away from 0 on one side of it; may be traced.
        walk: the options for solving.
        throw: as for `geodesic`.

    Returns:
        The points and the velocities there, with a leading axis of T at each coordinate.

    Raises:
        ValueError: times out of order.
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> times, up = jnp.array([jnp.pi / 6]), jnp.array([0.0, 1.0])
        >>> points, velocities = mf.geometry.geodesic_with_velocity(circle, x, up, times)
        >>> print(points.round(3), velocities.round(3))
        [[0.866 0.5  ]] [[-0.5    0.866]]
    """
    # The velocity is transported along its own geodesic: one solve gives both.
    path, vectors = path_along(manifold, point, (velocity,), times, walk, throw)
    return path, vectors[0]
