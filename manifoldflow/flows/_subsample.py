"""The drift of label noise from some of the examples, with its uncertainty."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.flows._limit_diffusion import LimitDiffusion
from manifoldflow.losses import AbstractExampleLoss
from manifoldflow.noise import hessian_trace


class DriftEstimate(NamedTuple):
    """An unbiased estimate of a drift, with its standard error.

    Attributes:
        drift: the estimate.
        standard_error: √E‖estimate − drift‖², before the projection, which can only lower it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> estimate = mf.flows.DriftEstimate(drift=jnp.ones(2), standard_error=jnp.asarray(0.1))
        >>> print(estimate.drift, estimate.standard_error)
        [1. 1.] 0.1
    """

    drift: Tangent
    standard_error: Scalar


@checked
@eqx.filter_jit
def subsampled_drift(
    flow: LimitDiffusion,
    point: Point,
    key: Key,
    *,
    num_examples: int,
    num_groups: int = 8,
    projected: bool = True,
) -> DriftEstimate:
    """The drift −(c/4) P∇tr∇²L with an exact trace over a random subset of the examples.

    tr∇²L is a mean over examples whose terms differ little. Probes over examples (Hutchinson)
    see all their products: one probe costs as much as the exact gradient and is 100 % off. A
    subset of m of N examples costs m/N of it.

    Args:
        flow: the limit of label noise on a zero-loss manifold, under SGD.
        point: a point of the manifold.
        key: draws the subset, without replacement.
        num_examples: m, a multiple of `num_groups`, at most N.
        num_groups: parts of the subset, whose spread gives the standard error; at least 2.
        projected: apply P, which needs the Gram matrix of all N examples (or
            conjugate gradients on it, if the manifold's `gram` says so).

    Returns:
        The estimate and its standard error.

    Raises:
        ValueError: another noise or update, a subset larger than the data or not divisible.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: x @ (w[:2] * w[2:])
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=predict)
        >>> flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, batch_size=1))
        >>> point = jnp.array([2.0, 1.0, 0.5, 1.0])
        >>> found = mf.subsampled_drift(flow, point, jr.key(0), num_examples=2, num_groups=2)
        >>> bool(jnp.allclose(found.drift, flow.drift(point), atol=1e-6))
        True
    """
    loss, limit = flow.manifold.loss, flow.short_limit
    is_trace = limit is not None and limit.is_ode and limit.potential is hessian_trace
    if limit is None or not is_trace or not isinstance(loss, AbstractExampleLoss):
        raise ValueError(
            "subsampled_drift is for a drift −rate·P∇tr∇²L, the gradient of a mean over examples, "
            "as LabelNoise has on LeastSquares; got "
            f"{type(flow.noise).__name__} on {type(loss).__name__} under "
            f"updates.{type(flow.update).__name__}."
        )
    total = loss.num_examples
    num_examples = checked_count("subsampled_drift: num_examples", num_examples)
    if num_examples > total or num_examples % num_groups or num_groups < 2:
        raise ValueError(
            f"subsampled_drift needs num_groups ≥ 2 equal groups of at most {total} examples in "
            f"all; got num_examples={num_examples}, num_groups={num_groups}. "
            "Use flow.drift(point) for all of them."
        )
    chosen = jr.choice(key, total, (num_examples,), replace=False)

    def gradient_of(indices: jax.Array) -> Tangent:
        coordinates, remainder = loss.split(point)
        trace = loss.select(indices).trace_gauss_newton
        return jax.grad(lambda x: trace(_tree.join(x, remainder)))(coordinates)

    def step(sums: tuple[Tangent, Scalar], indices: jax.Array) -> tuple[tuple, None]:
        gradient = gradient_of(indices)
        return (_tree.add(sums[0], gradient), sums[1] + _tree.inner(gradient, gradient)), None

    zeros = jax.tree.map(jnp.zeros_like, loss.split(point)[0])
    start = (zeros, jnp.zeros((), _tree.dtype_of(zeros)))
    (gradient, squares), _ = jax.lax.scan(step, start, chosen.reshape(num_groups, -1))
    # Var of a mean of m groups is Σ‖gᵢ − ḡ‖²/(m(m − 1)), with Σ‖gᵢ − ḡ‖² = Σ‖gᵢ‖² − m‖ḡ‖².
    mean = _tree.scale(1 / num_groups, gradient)
    spread = squares - num_groups * _tree.inner(mean, mean)
    # Drawn without replacement, all of the examples leave no error.
    left = 1 - num_examples / total
    # The spread is a difference of almost equal sums, which rounding can make negative.
    variance = left * jnp.maximum(spread, 0) / (num_groups * (num_groups - 1))
    rate = limit.rate.astype(variance.dtype)
    tangent = flow.manifold.normal_space(point).tangent(mean) if projected else mean
    return DriftEstimate(_tree.scale(-rate, tangent), rate * jnp.sqrt(variance))
