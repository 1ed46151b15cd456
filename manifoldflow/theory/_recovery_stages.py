"""The stages in which gradient descent on ⟨b⊙b, x⟩ finds a sparse truth from a small start.

Notation: w = b⊙b the weights, S the r features that count, G = XᵀX/n. On S the signal is b, off S
the noise is b. One step multiplies b by 1 − ηm with m = G(w − w*), which is that of the population
loss, w − w*, up to errors that δ bounds.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import finite, matrix, number, times_of, vector


class RecoveryStages(NamedTuple):
    """The stages in which gradient descent from b = α·1 finds a 0-1 truth, in steps.

    Attributes:
        scale: α.
        learning_rate: η.
        distortion: δ, the largest |entry| of XᵀX/n − I.
        drift_error: ρ, a bound on the error of a coordinate's growth rate, relative to the
            population, as long as the noise is at most 2α.
        half_steps: steps after which every signal is above ½; inf if nothing is shown.
        fit_steps: steps after which every signal is within ρ of √(1 − ρ), of the order
            ln(1/(αρ))/η; inf if nothing is shown.
        noise_steps: steps up to which the noise is at most 2α, ln 2/ln(1 + ηρ); 0 if nothing is
            shown.
        error: a bound of ‖b⊙b − w*‖² from `fit_steps` to `noise_steps`.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> stages = theory.recovery_stages(
        ...     2 * np.eye(4), np.eye(4)[0], scale=0.01, learning_rate=0.1
        ... )
        >>> stages.is_shown, stages.half_steps, stages.signal_bounds(2).shape
        (True, 55, (2, 3))
    """

    scale: float
    learning_rate: float
    distortion: float
    drift_error: float
    half_steps: float
    fit_steps: float
    noise_steps: float
    error: float

    @property
    def is_shown(self) -> bool:
        """True where the signal is there before the noise may have grown, so the truth is found."""
        return self.fit_steps <= self.noise_steps

    def signal_bounds(self, num_steps: int) -> Float[np.ndarray, "2 steps"]:
        """Lower and upper bounds of every signal after 0, 1, …, num_steps steps.

        They take the steps r ← r + ηr(1 − r² ∓ ρ), and hold up to `noise_steps`.

        Args:
            num_steps: ≥ 0.

        Returns:
            Shape (2, num_steps + 1).
        """
        bounds = np.full((2, num_steps + 1), self.scale)
        errors = self.drift_error * np.array([-1.0, 1.0])
        for step in range(num_steps):
            r = bounds[:, step]
            bounds[:, step + 1] = r + self.learning_rate * r * (1 - r**2 + errors)
        return bounds

    def noise_bound(self, steps: Num[ArrayLike, "..."]) -> Float[np.ndarray, "..."]:
        """The bound α(1 + ηρ)ᵗ of a coordinate off S after t steps, up to `noise_steps`.

        So the noise ζ has ‖ζ‖² ≤ α²(d − r)(1 + ηρ)²ᵗ.

        Args:
            steps: t ≥ 0, any shape.
        """
        return self.scale * (1 + self.learning_rate * self.drift_error) ** np.asarray(steps, float)


@checked_concrete
def recovery_stages(
    inputs: Num[ArrayLike, "..."],
    truth: Num[ArrayLike, "..."],
    *,
    scale: float,
    learning_rate: float,
) -> RecoveryStages:
    """The stages in which gradient descent on (1/4n)Σᵢ(yᵢ − ⟨b⊙b, xᵢ⟩)² finds a 0-1 truth.

    It starts at b = α·1, with exact targets y = Xw* and w* of r ones. With δ the largest |entry| of
    XᵀX/n − I and ρ = rδ + 4α² + 4α²(d − r)δ:

    - The noise has |bⱼ| ≤ α(1 + ηρ)ᵗ off S, so it is at most 2α for ln 2/ln(1 + ηρ) steps.
    - The signal till then has |rₜ₊₁ − (1 + η(1 − rₜ²))rₜ| ≤ ηρrₜ, so it passes ½ after
      ln(1/2α)/ln(1 + η(¾ − ρ)) steps and is within ρ of √(1 − ρ) another 2ln(1/2ρ)/η steps later.
    - The error is ‖b⊙b − w*‖² ≤ 9rρ² + 16α⁴(d − r) from then on.

    For Gaussian inputs δ is of the order √(ln d/n). Nothing is shown where ρ ≥ ½: times are then
    inf, and 0 for the noise.

    Args:
        inputs: X, shape (n, d), with entries of variance 1.
        truth: w*, shape (d,), zeros and ones.
        scale: α, the start, in (0, ½).
        learning_rate: η > 0, at most 1/(2 + 4ρ); ¼ always serves.

    Returns:
        A `RecoveryStages`.

    Raises:
        ValueError: a wrong shape; a value out of range; a truth of other numbers.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> stages = theory.recovery_stages(
        ...     2 * np.eye(4), np.eye(4)[0], scale=0.01, learning_rate=0.1
        ... )
        >>> print(stages.half_steps, stages.fit_steps, stages.noise_steps, f"{stages.error:.1e}")
        55 195 17329 1.9e-06

    References:
        [Ma2022, Theorem 9.14, Lemmas 9.16 and 9.17]. Printed there are δ for r = 1 from a condition
        on single columns, which does not bound it; a time α·ln(1/δ)/η; and a growth of ‖ζ‖² with
        the exponent t from α√d.
    """
    x = matrix("inputs", inputs)
    w = vector("truth", truth, x.shape[1])
    alpha = number("scale", scale, least=0.0, strict=True)
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    r, size = int(np.sum(w)), len(w)
    if not np.all((w == 0) | (w == 1)) or r == 0:
        raise ValueError(f"truth: got {np.unique(w)[:5]}, expected zeros and ones, at least one.")
    if alpha >= 0.5:
        raise ValueError(f"scale: got {alpha}, expected less than 1/2; start nearer to 0.")
    delta = float(np.max(np.abs(x.T @ x / len(x) - np.eye(size))))
    rho = r * delta + 4 * alpha**2 * (1 + (size - r) * delta)
    if rho >= 0.5:
        return RecoveryStages(alpha, eta, delta, rho, math.inf, math.inf, 0.0, math.inf)
    if eta > 1 / (2 + 4 * rho):
        raise ValueError(
            f"learning_rate: got {eta}, expected at most {1 / (2 + 4 * rho):.4g}, up to which a "
            "larger signal stays the larger one."
        )
    half = math.ceil(math.log(1 / (2 * alpha)) / math.log1p(eta * (0.75 - rho)))
    fit = half + math.ceil(math.log(1 / (2 * rho)) / -math.log1p(-eta / 2))
    noise = math.floor(math.log(2) / math.log1p(eta * rho))
    error = 9 * r * rho**2 + 16 * alpha**4 * (size - r)
    return RecoveryStages(alpha, eta, delta, rho, half, fit, noise, error)


@checked_concrete
def quadratically_parametrized_flow(
    weights: Num[ArrayLike, "..."],
    start: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
) -> Float[np.ndarray, "*times d"]:
    """The gradient flow b(t) of the population loss of ⟨b⊙b, x⟩, in closed form.

    With E[xxᵀ] = I the loss is ¼‖b⊙b − w*‖², and each coordinate goes its own way: b′ = (w* − b²)b.
    So b² is logistic,

        b(t)² = w*b₀²/(b₀² + (w* − b₀²)e^{−2w*t}),

    and b₀²/(1 + 2b₀²t) where w* = 0. The sign of b stays.

    Args:
        weights: w*, shape (d,), of any sign; where it is negative b falls to 0.
        start: b₀, shape (d,).
        time: t ≥ 0 of gradient flow, learning rate times steps, finite: a scalar, or shape (m,).

    Returns:
        b(t) in float64, shape (d,) or (m, d).

    Raises:
        ValueError: a wrong shape, or a value that is not finite.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> theory.quadratically_parametrized_flow(
        ...     np.array([1.0]), np.array([0.001]), time=np.array([0.0, 20.0])
        ... ).round(3).tolist()
        [[0.001], [1.0]]

    References:
        [Ma2022, Theorem 9.13].
    """
    w = finite("weights", weights)
    if w.ndim != 1 or w.size == 0:
        raise ValueError(f"weights: got shape {w.shape}, expected (d,); flatten it.")
    b, t = vector("start", start, len(w)), times_of(time)[..., None]
    x = 2.0 * w * t
    b = np.broadcast_to(b, x.shape)
    # e^{-x} = inf is meant: a negative weight sends b to 0, and where b is 0 it does not count.
    with np.errstate(over="ignore", invalid="ignore"):
        decayed = np.exp(-x)
        # (1 - e^{-x})/x, 1 where x = 0.
        grown = np.where(x == 0.0, 1.0, -np.expm1(-x) / np.where(x == 0.0, 1.0, x))
        size = np.hypot(np.sqrt(decayed), np.abs(b) * np.sqrt(2.0 * t * grown))
        return np.where(b == 0.0, 0.0, b / size)
