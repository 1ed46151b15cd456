"""Workers that run SGD by themselves and are averaged now and then."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._clock import LimitClock
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Coordinates, Scalar
from manifoldflow.updates._base import LocalHessian
from manifoldflow.updates._kinds import AbstractPotentialUpdate
from manifoldflow.updates._scaling import AbstractScalableUpdate, ScalingRule
from manifoldflow.updates._setting import Setting

_SERIES = 18  # terms of Ein(x)/x for x ≤ 1, the last 1e-18


class LocalSGD(AbstractPotentialUpdate, AbstractScalableUpdate):
    """Local SGD: K workers take SGD's steps with noises of their own, averaged every α/η steps.

    On the clock Ση² of the steps of one worker, with c of the noise c∇²L of one worker,

        Y' = −(c/4K) P∇tr[K·H − (K − 1) Ein(2αH)/(2α)],   Ein(x) = ∫₀ˣ (1 − e^{−u})/u du,

    H = ∇²L: from SGD with K times the batch at α = 0 to SGD of one worker as α grows. It takes
    the eigenvalues of the n×n Gram matrix; second derivatives of it need them to be distinct.

    Args:
        num_workers: K ≥ 1.
        gradient_time: α ≥ 0, learning rate times the number of steps between averages.

    Raises:
        ValueError: numbers out of range; `transform`, as one gradient a step is not enough.

    References:
        [GuLyuHuangArora2023]; the closed form is for noise of covariance c∇²L.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1)
        >>> update = mf.updates.LocalSGD(num_workers=2, gradient_time=0.0)
        >>> flow = mf.LimitDiffusion(manifold, noise, update)
        >>> print(flow.drift(jnp.array([2.0, 0.5])).round(3))  # half of SGD's
        [-0.441  0.11 ]
    """

    num_workers: int = eqx.field(static=True)
    gradient_time: Scalar

    @checked
    def __init__(self, num_workers: Any, gradient_time: Any):
        self.num_workers = checked_count("LocalSGD: num_workers", num_workers)
        self.gradient_time = checked_nonnegative("LocalSGD: gradient_time", gradient_time)

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        raise ValueError(
            f"LocalSGD has no Optax transform: a step needs {self.num_workers} gradients, one for "
            "each worker at a point of its own, and gets one. Scan over rounds of local steps "
            "under jax.vmap over the workers, and take the mean after each round."
        )

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        return "noise of covariance c∇²L, as LabelNoise has on LeastSquares"

    def fits(self, setting: Setting) -> bool:
        return setting.hessian_multiple is not None

    def potential(self, local: LocalHessian) -> Scalar:
        values = local.hessian_eigenvalues()
        shared = values * _ein_over(2 * self.gradient_time.astype(values.dtype) * values)
        return jnp.sum(values - (1 - 1 / self.num_workers) * shared)

    def rate(self, setting: Setting) -> Scalar:
        assert setting.hessian_multiple is not None
        return setting.hessian_multiple / 4

    def scaling(self, batch_factor: Scalar) -> ScalingRule:
        return ScalingRule(self, batch_factor, batch_factor, local_steps=1 / batch_factor)


def _ein_over(x: Array) -> Array:
    """The function Ein(x)/x, for small x by its series."""
    # Both branches of a `where` are computed: each gets arguments on which it is finite.
    small, large = jnp.minimum(x, 1), jnp.maximum(x, 1)
    term, total = jnp.ones_like(x), jnp.ones_like(x)
    for k in range(1, _SERIES):
        term = -term * small / (k + 1)
        total = total + term / (k + 1)
    return _tree.where(x < 1, total, _ein(large) / large)


@jax.custom_jvp
def _ein(x: Array) -> Array:
    """The function E₁(x) + ln x + γ, with its own rule: JAX's exp1 has no second derivative."""
    return jax.scipy.special.exp1(x) + jnp.log(x) + np.euler_gamma


@_ein.defjvp
def _ein_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,) = primals
    # Ein′(x) = (1 − e^{−x})/x; expm1 keeps its digits for small x.
    return _ein(x), -jnp.expm1(-x) / x * tangents[0]
