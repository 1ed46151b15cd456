"""Brownian motion on a manifold."""

import equinox as eqx
import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.manifolds import AbstractManifold


class BrownianMotion(AbstractDiffusion):
    """Brownian motion on a manifold, dX = ½ tr II dt + P dW: the diffusion with generator ½Δ.

    In the sense of Stratonovich, dX = P∘dW. The Itô drift ½ tr II is normal to the manifold and
    takes D second directional derivatives of the constraint.

    Args:
        manifold: any manifold, with the metric of the space of points.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> flow = mf.BrownianMotion(circle)
        >>> print(flow.drift(start) + 0.0)
        [-0.5  0. ]
        >>> walk = mf.solve(flow, start, end_time=1.0, step_size=0.1, key=jr.key(0))
        >>> print(f"{jnp.linalg.norm(walk.final):.6f}")
        1.000000
    """

    manifold: AbstractManifold

    def __check_init__(self):
        checked_fields(self)

    @property
    def is_stochastic(self) -> bool:
        return True

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        """The vector ½ tr II, half of the (not averaged) mean curvature vector."""
        return _tree.scale(0.5, self.manifold.local(point).mean_curvature())

    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """The projection P, as an operator on tangents."""
        tangents = _tree.structure_of(self.split(point)[0])
        project = self.manifold.normal_space(point).tangent
        return lx.FunctionLinearOperator(project, tangents, lx.symmetric_tag)
