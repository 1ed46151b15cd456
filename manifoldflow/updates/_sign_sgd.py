"""Steps along the signs of the gradient."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from manifoldflow._clock import LimitClock
from manifoldflow._types import Coordinates, Tangent
from manifoldflow.updates._base import sgd_of
from manifoldflow.updates._kinds import AbstractRowsUpdate
from manifoldflow.updates._response import NEEDS, sign_response
from manifoldflow.updates._setting import Setting


class SignSGD(AbstractRowsUpdate):
    """SGD along signs: θ ← θ − η·sign(g), one sign per coordinate, g the gradient of one example.

    It does not move along the manifold: the limit is Y' = 0 until a coordinate of some ∇rᵢ
    changes its sign, since every step is ± the signs of a ∇rᵢ. The drift is NaN where the
    signs do not lead back to the manifold, that is where an eigenvalue of J sign(J)ᵀ has no
    positive real part.

    References:
        The formula of `IterationLimit`, in n dimensions.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1)
        >>> flow = mf.LimitDiffusion(manifold, noise, mf.updates.SignSGD())
        >>> print(flow.drift(jnp.array([2.0, 0.5])) + 0.0)
        [0. 0.]
    """

    keeps_gradients: ClassVar[bool] = False

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        return sgd_of(self.row, learning_rate)

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        return NEEDS

    def fits(self, setting: Setting) -> bool:
        return setting.label_std is not None

    def row(self, gradient: Tangent) -> Tangent:
        return jax.tree.map(jnp.sign, gradient)

    def response(
        self, lengths: Float[Array, " n"], setting: Setting
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        return sign_response(lengths, setting)
