"""Limits of optimisers on the smallest model with a valley: f = xy, fitted to 1.

The loss is ½(xy − 1)² with fresh label noise of standard deviation δ in every step, Gaussian or ±δ.
The minimisers are x = eˢ, y = e⁻ˢ, of sharpness 2cosh 2s; the flattest is s = 0. Each function
gives s(t) in the limit of small learning rates η, on the clock t = kη² after k steps.
"""

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, number

Curve = Float[np.ndarray, "..."]


@checked_concrete
def scalar_factorization_sgd(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    label_std: float = 1.0,
    weight_decay: float = 0.0,
) -> Curve:
    """The position s(t) of SGD with label noise on f = xy: sinh 2s = sinh 2s₀·e^{−(δ² + 2w)t}.

    It solves Y′ = −(δ²/4)P∇tr H − wPY [LiWangArora2022, Corollary 5.2].

    Args:
        start: s₀ = ln x at the point where gradient flow lands.
        time: t ≥ 0 on the clock kη², any shape.
        label_std: δ ≥ 0.
        weight_decay: w = λ/η ≥ 0, of θ ← θ − ηg − ηλθ.

    Returns:
        s(t) in float64, of the shape of `time`.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> print(theory.scalar_factorization_sgd(1.0, np.array([0.0, 1.0, 5.0])).round(3).tolist())
        [1.0, 0.55, 0.012]
    """
    first, times = number("start", start, least=-np.inf), _times(time)
    rate = number("label_std", label_std, least=0.0) ** 2
    rate = rate + 2 * number("weight_decay", weight_decay, least=0.0)
    return np.asarray(np.arcsinh(np.sinh(2 * first) * np.exp(-rate * times)) / 2)


@checked_concrete
def scalar_factorization_local_sgd(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    num_workers: int,
    gradient_time: float,
    label_std: float = 1.0,
) -> Curve:
    """The position s(t) of K workers on f = xy whose weights are averaged every a/η steps.

    Y′ = −(δ²/4K)·P∇tr[KH − (K − 1)Ein(2aH)/(2a)] with Ein(x) = ∫₀ˣ (1 − e⁻ᵘ)/u du. At a = 0 this is
    SGD with K times the batch; as a grows it becomes SGD of one worker.

    Args:
        start: s₀ = ln x at the point where gradient flow lands.
        time: t ≥ 0 on the clock kη² of the k steps of each worker, any shape.
        num_workers: K ≥ 1.
        gradient_time: a ≥ 0, learning rate times the number of steps between averages.
        label_std: δ ≥ 0, of the labels of one worker.

    Returns:
        s(t) in float64, of the shape of `time`.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> from manifoldflow import theory
        >>> options = {"num_workers": 4, "label_std": 1.0}
        >>> for a in (0.0, 1.0, 100.0):
        ...     position = theory.scalar_factorization_local_sgd(
        ...         1.0, 1.0, gradient_time=a, **options
        ...     )
        ...     print(round(float(position), 3))
        0.881
        0.581
        0.55

    References:
        [GuLyuHuangArora2023].
    """
    first = number("start", start, least=-np.inf)
    workers = checked_count("num_workers", num_workers)
    a = number("gradient_time", gradient_time, least=0.0)
    variance = number("label_std", label_std, least=0.0) ** 2

    def velocity(_: float, state: np.ndarray) -> np.ndarray:
        depth = 4 * a * np.cosh(2 * state)  # 2a tr H
        # Ein′(x) = (1 − e⁻ˣ)/x, and 1 in the limit a → 0.
        kept = -np.expm1(-depth) / depth if a > 0 else 1.0
        gain = (workers - (workers - 1) * kept) / workers
        return -variance / 2 * gain * np.tanh(2 * state)

    return _integrated(velocity, np.array([first]), _times(time))


@checked_concrete
def scalar_factorization_adam(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    averaging_rate: float = 0.0,
    label_std: float = 1.0,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> Curve:
    """The position s(t) of Adam (ε = 0) on f = xy, with 1 − β₂ = bη and any β₁.

    Without decay sinh s·tanh(s/2)^{bδ/2} falls as e^{−t/2}, by s′ = −(c/2)tanh s with c = m/(m +
    b). The rate m = 2cosh(s)/δ is that at which the preconditioned loss relaxes; the second moments
    lag behind by 1/b. For b = 0, that is for η² ≪ 1 − β₂ ≪ ηm, sinh s falls as e^{−t/2} for any
    noise. Decoupled decay (AdamW) adds −w·tanh s, a decay inside the loss −(2w/δ)·sinh s.

    Args:
        start: s₀ = ln x at the point where the descent lands.
        time: t ≥ 0 on the clock kη², any shape.
        averaging_rate: b = (1 − β₂)/η ≥ 0.
        label_std: δ > 0; without noise there is nothing to divide by.
        weight_decay: w = λ/η ≥ 0, where λ multiplies θ.
        decoupled: True for the decay of AdamW; False for that of ½λ‖θ‖² in the loss.

    Returns:
        s(t) in float64, of the shape of `time`.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> from manifoldflow import theory
        >>> print(round(float(theory.scalar_factorization_adam(1.0, 2.0)), 3))
        0.42
        >>> print(round(float(theory.scalar_factorization_adam(1.0, 2.0, averaging_rate=1.0)), 3))
        0.543

    References:
        [LiWenLyu2025] for b = 0.
    """
    first = number("start", start, least=-np.inf)
    b = number("averaging_rate", averaging_rate, least=0.0)
    std = number("label_std", label_std, least=0.0, strict=True)
    decay = number("weight_decay", weight_decay, least=0.0)

    def velocity(_: float, state: np.ndarray) -> np.ndarray:
        # μ = ‖∇f‖₁/δ with ∇f = (e⁻ˢ, eˢ): second moments that lag slow the descent by μ/(μ + b).
        relaxation = 2 * np.cosh(state) / std
        pulled = np.tanh(state) if decoupled else 2 * np.sinh(state) / std
        return -np.tanh(state) / 2 * relaxation / (relaxation + b) - decay * pulled

    return _integrated(velocity, np.array([first]), _times(time))


@checked_concrete
def scalar_factorization_slow_adam(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    averaging_rate: float,
    label_std: float = 1.0,
    second_moments: Num[ArrayLike, "..."] | None = None,
) -> Curve:
    """The position s(t) of Adam (ε = 0) on f = xy whose second moments are slow, 1 − β₂ = cη².

    s′ = −(δ²/2)·pq(qx² − py²)/(py² + qx²) with p, q = v^{−1/2}, and v′ = c(δ²(y², x²) − v). With
    the bias correction v begins at 0 and is divided by 1 − e^{−ct}. Then p and q are right from the
    start, and depend on the whole way so far.

    Args:
        start: s₀ = ln x at the point where the descent lands.
        time: t ≥ 0 on the clock kη², any shape.
        averaging_rate: c = (1 − β₂)/η² > 0.
        label_std: δ > 0.
        second_moments: v at time 0, two positive numbers, for Adam without bias correction; None
            for Adam with it.

    Returns:
        s(t) in float64, of the shape of `time`.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> from manifoldflow import theory
        >>> position = theory.scalar_factorization_slow_adam(1.0, 1.0, averaging_rate=100.0)
        >>> fast = theory.scalar_factorization_adam(1.0, 1.0)  # the limit c → ∞
        >>> print(abs(position - fast) < 0.01)
        True
    """
    first = number("start", start, least=-np.inf)
    c = number("averaging_rate", averaging_rate, least=0.0, strict=True)
    variance = number("label_std", label_std, least=0.0, strict=True) ** 2
    is_corrected = second_moments is None
    begin = np.zeros(2) if second_moments is None else finite("second_moments", second_moments)
    if begin.shape != (2,) or (not is_corrected and np.any(begin <= 0)):
        raise ValueError(f"second_moments: got {begin}, expected two positive numbers.")

    def velocity(t: float, state: np.ndarray) -> np.ndarray:
        s, v = state[0], state[1:]
        moments = variance * np.exp(np.array([-2 * s, 2 * s]))  # of the gradient
        seen = v / -np.expm1(-c * t) if is_corrected and t > 0 else v
        # At t = 0 the corrected moments are 0/0; their limit is the moment of the first gradient.
        seen = moments if is_corrected and t == 0 else seen
        p, q = seen**-0.5
        pulls = q * np.exp(2 * s), p * np.exp(-2 * s)
        slope = -variance / 2 * p * q * (pulls[0] - pulls[1]) / (pulls[0] + pulls[1])
        return np.append(slope, c * (moments - v))

    return _integrated(velocity, np.append(first, begin), _times(time))


@checked_concrete
def scale_invariant_norm(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    trace: float,
    noise_constant: float = 1.0,
    weight_decay: float = 0.0,
) -> Curve:
    """The norm r = ‖θ‖ for a scale-invariant loss: r⁴ = ch/2w + (r₀⁴ − ch/2w)·e^{−4wt}.

    Noise of covariance cH is orthogonal to θ and drives the norm up; decay pulls it down: Y′ =
    −(c/4)P∇tr H − wY with tr H(θ) = h/r². The formula is exact where h, the trace at norm 1, stays
    the same on the way. Without decay r⁴ = r₀⁴ + 2cht.

    Args:
        start: r₀ > 0, the norm at which gradient flow lands.
        time: t ≥ 0 on the clock kη², any shape.
        trace: h ≥ 0, the trace of the Hessian at θ/‖θ‖.
        noise_constant: c ≥ 0 of the gradient noise cH.
        weight_decay: w = λ/η ≥ 0.

    Returns:
        r(t) in float64, of the shape of `time`.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> print(theory.scale_invariant_norm(1.0, np.array([0.0, 7.5, 40.0]), trace=1.0).tolist())
        [1.0, 2.0, 3.0]
    """
    fourth = number("start", start, least=0.0, strict=True) ** 4
    times = _times(time)
    h, c = number("trace", trace, least=0.0), number("noise_constant", noise_constant, least=0.0)
    w = number("weight_decay", weight_decay, least=0.0)
    # By expm1: the difference 1 − e^{−4wt} cancels for slow decay.
    gained = -np.expm1(-4 * w * times) / (2 * w) if w > 0 else 2 * times
    return np.asarray((fourth * np.exp(-4 * w * times) + c * h * gained) ** 0.25)


def _times(time: Num[ArrayLike, "..."]) -> np.ndarray:
    times = finite("time", time)
    if np.any(times < 0):
        raise ValueError(f"time: got {np.min(times)}, expected no number below 0.")
    return times


def _integrated(
    velocity: Callable[[float, np.ndarray], np.ndarray], start: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """The first component of the solution of a differential equation, at the given times."""
    # Here, since scipy is slow to import and only some oracles need it.
    from scipy.integrate import solve_ivp

    # solve_ivp wants its times ascending; callers may give them in any order.
    wanted, where = np.unique(times, return_inverse=True)
    end = float(np.max(wanted, initial=0.0))
    if end == 0.0:
        return np.full(times.shape, start[0])
    found = solve_ivp(
        velocity, (0.0, end), start, method="DOP853", t_eval=wanted, rtol=1e-11, atol=1e-13
    )
    if not found.success:
        raise ValueError(f"time: the curve could not be followed to {end}: {found.message}")
    return np.asarray(found.y[0][where]).reshape(times.shape)
