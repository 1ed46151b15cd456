"""Two-layer networks: how long flatness takes at most, in flow time and in steps [Gatmiry2024].

Three stretches: gradient flow lands on the zero-loss manifold, the flow θ' = −P∇F makes its
gradient small, and from then on all features close in exponentially. SGD takes them one after
the other, each on a clock of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import matrix, number


@checked
def simplicity_time_bound(
    flatness: float,
    accuracy: float,
    *,
    coherence: float,
    normality: float,
    slope: float,
    third_derivative: float,
    least_flatness: float = 0.0,
    halved: bool = False,
) -> float:
    """When the features are within `accuracy` of `two_layer_minimizer`, at the latest.

    ``F/(mu beta^2) + ln(beta^2/(rho_1^2 rho_2^2 eps^2) v 1)/(rho_1 rho_2 mu)`` in the time of
    ``theta' = -P grad F`` with ``F = sum_ij phi'(theta_j' x_i)^2 |x_i|^2``; on the limit clock of
    label noise, with tr H = 2 F, it is 2/c times that. `label_noise_num_steps` counts steps.

    Args:
        flatness: F at the start.
        accuracy: eps > 0, of each feature.
        coherence: mu of the inputs.
        normality: beta with ``beta |phi''| <= phi'^2 phi'''``.
        slope: rho_1 > 0, a lower bound of phi'.
        third_derivative: rho_2 > 0, a lower bound of phi'''.
        least_flatness: a number that F does not fall below; only what is above it counts.
        halved: whether to halve the logarithm. The squared gradient falls at the rate
            2 rho_1 rho_2 mu, so half of it is enough; the theorem is printed with all of it.

    Raises:
        ValueError: a bound that is not positive; a least flatness above the flatness.

    Assumes:
        inputs of norm 1, and the bounds on all features on the way: see `coherence` and
        `activation_constants`.

    References:
        [Gatmiry2024, Theorem 3].
    """
    mu = number("coherence", coherence, least=0.0, strict=True)
    rates = number("slope", slope, least=0.0, strict=True) * number(
        "third_derivative", third_derivative, least=0.0, strict=True
    )
    # A gradient of this norm keeps every feature within the accuracy [Lemma 6].
    small = number("accuracy", accuracy, least=0.0, strict=True) * math.sqrt(mu) * rates
    return stationarity_time_bound(
        flatness,
        small,
        coherence=mu,
        normality=normality,
        slope=slope,
        third_derivative=third_derivative,
        least_flatness=least_flatness,
        halved=halved,
    )


@checked
def stationarity_time_bound(
    flatness: float,
    accuracy: float,
    *,
    coherence: float,
    normality: float,
    slope: float,
    third_derivative: float,
    least_flatness: float = 0.0,
    halved: bool = False,
) -> float:
    """When the norm of P grad F is below `accuracy` and stays there, at the latest.

    ``F/(mu beta^2) + ln(mu beta^2/eps^2 v 1)/(rho_1 rho_2 mu)``, as `simplicity_time_bound`.

    Args:
        flatness: F at the start.
        accuracy: eps > 0, of the norm of the Riemannian gradient of F.
        coherence: mu of the inputs.
        normality: beta with ``beta |phi''| <= phi'^2 phi'''``.
        slope: rho_1 > 0, a lower bound of phi'.
        third_derivative: rho_2 > 0, a lower bound of phi'''.
        least_flatness: a number that F does not fall below; only what is above it counts.
        halved: whether to halve the logarithm, as the rate that holds allows.

    Raises:
        ValueError: a bound that is not positive; a least flatness above the flatness.

    Assumes:
        what `simplicity_time_bound` does.

    References:
        [Gatmiry2024, (16)].
    """
    start = number("flatness", flatness, least=0.0)
    least = number("least_flatness", least_flatness, least=0.0)
    if least > start:
        raise ValueError(
            f"least_flatness: got {least:.6g}, expected at most the flatness at the start, "
            f"{start:.6g}; give F at the flattest fit."
        )
    eps = number("accuracy", accuracy, least=0.0, strict=True)
    mu = number("coherence", coherence, least=0.0, strict=True)
    beta = number("normality", normality, least=0.0, strict=True)
    rate = number("slope", slope, least=0.0, strict=True) * mu
    rate *= number("third_derivative", third_derivative, least=0.0, strict=True)
    # Above this gradient F falls at least at the rate mu beta^2; below it F is convex.
    threshold = math.sqrt(mu) * beta
    logarithm = max(2 * (math.log(threshold) - math.log(eps)), 0.0)
    return (start - least) / threshold**2 + logarithm / (2 * rate if halved else rate)


@checked
def landing_time_bound(
    loss: float, accuracy: float, *, width: int, coherence: float, slope: float
) -> float:
    """When gradient flow has lowered the loss to `accuracy`, at the latest.

    ``ln(L/eps v 1)/C`` with ``C = 4 m mu rho_1^2``, in the time of ``theta' = -grad L``.

    Args:
        loss: L at the start, the sum of squares.
        accuracy: eps > 0, of the loss.
        width: m, the number of neurons.
        coherence: mu of the inputs.
        slope: rho_1 > 0, a lower bound of phi'.

    Raises:
        ValueError: a number out of its range.

    References:
        [Gatmiry2024, Lemma 11].
    """
    start = number("loss", loss, least=0.0)
    eps = number("accuracy", accuracy, least=0.0, strict=True)
    rate = _dominance(width, coherence, slope)
    return (math.log(start) - math.log(eps)) / rate if start > eps else 0.0


@checked
def landing_distance_bound(
    loss: float, time: float = 0.0, *, width: int, coherence: float, slope: float
) -> float:
    """How far gradient flow is from the point where it lands, at most.

    ``(2/sqrt(C)) e^(-C t/2) sqrt(L)`` with ``C = 4 m mu rho_1^2``, after the time t of
    ``theta' = -grad L`` from a start of loss L.

    Args:
        loss: L at the start, the sum of squares.
        time: t >= 0.
        width: m, the number of neurons.
        coherence: mu of the inputs.
        slope: rho_1 > 0, a lower bound of phi'.

    Raises:
        ValueError: a number out of its range.

    References:
        [Gatmiry2024, (32)].
    """
    rate = _dominance(width, coherence, slope)
    start = number("loss", loss, least=0.0)
    decay = math.exp(-rate * number("time", time, least=0.0) / 2)
    return 2 * decay * math.sqrt(start / rate)


@checked
def landed_flatness_bound(
    features: Num[ArrayLike, "..."],
    loss: float,
    activation: Callable[[Any], Any],
    *,
    coherence: float,
    slope: float,
) -> float:
    """F where gradient flow lands, at most: what the time bounds need of a start with a loss.

    ``sum_ij phi'(z_ij)^2 + sum_i max_j [phi'(z_ij +- sqrt(m) R)^2 - phi'(z_ij)^2]`` where R is the
    `landing_distance_bound`: the features on one example move by sqrt(m) R in all.

    Args:
        features: z_ij = theta_j' x_i at the start, shape (m, n): one row for each neuron.
        loss: L at the start, the sum of squares.
        activation: phi, number -> number, a JAX function.
        coherence: mu of the inputs.
        slope: rho_1 > 0, a lower bound of phi'.

    Raises:
        ValueError: a wrong shape, a number out of its range.

    Assumes:
        inputs of norm 1, and a convex phi'^2, as it is where phi' and phi''' are positive.

    References:
        [Gatmiry2024, Lemma 11], whose proof has R for sqrt(m) R.
    """
    z = matrix("features", features)
    distance = landing_distance_bound(loss, width=len(z), coherence=coherence, slope=slope)
    reach = math.sqrt(len(z)) * distance
    compiled = jax.jit(jax.vmap(jax.grad(lambda z: activation(z))))  # modules have no hash

    def squares(z: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(compiled(z.ravel())).reshape(z.shape) ** 2

    here = squares(z)
    rise = np.maximum(squares(z + reach), squares(z - reach)) - here
    return float(np.sum(here) + np.sum(np.max(rise, axis=0)))


@checked
def label_noise_num_steps(
    time: float,
    *,
    learning_rate: float,
    label_variance: float,
    batch_fraction: float = 1.0,
    landing_time: float = 0.0,
) -> int:
    """How many steps of SGD with label noise take a time of the flow ``theta' = -P grad F``.

    ``ceil(t_0/eta) + ceil(t b/(delta^2 eta^2))``: first the time t_0 of gradient flow, on the
    clock k eta, then the time t, of which k steps make ``delta^2 k eta^2/b``.

    Args:
        time: t, as from `simplicity_time_bound`.
        learning_rate: eta > 0, of steps on ``L = sum_i (f_i - y_i)^2``.
        label_variance: delta^2 > 0, of the noise on each label.
        batch_fraction: b = B/N in (0, 1], what part of the examples is in a batch.
        landing_time: t_0, as from `landing_time_bound`.

    Raises:
        ValueError: a number out of its range.

    Assumes:
        a learning rate so small that SGD is close to its limit, and fresh noise at each step.

    References:
        [Gatmiry2024, Theorem 1], [LiWangArora2022, Corollary 5.2].
    """
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    variance = number("label_variance", label_variance, least=0.0, strict=True)
    fraction = number("batch_fraction", batch_fraction, least=0.0, strict=True)
    if fraction > 1.0:
        raise ValueError(
            f"batch_fraction: got {fraction:.6g}, expected B/N, at most 1; divide the batch size "
            "by the number of examples."
        )
    landing = number("landing_time", landing_time, least=0.0) / eta
    return _whole(landing, number("time", time, least=0.0) * fraction / variance / eta / eta)


@checked
def sharpness_aware_num_steps(
    time: float, *, learning_rate: float, radius: float, landing_time: float = 0.0
) -> int:
    """How many steps of 1-SAM take a time of the flow ``theta' = -P grad F``.

    ``ceil(t_0/eta) + ceil(t/(eta rho^2))``: 1-SAM, with one example in a batch, follows half the
    gradient of ``tr H = 2 F`` on the clock k eta rho^2. It needs no noise on the labels.

    Args:
        time: t, as from `simplicity_time_bound`.
        learning_rate: eta > 0, of steps on ``L = sum_i (f_i - y_i)^2``.
        radius: rho > 0, the length of a climb.
        landing_time: t_0, as from `landing_time_bound`.

    Raises:
        ValueError: a number out of its range.

    Assumes:
        a learning rate and a radius so small that 1-SAM is close to its limit.

    References:
        [Gatmiry2024, Theorem 1], [WenMaLi2023].
    """
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    rho = number("radius", radius, least=0.0, strict=True)
    landing = number("landing_time", landing_time, least=0.0) / eta
    return _whole(landing, number("time", time, least=0.0) / eta / rho / rho)


def _whole(*counts: float) -> int:
    """The sum of counts, each rounded up."""
    if not math.isfinite(sum(counts)):
        raise ValueError(
            "learning_rate: got one for which the number of steps is infinite, expected a larger "
            "one; raise it, or ask for a shorter time."
        )
    return sum(math.ceil(count) for count in counts)


def _dominance(width: int, coherence: float, slope: float) -> float:
    """C with |grad L|^2 >= C L everywhere [Gatmiry2024, Lemma 12]."""
    m = checked_count("width, the number of neurons,", width)
    mu = number("coherence", coherence, least=0.0, strict=True)
    least = number("slope", slope, least=0.0, strict=True)
    constant = 4 * int(m) * mu * least * least
    if not 0 < constant < math.inf:
        raise ValueError(
            f"slope: got {least:.6g}, expected one whose square is in the range of floats; rescale "
            "the activation."
        )
    return constant
