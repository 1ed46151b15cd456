"""The retraction that returns to a manifold along gradient flow."""

from manifoldflow._results import Info
from manifoldflow._types import Point
from manifoldflow.limits._limit_map import limit_map_with_info
from manifoldflow.manifolds import AbstractLandingRetraction, AbstractManifold


class LimitMapRetraction(AbstractLandingRetraction):
    """The retraction Φ(x + Pv), by gradient flow of the loss that the manifold minimises.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> print(mf.LimitMapRetraction()(circle, x, jnp.array([0.0, 0.75])).round(3))
        [0.8 0.6]
    """

    def land(self, manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
        return limit_map_with_info(manifold, point)
