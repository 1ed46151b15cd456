"""Sharpness-aware minimisation, one climb for each draw."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._clock import SAMClock
from manifoldflow._types import Coordinates, Scalar
from manifoldflow.updates._base import LocalHessian
from manifoldflow.updates._kinds import AbstractPotentialUpdate
from manifoldflow.updates._setting import Setting


class SAM(AbstractPotentialUpdate):
    """Sharpness-aware minimisation, θ ← θ − η g(θ + ρ g(θ)/‖g(θ)‖); no climb where g = 0.

    Both gradients are taken at the same batch. On the clock Σηρ² the limit of small ρ and η ≪ ρ² is

        Y' = −½P∇tr ∇²L   where g is the gradient of one example, `MinibatchNoise(1)`,
        Y' = −½P∇λ₁(∇²L)  where it is that of all, `MinibatchNoise(N)`.

    At rates η that are not far below ρ² the noise of a bouncing climb adds to it.

    Args:
        radius: ρ > 0, the length of a climb.
        per_example: True for batches of single examples, of one output; False for all examples.

    Raises:
        ValueError: a radius that is not positive.

    References:
        [WenMaLi2023].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.MinibatchNoise(1)
        >>> flow = mf.LimitDiffusion(manifold, noise, mf.updates.SAM(radius=0.1))
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3))
        [-1.765  0.441]
    """

    radius: Scalar
    per_example: bool = eqx.field(static=True)

    @checked
    def __init__(self, radius: Any, per_example: bool = True):
        self.radius = SAMClock(radius).radius
        self.per_example = bool(per_example)

    @property
    def clock(self) -> SAMClock:
        return SAMClock(self.radius)

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        """The Optax transform. It needs `grad_fn`, the gradient of the same batch elsewhere."""
        step = optax.sgd(learning_rate)

        def update(
            updates: Any, state: Any, params: Any = None, *, grad_fn: Any = None, **extra: Any
        ) -> tuple[Any, Any]:
            del extra
            if grad_fn is None:
                raise ValueError(
                    "SAM's transform needs the gradient of the same batch at another point: "
                    "update(gradient, state, params, grad_fn=…), as simulate calls it."
                )
            size = _tree.norm(updates)
            # The inner `where` keeps ρ/0 out of the derivative too: NaN times 0 is NaN.
            length = jnp.where(size > 0, self.radius / jnp.where(size > 0, size, 1), 0)
            top = jax.tree.map(lambda p, g: p + (length * g).astype(p.dtype), params, updates)
            # The same batch and labels at the top of the climb: with others it would climb another
            # loss.
            return step.update(grad_fn(top), state, params)

        return optax.GradientTransformationExtraArgs(step.init, update)

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        if self.per_example:
            return "MinibatchNoise(1) on a zero-loss manifold with one output for each example"
        return "MinibatchNoise(N), all examples in a batch, on a zero-loss manifold"

    def fits(self, setting: Setting) -> bool:
        if self.per_example:
            return setting.batch_size == 1 and setting.num_outputs == 1
        return setting.is_full_batch and setting.num_outputs > 0

    def potential(self, local: LocalHessian) -> Scalar:
        return local.hessian_trace() if self.per_example else local.hessian_eigenvalues()[-1]

    def rate(self, setting: Setting) -> Scalar:
        del setting
        return jnp.asarray(0.5)
