"""Adam and AdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._clock import LimitClock
from manifoldflow._errors import checked_nonnegative, checked_positive, described
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.updates._kinds import AbstractPreconditionedUpdate
from manifoldflow.updates._scaling import AbstractScalableUpdate, ScalingRule
from manifoldflow.updates._setting import Setting


class Adam(AbstractPreconditionedUpdate, AbstractScalableUpdate):
    """Adam and AdamW: θ ← θ − η·m/(√v + ε) − ηλθ, bias-corrected, with λ = `weight_decay`·η.

    1 − β₂ is bη. For noise of covariance c∇²L, H = ∇²L, on the clock Ση² and with
    `averaging="fast"`, the limit is

        Y' = −½G_S∇Σⱼ[uⱼ − ε ln(uⱼ + ε)] − `weight_decay`·ΠY,   uⱼ = √(cHⱼⱼ),   S = 1/(u + ε),

        Π = 1 − SJᵀ(JSJᵀ)⁻¹J,   G_S = ΠS.

    With ε = 0 it is −½G_S∇tr Diag(H)^{½} at S = Diag(H)^{−½}, whatever the noise. Second
    moments that follow in the time of the descent itself, 1 − β₂ = bη, lag behind and slow it:
    one residual by the factor μ/(μ + b), μ the rate of the descent; as b → 0 the limit is that of
    `averaging="fast"`. The first moment changes nothing, as long as it forgets faster than the
    second, 1 − β₂ ≪ 1 − β₁.

    The drift takes n Hessian-vector products of all residuals, and for b > 0 n more per column
    of the noise.

    Args:
        b1: β₁ in [0, 1).
        averaging: b > 0, or "fast" for η² ≪ 1 − β₂ ≪ η: fast in the time of the limit. The
            transform then takes 1 − β₂ = η^{3/2}, which leaves a bias of the order √η.
        eps: ε ≥ 0. Without it every coordinate needs Hⱼⱼ > 0: the drift is refused, or NaN under
            jit, where one is 0. Where one tends to 0 it gets there in a finite time.
        weight_decay: λ/η ≥ 0, decoupled: a step subtracts ηλθ.

    Raises:
        ValueError: numbers out of range.

    References:
        [LiWenLyu2025] for "fast"; the formula of `IterationLimit` for the lag.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1)
        >>> flow = mf.LimitDiffusion(manifold, noise, mf.updates.Adam())
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3))
        [-0.6   0.15]
    """

    b1: Any
    eps: Scalar
    weight_decay: Scalar
    rate: Scalar | None

    @checked
    def __init__(
        self, b1: Any = 0.9, averaging: Any = "fast", eps: Any = 0.0, weight_decay: Any = 0.0
    ):
        self.b1 = LimitClock(b1).momentum
        self.eps = checked_nonnegative("Adam: eps", eps)
        self.weight_decay = checked_nonnegative("Adam: weight_decay", weight_decay)
        if isinstance(averaging, str) and averaging != "fast":
            raise ValueError(
                'Adam: averaging must be a rate b > 0, 1 − β₂ = bη, or "fast"; got '
                f"{described(averaging)}."
            )
        is_fast = isinstance(averaging, str)
        self.rate = None if is_fast else checked_positive("Adam: averaging", averaging)

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    @property
    def averaging_rate(self) -> Scalar | None:
        return self.rate

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        fn: Any = learning_rate if callable(learning_rate) else lambda count: learning_rate

        def init(params: Any) -> _State:
            # Products of (1 − share), not powers of β: rates that follow a schedule have no single
            # β.
            zeros, one = _tree.zeros_like(params), jnp.ones((), _tree.dtype_of(params))
            return _State(jnp.zeros((), jnp.int32), zeros, zeros, one, one)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            eta = jnp.asarray(fn(state.count), state.left1.dtype)
            # "fast" asks for η² ≪ 1 − β₂ ≪ η: the geometric mean of both ends.
            share = eta**1.5 if self.rate is None else self.rate.astype(eta.dtype) * eta
            share, first = jnp.minimum(share, 1), jnp.asarray(1 - self.b1, eta.dtype)
            state = _State(
                state.count + 1,
                _mean(state.mean, updates, first),
                _mean(state.square, jax.tree.map(jnp.square, updates), share),
                state.left1 * (1 - first),
                state.left2 * (1 - share),
            )
            decay = eta**2 * self.weight_decay.astype(eta.dtype)

            def step(m: Array, v: Array, p: Array) -> Array:
                root = jnp.sqrt(v / (1 - state.left2)) + self.eps.astype(eta.dtype)
                # A coordinate that has had no gradient has no direction to go.
                ratio = _tree.where(root > 0, m / _tree.where(root > 0, root, 1), 0)
                return (-eta * ratio / (1 - state.left1) - decay * p).astype(p.dtype)

            return jax.tree.map(step, state.mean, state.square, params), state

        return optax.GradientTransformation(init, update)

    def slow_drift(self, coordinates: Coordinates) -> Tangent:
        rate = self.weight_decay.astype(_tree.dtype_of(coordinates))
        return _tree.scale(-rate, coordinates)

    @property
    def needs(self) -> str:
        return (
            "noise of covariance c∇²L on a zero-loss manifold, as LabelNoise has on LeastSquares "
            "and ResampledLabels on a likelihood"
        )

    def fits(self, setting: Setting) -> bool:
        return setting.hessian_multiple is not None and setting.has_residuals

    def preconditioner(self, second_moments: Array) -> Array:
        # ε beside the root, as Optax has it, and not under it.
        return 1 / (jnp.sqrt(second_moments) + self.eps.astype(second_moments.dtype))

    @property
    def failure(self) -> str:
        return (
            "Adam with eps=0 divides by the root of the second moments, which are 0 (or not "
            "finite) for some coordinate: no residual depends on it to first order. Give Adam "
            "eps > 0, or freeze that coordinate by the option trainable of the loss."
        )

    def scaling(self, batch_factor: Scalar) -> ScalingRule:
        root = jnp.sqrt(batch_factor)
        averaging = "fast" if self.rate is None else self.rate * root
        larger = Adam(self.b1, averaging, self.eps / root, self.weight_decay)
        return ScalingRule(
            larger, batch_factor, root, weight_decay=root, averaging=batch_factor, eps=1 / root
        )


class _State(NamedTuple):
    """The state of the transform; `left1` and `left2` correct the bias, for schedules as well."""

    count: Array
    mean: Any
    square: Any
    left1: Array
    left2: Array


def _mean(before: Any, now: Any, share: Array) -> Any:
    return jax.tree.map(lambda m, g: m + (share * (g - m)).astype(m.dtype), before, now)
