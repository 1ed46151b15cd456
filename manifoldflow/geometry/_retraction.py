"""The way back to the closest point."""

from manifoldflow._results import Info
from manifoldflow._types import Point
from manifoldflow.geometry._closest import closest_point_with_info
from manifoldflow.manifolds import AbstractLandingRetraction, AbstractManifold


class ProjectionRetraction(AbstractLandingRetraction):
    """The closest point of the manifold to x + Pv."""

    def land(self, manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
        return closest_point_with_info(manifold, point)
