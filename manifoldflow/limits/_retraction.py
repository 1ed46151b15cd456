"""The way back along gradient flow."""

from manifoldflow._results import Info
from manifoldflow._types import Point
from manifoldflow.limits._limit_map import limit_map_with_info
from manifoldflow.manifolds import AbstractLandingRetraction, AbstractManifold


class LimitMapRetraction(AbstractLandingRetraction):
    """Φ(x + Pv), the limit of gradient flow of the loss that the manifold minimises."""

    def land(self, manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
        return limit_map_with_info(manifold, point)
