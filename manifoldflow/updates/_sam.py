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
    """θ ← θ − η g(θ + ρ g(θ)/‖g(θ)‖), both gradients at the same batch; no climb where g = 0.

    On the clock Σηρ² the limit of small ρ and η ≪ ρ² is

        Y' = −½P∇tr ∇²L   where g is the gradient of one example, `MinibatchNoise(1)`,
        Y' = −½P∇λ₁(∇²L)  where it is that of all, `MinibatchNoise(N)`.

    At rates η that are not far below ρ² the noise of a bouncing climb adds to it.

    Args:
        radius: ρ > 0, the length of a climb.
        per_example: which of both: whether the batches are single examples, of one output.

    Raises:
        ValueError: a radius that is not positive.

    References:
        [WenMaLi2023].
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
        """It needs `grad_fn`, the gradient of the same batch elsewhere, which `simulate` gives."""
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
            length = jnp.where(size > 0, self.radius / jnp.where(size > 0, size, 1), 0)
            top = jax.tree.map(lambda p, g: p + (length * g).astype(p.dtype), params, updates)
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
