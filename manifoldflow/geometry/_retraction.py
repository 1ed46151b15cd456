"""The retraction that returns to the closest point of a manifold."""

from manifoldflow._results import Info
from manifoldflow._types import Point
from manifoldflow.geometry._closest import closest_point_with_info
from manifoldflow.manifolds import AbstractLandingRetraction, AbstractManifold


class ProjectionRetraction(AbstractLandingRetraction):
    """The retraction to the closest point of the manifold to x + Pv.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> print(mf.ProjectionRetraction()(circle, x, jnp.array([0.0, 0.75])).round(3))
        [0.8 0.6]
    """

    def land(self, manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
        return closest_point_with_info(manifold, point)
