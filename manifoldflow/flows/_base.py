"""What a flow is: coefficients at a point, and the manifold on which it stays."""

import abc
from typing import Any

import diffrax as dfx
import equinox as eqx

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.manifolds import AbstractManifold


class AbstractFlow(eqx.Module):
    """An autonomous differential equation on points.

    `manifold` is the manifold that it stays on, or None for a flow of the whole space.
    """

    manifold: eqx.AbstractVar[AbstractManifold | None]

    @abc.abstractmethod
    def split(self, point: Point) -> tuple[Coordinates, Point]:
        """`(coordinates, remainder)` of a point; the coordinates are Diffrax's state."""

    @abc.abstractmethod
    def drift(self, point: Point) -> Tangent:
        """The deterministic part of the velocity at a point."""

    def terms(self, point: Point) -> dfx.AbstractTerm:
        """Terms for `diffrax.diffeqsolve`, whose state is the coordinates of a point.

        Args:
            point: any point of the kind to be moved; its non-coordinates are kept.
        """
        return dfx.ODETerm(_VectorField(self, self.split(point)[1]))


class _VectorField(eqx.Module):
    """The drift as Diffrax calls it. A module, so that new data do not recompile."""

    flow: AbstractFlow
    remainder: Point

    def __call__(self, t: Any, y: Coordinates, args: object) -> Tangent:
        del t, args
        return self.flow.drift(_tree.join(y, self.remainder))
