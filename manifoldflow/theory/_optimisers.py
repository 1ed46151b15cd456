"""Where optimisers go on the smallest model with a valley: f = x y, fitted to 1.

The loss is (x y - 1)^2/2 with fresh label noise of standard deviation d in every step, Gaussian or
+-d. The minimisers are x = e^s, y = e^-s, of sharpness 2 cosh 2s: the flattest is s = 0. Here is
s(t) in the limit of small learning rates eta, on the clock t = k eta^2 after k steps.
"""

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, number

Curve = Float[np.ndarray, "..."]


@checked
def scalar_factorization_sgd(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    label_std: float = 1.0,
    weight_decay: float = 0.0,
) -> Curve:
    """``sinh 2s = sinh 2s_0 e^{-(d^2 + 2 w) t}``: SGD with label noise on f = x y.

    That is ``Y' = -(d^2/4) P grad tr H - w P Y`` [LiWangArora2022, Corollary 5.2].

    Args:
        start: s_0 = ln x where gradient flow lands.
        time: t >= 0 on the clock k eta^2, any shape.
        label_std: d >= 0.
        weight_decay: w = lambda/eta >= 0, of ``theta <- theta - eta g - eta lambda theta``.

    Returns:
        s(t) in float64, of the shape of `time`.
    """
    first, times = number("start", start, least=-np.inf), _times(time)
    rate = number("label_std", label_std, least=0.0) ** 2
    rate = rate + 2 * number("weight_decay", weight_decay, least=0.0)
    return np.asarray(np.arcsinh(np.sinh(2 * first) * np.exp(-rate * times)) / 2)


@checked
def scalar_factorization_local_sgd(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    num_workers: int,
    gradient_time: float,
    label_std: float = 1.0,
) -> Curve:
    """s(t) for K workers on f = x y whose weights are averaged every a/eta steps.

    ``Y' = -(d^2/4K) P grad tr[K H - (K-1) Ein(2aH)/(2a)]`` with ``Ein(x) = int_0^x (1-e^-u)/u du``:
    from that of SGD with K times the batch, at a = 0, to that of one worker as a grows.

    Args:
        start: s_0 = ln x where gradient flow lands.
        time: t >= 0 on the clock k eta^2 of the k steps of each worker, any shape.
        num_workers: K >= 1.
        gradient_time: a >= 0, learning rate times the number of steps between averages.
        label_std: d >= 0, of the labels of one worker.

    Returns:
        s(t) in float64, of the shape of `time`.

    References:
        [GuLyuHuangArora2023].
    """
    first = number("start", start, least=-np.inf)
    workers = checked_count("num_workers", num_workers)
    a = number("gradient_time", gradient_time, least=0.0)
    variance = number("label_std", label_std, least=0.0) ** 2

    def velocity(_: float, state: np.ndarray) -> np.ndarray:
        depth = 4 * a * np.cosh(2 * state)  # 2a tr H
        kept = -np.expm1(-depth) / depth if a > 0 else 1.0
        gain = (workers - (workers - 1) * kept) / workers
        return -variance / 2 * gain * np.tanh(2 * state)

    return _integrated(velocity, np.array([first]), _times(time))


@checked
def scalar_factorization_adam(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    averaging_rate: float = 0.0,
    label_std: float = 1.0,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> Curve:
    """s(t) for Adam (eps = 0) on f = x y, with 1 - beta_2 = b eta; any beta_1.

    Without decay ``sinh s tanh(s/2)^{b d/2}`` falls as e^{-t/2}, from
    ``s' = -(c/2) tanh s`` with ``c = m/(m + b)``, ``m = 2 cosh(s)/d`` the rate at which the
    preconditioned loss relaxes: the second moments lag behind by 1/b. For b = 0, that is for
    eta^2 << 1 - beta_2 << eta m, sinh s falls as e^{-t/2}, whatever the noise. Decoupled decay
    (AdamW) adds ``-w tanh s``, a decay inside the loss ``-(2 w/d) sinh s``.

    Args:
        start: s_0 = ln x where the descent lands.
        time: t >= 0 on the clock k eta^2, any shape.
        averaging_rate: b = (1 - beta_2)/eta >= 0.
        label_std: d > 0; without noise there is nothing to divide by.
        weight_decay: w = lambda/eta >= 0, where lambda multiplies theta.
        decoupled: the decay of AdamW; else that of ``lambda |theta|^2/2`` in the loss.

    Returns:
        s(t) in float64, of the shape of `time`.

    References:
        [LiWenLyu2025] for b = 0.
    """
    first = number("start", start, least=-np.inf)
    b = number("averaging_rate", averaging_rate, least=0.0)
    std = number("label_std", label_std, least=0.0, strict=True)
    decay = number("weight_decay", weight_decay, least=0.0)

    def velocity(_: float, state: np.ndarray) -> np.ndarray:
        relaxation = 2 * np.cosh(state) / std
        pulled = np.tanh(state) if decoupled else 2 * np.sinh(state) / std
        return -np.tanh(state) / 2 * relaxation / (relaxation + b) - decay * pulled

    return _integrated(velocity, np.array([first]), _times(time))


@checked
def scalar_factorization_slow_adam(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    averaging_rate: float,
    label_std: float = 1.0,
    second_moments: Num[ArrayLike, "..."] | None = None,
) -> Curve:
    """s(t) for Adam (eps = 0) on f = x y whose second moments are slow, 1 - beta_2 = c eta^2.

    ``s' = -(d^2/2) p q (q x^2 - p y^2)/(p y^2 + q x^2)`` with p, q = v^{-1/2}, and
    ``v' = c (d^2 (y^2, x^2) - v)``. With the bias correction v begins at 0 and is divided by
    ``1 - e^{-c t}``: p, q are then right from the start, and depend on all of the way so far.

    Args:
        start: s_0 = ln x where the descent lands.
        time: t >= 0 on the clock k eta^2, any shape.
        averaging_rate: c = (1 - beta_2)/eta^2 > 0.
        label_std: d > 0.
        second_moments: v at time 0, two positive numbers, for Adam without bias correction; by
            default with it.

    Returns:
        s(t) in float64, of the shape of `time`.
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
        seen = moments if is_corrected and t == 0 else seen
        p, q = seen**-0.5
        pulls = q * np.exp(2 * s), p * np.exp(-2 * s)
        slope = -variance / 2 * p * q * (pulls[0] - pulls[1]) / (pulls[0] + pulls[1])
        return np.append(slope, c * (moments - v))

    return _integrated(velocity, np.append(first, begin), _times(time))


@checked
def scale_invariant_norm(
    start: float,
    time: Num[ArrayLike, "..."],
    *,
    trace: float,
    noise_constant: float = 1.0,
    weight_decay: float = 0.0,
) -> Curve:
    """|theta| for a scale-invariant loss: ``r^4 = ch/2w + (r_0^4 - ch/2w) e^{-4wt}``.

    Noise of covariance c H, which is orthogonal to theta, drives the norm up and decay pulls it
    down: ``Y' = -(c/4) P grad tr H - w Y`` with ``tr H(theta) = h/r^2``. Exact where h, the trace
    at norm 1, is the same all along the way; without decay ``r^4 = r_0^4 + 2 c h t``.

    Args:
        start: r_0 > 0, the norm at which gradient flow lands.
        time: t >= 0 on the clock k eta^2, any shape.
        trace: h >= 0, the trace of the Hessian at theta/|theta|.
        noise_constant: c >= 0 of the gradient noise c H.
        weight_decay: w = lambda/eta >= 0.

    Returns:
        r(t) in float64, of the shape of `time`.
    """
    fourth = number("start", start, least=0.0, strict=True) ** 4
    times = _times(time)
    h, c = number("trace", trace, least=0.0), number("noise_constant", noise_constant, least=0.0)
    w = number("weight_decay", weight_decay, least=0.0)
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
    """The first component of the solution of an ordinary differential equation, at some times."""
    # Here, since scipy is slow to import and only some oracles need it.
    from scipy.integrate import solve_ivp

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
