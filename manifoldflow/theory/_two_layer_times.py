"""Bounds on the time in which two-layer networks become flat, also in steps [Gatmiry2024].

Three stretches follow each other. Gradient flow lands on the zero-loss manifold; the flow θ′ = −P∇F
makes its gradient small; from then on all features approach each other exponentially. SGD takes
them one after the other, each on a clock of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import matrix, number


@checked_concrete
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
    """The latest time at which the features come within `accuracy` of `two_layer_minimizer`.

    It is F/(μβ²) + ln(max(β²/(ϱ₁²ϱ₂²ε²), 1))/(ϱ₁ϱ₂μ) in the time of θ′ = −P∇F with F = Σᵢⱼ
    φ′(θⱼᵀxᵢ)²‖xᵢ‖². On the limit clock of label noise, with tr ∇²L = 2F, it is 2/c times that.
    `label_noise_num_steps` counts steps.

    Args:
        flatness: F at the start.
        accuracy: ε > 0, of each feature.
        coherence: μ > 0 of the inputs.
        normality: β > 0 with β|φ″| ≤ φ′²φ‴.
        slope: ϱ₁ > 0, a lower bound of φ′.
        third_derivative: ϱ₂ > 0, a lower bound of φ‴.
        least_flatness: a lower bound of F; only what is above it counts.
        halved: True halves the logarithm. The squared gradient falls at the rate 2ϱ₁ϱ₂μ, so half of
            it is enough; the theorem is printed with all of it.

    Returns:
        The time, a Python float.

    Raises:
        ValueError: a bound that is not positive; a least flatness above the flatness.

    Assumes:
        inputs of norm 1, and the bounds on all features on the way: see `coherence` and
        `activation_constants`.

    Examples:
        >>> from manifoldflow import theory
        >>> bounds = {"coherence": 1.0, "normality": 2.0, "slope": 1.0, "third_derivative": 1.0}
        >>> print(round(theory.simplicity_time_bound(4.0, 0.02, **bounds), 3))  # 1 + ln 10⁴
        10.21

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


@checked_concrete
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
    """The latest time from which on the norm of P∇F stays below `accuracy`.

    It is F/(μβ²) + ln(max(μβ²/ε², 1))/(ϱ₁ϱ₂μ), in the time of `simplicity_time_bound`.

    Args:
        flatness: F at the start.
        accuracy: ε > 0, of the norm of the Riemannian gradient of F.
        coherence: μ > 0 of the inputs.
        normality: β > 0 with β|φ″| ≤ φ′²φ‴.
        slope: ϱ₁ > 0, a lower bound of φ′.
        third_derivative: ϱ₂ > 0, a lower bound of φ‴.
        least_flatness: a lower bound of F; only what is above it counts.
        halved: True halves the logarithm, which is still a bound.

    Returns:
        The time, a Python float.

    Raises:
        ValueError: a bound that is not positive; a least flatness above the flatness.

    Assumes:
        what `simplicity_time_bound` does.

    Examples:
        >>> from manifoldflow import theory
        >>> bounds = {"coherence": 1.0, "normality": 2.0, "slope": 1.0, "third_derivative": 1.0}
        >>> theory.stationarity_time_bound(4.0, 2.0, **bounds)
        1.0

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
    # Above this gradient F falls at least at the rate μβ²; below it F is convex.
    threshold = math.sqrt(mu) * beta
    logarithm = max(2 * (math.log(threshold) - math.log(eps)), 0.0)
    return (start - least) / threshold**2 + logarithm / (2 * rate if halved else rate)


@checked_concrete
def landing_time_bound(
    loss: float, accuracy: float, *, width: int, coherence: float, slope: float
) -> float:
    """The latest time at which gradient flow has lowered the loss to `accuracy`.

    It is ln(max(L/ε, 1))/C with C = 4mμϱ₁², in the time of θ′ = −∇L.

    Args:
        loss: L at the start, the sum of squares.
        accuracy: ε > 0, of the loss.
        width: m, the number of neurons.
        coherence: μ > 0 of the inputs.
        slope: ϱ₁ > 0, a lower bound of φ′.

    Returns:
        The time, a Python float.

    Raises:
        ValueError: a number out of its range.

    Examples:
        >>> from manifoldflow import theory
        >>> print(
        ...     round(theory.landing_time_bound(1.0, 1e-6, width=10, coherence=0.5, slope=1.0), 3)
        ... )
        0.691

    References:
        [Gatmiry2024, Lemma 11].
    """
    start = number("loss", loss, least=0.0)
    eps = number("accuracy", accuracy, least=0.0, strict=True)
    rate = _dominance(width, coherence, slope)
    return (math.log(start) - math.log(eps)) / rate if start > eps else 0.0


@checked_concrete
def landing_distance_bound(
    loss: float, time: float = 0.0, *, width: int, coherence: float, slope: float
) -> float:
    """A bound on the distance of gradient flow from the point where it lands.

    It is (2/√C)·e^{−Ct/2}·√L with C = 4mμϱ₁², after the time t of θ′ = −∇L from a start of loss L.

    Args:
        loss: L at the start, the sum of squares.
        time: t ≥ 0.
        width: m, the number of neurons.
        coherence: μ > 0 of the inputs.
        slope: ϱ₁ > 0, a lower bound of φ′.

    Returns:
        The distance, a Python float.

    Raises:
        ValueError: a number out of its range.

    Examples:
        >>> from manifoldflow import theory
        >>> print(theory.landing_distance_bound(4.0, width=4, coherence=1.0, slope=1.0))
        1.0

    References:
        [Gatmiry2024, (32)].
    """
    rate = _dominance(width, coherence, slope)
    start = number("loss", loss, least=0.0)
    decay = math.exp(-rate * number("time", time, least=0.0) / 2)
    return 2 * decay * math.sqrt(start / rate)


@checked_concrete
def landed_flatness_bound(
    features: Num[ArrayLike, "..."],
    loss: float,
    activation: Callable[[Any], Any],
    *,
    coherence: float,
    slope: float,
) -> float:
    """A bound on F at the point where gradient flow lands, for the time bounds.

    It is Σᵢⱼ φ′(zᵢⱼ)² + Σᵢ maxⱼ[φ′(zᵢⱼ ± √m·R)² − φ′(zᵢⱼ)²] with the `landing_distance_bound` R:
    the features on one example move by √m·R in all.

    Args:
        features: zᵢⱼ = θⱼᵀxᵢ at the start, shape (m, n): one row for each neuron.
        loss: L at the start, the sum of squares.
        activation: φ, number → number, a JAX function.
        coherence: μ > 0 of the inputs.
        slope: ϱ₁ > 0, a lower bound of φ′.

    Returns:
        The bound, a Python float.

    Raises:
        ValueError: a wrong shape, or a number out of its range.

    Assumes:
        inputs of norm 1, and a convex φ′², as it is where φ′ and φ‴ are positive.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> options = {"coherence": 1.0, "slope": 1.0}
        >>> print(
        ...     theory.landed_flatness_bound(np.array([[0.0]]), 0.0, lambda z: z**3 + z, **options)
        ... )
        1.0

    References:
        [Gatmiry2024, Lemma 11], whose proof has R for √m·R.
    """
    z = matrix("features", features)
    distance = landing_distance_bound(loss, width=len(z), coherence=coherence, slope=slope)
    reach = math.sqrt(len(z)) * distance
    compiled = jax.jit(jax.vmap(jax.grad(lambda z: activation(z))))  # modules have no hash

    def squares(z: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(compiled(z.ravel())).reshape(z.shape) ** 2

    here = squares(z)
    # φ′² is convex, so its maximum over an interval is at one of the ends.
    rise = np.maximum(squares(z + reach), squares(z - reach)) - here
    return float(np.sum(here) + np.sum(np.max(rise, axis=0)))


@checked_concrete
def label_noise_num_steps(
    time: float,
    *,
    learning_rate: float,
    label_variance: float,
    batch_fraction: float = 1.0,
    landing_time: float = 0.0,
) -> int:
    """The number of steps of SGD with label noise that take a time of the flow θ′ = −P∇F.

    It is ⌈t₀/η⌉ + ⌈tb/(δ²η²)⌉: first the time t₀ of gradient flow, on the clock kη, then the time
    t, in which k steps make δ²kη²/b.

    Args:
        time: t ≥ 0, as from `simplicity_time_bound`.
        learning_rate: η > 0, of steps on L = Σᵢ(fᵢ − yᵢ)².
        label_variance: δ² > 0, of the noise on each label.
        batch_fraction: b = B/N in (0, 1], the share of the examples in a batch.
        landing_time: t₀ ≥ 0, as from `landing_time_bound`.

    Returns:
        The number of steps, a Python integer.

    Raises:
        ValueError: a number out of its range.

    Assumes:
        a learning rate so small that SGD is close to its limit, and fresh noise at each step.

    Examples:
        >>> from manifoldflow import theory
        >>> theory.label_noise_num_steps(
        ...     2.0, learning_rate=0.01, label_variance=1.0, landing_time=1.0
        ... )
        20100

    References:
        [Gatmiry2024, Theorem 1; LiWangArora2022, Corollary 5.2].
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
    # Divided one by one, since η² may underflow.
    return _whole(landing, number("time", time, least=0.0) * fraction / variance / eta / eta)


@checked_concrete
def sharpness_aware_num_steps(
    time: float, *, learning_rate: float, radius: float, landing_time: float = 0.0
) -> int:
    """The number of steps of 1-SAM that take a time of the flow θ′ = −P∇F.

    It is ⌈t₀/η⌉ + ⌈t/(ηρ²)⌉. 1-SAM, with one example in a batch, follows half the gradient of tr
    ∇²L = 2F on the clock kηρ². It needs no noise on the labels.

    Args:
        time: t ≥ 0, as from `simplicity_time_bound`.
        learning_rate: η > 0, of steps on L = Σᵢ(fᵢ − yᵢ)².
        radius: ρ > 0, the length of a climb.
        landing_time: t₀ ≥ 0, as from `landing_time_bound`.

    Returns:
        The number of steps, a Python integer.

    Raises:
        ValueError: a number out of its range.

    Assumes:
        a learning rate and a radius so small that 1-SAM is close to its limit.

    Examples:
        >>> from manifoldflow import theory
        >>> theory.sharpness_aware_num_steps(
        ...     2.0, learning_rate=0.125, radius=0.25, landing_time=1.0
        ... )
        264

    References:
        [Gatmiry2024, Theorem 1; WenMaLi2023].
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
    """The constant C with ‖∇L‖² ≥ C·L everywhere [Gatmiry2024, Lemma 12]."""
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
