"""Gradient descent with steps of one length."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from manifoldflow import _tree
from manifoldflow._clock import LimitClock
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.updates._base import LocalHessian, sgd_of
from manifoldflow.updates._kinds import AbstractPotentialUpdate
from manifoldflow.updates._setting import Setting


class NormalizedGD(AbstractPotentialUpdate):
    """Normalised gradient descent θ ← θ − η∇L/‖∇L‖, which does not move where ∇L = 0.

    It ends up bouncing along the sharpest direction, and on the clock Ση² the limit is

        Y' = −¼P∇ln λ₁(∇²L).

    The gradient is that of all examples, `MinibatchNoise(N)`.

    References:
        [AroraLiPanigrahi2022].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.MinibatchNoise(1)
        >>> flow = mf.LimitDiffusion(manifold, noise, mf.updates.NormalizedGD())
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3))
        [-0.208  0.052]
    """

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        def unit(gradient: Tangent) -> Tangent:
            size = _tree.norm(gradient)
            # The inner `where` keeps 1/0 out of the derivative too: NaN times 0 is NaN.
            inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
            return jax.tree.map(lambda g: (inverse * g).astype(g.dtype), gradient)

        return sgd_of(unit, learning_rate)

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        return "MinibatchNoise(N), all examples in a batch, on a zero-loss manifold"

    def fits(self, setting: Setting) -> bool:
        return setting.is_full_batch and setting.num_outputs > 0

    def potential(self, local: LocalHessian) -> Scalar:
        # Smooth where λ₁ is simple; where two eigenvalues meet, the flow has a kink.
        return jnp.log(local.hessian_eigenvalues()[-1])

    def rate(self, setting: Setting) -> Scalar:
        del setting
        return jnp.asarray(0.25)
