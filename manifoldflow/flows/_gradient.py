"""Gradient flows: of a loss in the whole space, of any function along a manifold."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._clock import GradientClock
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.geometry import gradient_along
from manifoldflow.losses import AbstractLoss
from manifoldflow.manifolds import AbstractManifold


class GradientFlow(AbstractFlow):
    """The gradient flow θ' = −∇L(θ), on the clock kη of gradient descent.

    It is stiff: to reach its limit use `limit_map`, which takes implicit steps.

    Args:
        loss: any loss.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> flow = mf.GradientFlow(mf.FunctionLoss(lambda x: (x[0] * x[1] - 1) ** 2 / 2))
        >>> print(flow.drift(jnp.array([2.0, 1.0])), flow.clock.formula)
        [-1. -2.] Ση/(1−β)
    """

    loss: AbstractLoss

    def __check_init__(self):
        checked_fields(self)

    @property
    def clock(self) -> GradientClock:
        """The clock Ση of gradient flow."""
        return GradientClock()

    @property
    def manifold(self) -> None:
        return None

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.loss.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        return _tree.scale(-1, self.loss.gradient(point))


class RiemannianGradientFlow(AbstractFlow):
    """The Riemannian gradient flow θ' = −P∇F(θ): steepest descent of F along a manifold.

    Args:
        manifold: the manifold that the flow stays on.
        fn: the function F, point → scalar, on and near the manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> flow = mf.RiemannianGradientFlow(circle, lambda x: x[1])
        >>> print(flow.drift(jnp.array([0.6, 0.8])).round(2))
        [ 0.48 -0.36]
    """

    manifold: AbstractManifold
    fn: Callable[..., Any]

    @checked
    def __init__(self, manifold: AbstractManifold, fn: Callable[[Point], Any]):
        self.manifold = manifold
        self.fn = _tree.as_pytree_callable(fn)

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        return _tree.scale(-1, gradient_along(self.manifold, self.fn, point))
