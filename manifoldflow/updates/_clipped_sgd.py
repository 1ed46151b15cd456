"""SGD that clips the gradient of every example."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._clock import LimitClock
from manifoldflow._errors import checked_positive
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.updates._base import sgd_of
from manifoldflow.updates._kinds import AbstractRowsUpdate
from manifoldflow.updates._response import NEEDS
from manifoldflow.updates._setting import Setting


class ClippedSGD(AbstractRowsUpdate):
    """SGD with clipped gradients of one example: θ ← θ − η·g·min(1, C/‖g‖).

    For label noise ε of variance δ² and gradients a·ε∇rᵢ, the limit on the clock Ση² is

        Y' = −(1/N) P Σᵢ ∇²rᵢ(JᵀTKD)_{·i},   DKT + TKD = diag s,   K = JJᵀ, D = diag κ,

        κᵢ = a·P(|ε| < hᵢ),   sᵢ = a²·E min(ε², hᵢ²),   hᵢ = C/(a‖∇rᵢ‖).

    It tends to that of SGD as C grows. With batches of more than one example the transform clips
    their mean, which has another limit.

    Args:
        max_norm: C > 0.

    Raises:
        ValueError: a norm that is not positive.

    References:
        The formula of `IterationLimit`, in n dimensions.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1)
        >>> for max_norm in (1.0, 100.0):  # the latter as SGD
        ...     flow = mf.LimitDiffusion(manifold, noise, mf.updates.ClippedSGD(max_norm))
        ...     print(flow.drift(jnp.array([2.0, 0.5])).round(3))
        [-0.155  0.039]
        [-0.882  0.221]
    """

    keeps_gradients: ClassVar[bool] = True
    max_norm: Scalar

    @checked
    def __init__(self, max_norm: Any):
        self.max_norm = checked_positive("ClippedSGD: max_norm", max_norm, "It is a length.")

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        def clipped(gradient: Tangent) -> Tangent:
            size = _tree.norm(gradient)
            share = jnp.minimum(1, self.max_norm / jnp.where(size > 0, size, 1))
            return jax.tree.map(lambda g: (share * g).astype(g.dtype), gradient)

        return sgd_of(clipped, learning_rate)

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        return NEEDS

    def fits(self, setting: Setting) -> bool:
        return setting.label_std is not None

    def row(self, gradient: Tangent) -> Tangent:
        return gradient

    def response(
        self, lengths: Float[Array, " n"], setting: Setting
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        assert setting.label_std is not None and setting.slope is not None
        std, slope, most = (
            value.astype(lengths.dtype)
            for value in (setting.label_std, setting.slope, self.max_norm)
        )
        # Where the noise is clipped, in its standard deviations; beyond 40 of them never.
        # A row of length 0, or no noise, is never clipped: 0/0 would be NaN.
        spread = slope * std * lengths
        height = jnp.minimum(40, most / _tree.where(spread > 0, spread, 1))
        height = _tree.where(spread > 0, height, 40)
        # With h in standard deviations: P(|ξ| < h), and E min(ξ², h²) = P − h√(2/π)e^{−h²/2} + h²(1
        # − P).
        inside = jax.lax.erf(height / jnp.sqrt(2.0).astype(height.dtype))
        density = jnp.exp(-(height**2) / 2) * jnp.sqrt(2 / jnp.pi).astype(height.dtype)
        squares = inside - height * density + height**2 * (1 - inside)
        return slope * inside, (slope * std) ** 2 * squares
