"""Stochastic gradient descent, with momentum and decoupled weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._clock import LimitClock
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.updates._scaling import AbstractScalableUpdate, ScalingRule


class SGD(AbstractScalableUpdate):
    """SGD with momentum and decoupled weight decay: θ ← θ − η·m − ηλθ, m ← βm + g.

    The decay is λ = `weight_decay`·η. The limit of small η is that of SGD on the clock Ση²/(1−β)²,
    with the drift −`weight_decay`·(1−β)²·PY beside its own: decoupled decay does not know of the
    momentum, the clock does.

    Args:
        momentum: β in [0, 1), heavy-ball.
        weight_decay: λ/η ≥ 0, decoupled: a step subtracts ηλθ.

    Raises:
        ValueError: a momentum or a decay out of range.

    References:
        [LiWangArora2022, Theorem 4.6].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1)
        >>> update = mf.updates.SGD(momentum=0.9, weight_decay=1.0)
        >>> flow = mf.LimitDiffusion(manifold, noise, update)
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3), flow.clock.formula)
        [-0.9    0.225] Ση²/(1−β)²
    """

    momentum: Any
    weight_decay: Scalar | None

    @checked
    def __init__(self, momentum: Any = 0.0, weight_decay: Any = 0.0):
        self.momentum = LimitClock(momentum).momentum
        # A zero that is known leaves nothing to compute.
        is_none = isinstance(weight_decay, int | float) and weight_decay == 0
        name = "SGD: weight_decay"
        self.weight_decay = None if is_none else checked_nonnegative(name, weight_decay)

    @property
    def clock(self) -> LimitClock:
        return LimitClock(self.momentum)

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        # optax.sgd keeps a trace as large as the point even for β = 0.
        has_momentum = not (isinstance(self.momentum, float) and self.momentum == 0)
        step = optax.sgd(learning_rate, self.momentum if has_momentum else None)
        if self.weight_decay is None:
            return step
        return with_decay(step, learning_rate, self.weight_decay)

    def slow_drift(self, coordinates: Coordinates) -> Tangent | None:
        if self.weight_decay is None:
            return None
        # Decay takes ηλ = η²w per step, and the clock η²/(1−β)²: per unit of the clock w(1−β)².
        rate = jnp.asarray(self.weight_decay * (1 - self.momentum) ** 2)
        return _tree.scale(-rate.astype(_tree.dtype_of(coordinates)), coordinates)

    def scaling(self, batch_factor: Scalar) -> ScalingRule:
        decay = 0.0 if self.weight_decay is None else self.weight_decay / batch_factor
        kept = None if self.weight_decay is None else jnp.ones_like(batch_factor)
        larger = SGD(self.momentum, decay)
        return ScalingRule(larger, batch_factor, batch_factor, weight_decay=kept)


def with_decay(
    step: optax.GradientTransformation, learning_rate: Any, weight_decay: Scalar
) -> optax.GradientTransformation:
    """A transform with a decoupled weight decay that subtracts η²·weight_decay·θ."""
    fn: Any = learning_rate if callable(learning_rate) else lambda count: learning_rate

    def init(params: Any) -> Any:
        return step.init(params), jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        inner, count = state
        updates, inner = step.update(updates, inner, params)
        # λ = w·η, and a step subtracts ηλθ: η² in all.
        decay = fn(count) ** 2 * weight_decay
        updates = jax.tree.map(lambda u, p: u - (decay * p).astype(u.dtype), updates, params)
        return updates, (inner, count + 1)

    return optax.GradientTransformation(init, update)
