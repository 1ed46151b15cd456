"""The diffusion that SGD itself resembles, off the manifold too."""

from typing import Any

import equinox as eqx
import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_but
from manifoldflow._clock import LimitClock
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise import AbstractNoise, checked_noise, short_limit


class SGDDiffusion(AbstractDiffusion):
    """The diffusion dX = −η⁻¹∇L(X) dt + F(X) dW on the limit clock t = kη², F Fᵀ the noise of SGD.

    One step of SGD is a step of length η² of this equation's Euler scheme; `LimitDiffusion`
    is its limit as η → 0. It is stiff: steps beyond some 2η/λ_max(∇²L) diverge.

    Args:
        loss: any loss.
        noise: any noise that fits the loss.
        learning_rate: η > 0.

    Raises:
        ValueError: a learning rate out of range; a noise that does not fit the loss.

    References:
        [LiWangArora2022, eq. (3)]; [Katzenberger1991].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2)
        >>> flow = mf.SGDDiffusion(loss, mf.IsotropicNoise(std=2.0), learning_rate=0.1)
        >>> print(flow.drift(jnp.array([1.0])).round(3), flow.diffusion(jnp.ones(1)).as_matrix())
        [-10.] [[2.]]
    """

    loss: AbstractLoss
    noise: AbstractNoise
    learning_rate: Scalar

    @checked_but("noise")
    def __init__(self, loss: AbstractLoss, noise: Any, learning_rate: Any):
        self.loss = loss
        self.noise = checked_noise("SGDDiffusion", noise)
        short_limit(noise, loss)  # raises if the noise does not fit the loss
        self.learning_rate = checked_nonnegative(
            "SGDDiffusion: learning_rate", learning_rate, "It is a step size."
        )

    @property
    def clock(self) -> LimitClock:
        """The clock Ση² of the limit."""
        return LimitClock()

    @property
    def manifold(self) -> None:
        return None

    @property
    def is_stochastic(self) -> bool:
        return True

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.loss.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        """The drift −η⁻¹∇L."""
        # A step of η² on the limit clock is one of η on that of gradient flow: η⁻¹ in the drift.
        return _tree.scale(-1 / self.learning_rate, self.loss.gradient(point))

    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """The operator F, from the space of the noise to tangents."""
        return self.noise.checked_factor(self.loss, point)
