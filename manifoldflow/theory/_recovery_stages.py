"""Gradient descent on ``<b * b, x>`` from a small start: in which stages it finds a sparse truth.

Notation: ``w = b * b`` the weights, S the r features that count, ``G = X'X/n``. On S the signal is
b, off S the noise is b. One step multiplies b by ``1 - eta m`` with ``m = G (w - w*)``, which is
that of the population loss, ``w - w*``, up to errors that delta bounds.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import finite, matrix, number, times_of, vector


class RecoveryStages(NamedTuple):
    """When gradient descent from ``b = alpha 1`` has found a 0-1 truth, and what holds till then.

    Attributes:
        scale: alpha.
        learning_rate: eta.
        distortion: delta, the largest entry of ``X'X/n - I`` in size.
        drift_error: rho, by which a coordinate's growth rate differs at most from its own in the
            population, as long as the noise is at most 2 alpha.
        half_steps: steps after which every signal is above 1/2; inf if nothing is shown.
        fit_steps: steps after which every signal is within rho of ``sqrt(1 - rho)``, of the order
            ``log(1/(alpha rho))/eta``; inf if nothing is shown.
        noise_steps: steps up to which the noise is at most 2 alpha, ``log 2/log(1 + eta rho)``; 0
            if nothing is shown.
        error: a bound of ``|b * b - w*|^2`` from `fit_steps` up to `noise_steps`.
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
        """Whether the signal is there before the noise may have grown: then the truth is found."""
        return self.fit_steps <= self.noise_steps

    def signal_bounds(self, num_steps: int) -> Float[np.ndarray, "2 steps"]:
        """Between what every signal lies after 0, 1, ..., num_steps steps, up to `noise_steps`.

        The steps ``r <- r + eta r (1 - r^2 -+ rho)``.
        """
        bounds = np.full((2, num_steps + 1), self.scale)
        errors = self.drift_error * np.array([-1.0, 1.0])
        for step in range(num_steps):
            r = bounds[:, step]
            bounds[:, step + 1] = r + self.learning_rate * r * (1 - r**2 + errors)
        return bounds

    def noise_bound(self, steps: Num[ArrayLike, "..."]) -> Float[np.ndarray, "..."]:
        """``alpha (1 + eta rho)^t``, what a coordinate off S is at most up to `noise_steps`.

        So the noise has ``|zeta|^2 <= alpha^2 (d - r) (1 + eta rho)^(2t)``.
        """
        return self.scale * (1 + self.learning_rate * self.drift_error) ** np.asarray(steps, float)


@checked
def recovery_stages(
    inputs: Num[ArrayLike, "..."],
    truth: Num[ArrayLike, "..."],
    *,
    scale: float,
    learning_rate: float,
) -> RecoveryStages:
    """In which stages gradient descent on ``(1/4n) sum_i (y_i - <b * b, x_i>)^2`` finds the truth.

    From ``b = alpha 1`` with exact targets ``y = X w*`` and ``w*`` of r ones. With delta the
    largest entry of ``X'X/n - I`` and ``rho = r delta + 4 alpha^2 + 4 alpha^2 (d - r) delta``:

    - the noise: ``|b_j| <= alpha (1 + eta rho)^t`` off S, at most 2 alpha for ``log 2/log(1 + eta
      rho)`` steps;
    - the signal: till then ``|r_{t+1} - (1 + eta (1 - r_t^2)) r_t| <= eta rho r_t``, so that it
      passes 1/2 after ``log(1/2 alpha)/log(1 + eta (3/4 - rho))`` steps and is within rho of
      ``sqrt(1 - rho)`` another ``2 log(1/2 rho)/eta`` steps later;
    - then ``|b * b - w*|^2 <= 9 r rho^2 + 16 alpha^4 (d - r)``.

    Of Gaussian inputs delta is of the order ``sqrt(log d/n)``. Nothing is shown where rho is 1/2 or
    more: times are then inf, and 0 for the noise.

    Args:
        inputs: X, shape (n, d), with entries of variance 1.
        truth: w*, shape (d,), zeros and ones.
        scale: alpha, the start, between 0 and 1/2.
        learning_rate: eta, positive and at most ``1/(2 + 4 rho)``, so 1/4 always serves.

    Returns:
        `RecoveryStages`.

    Raises:
        ValueError: a wrong shape or a value out of range, a truth of other numbers.

    References:
        [Ma2022, Theorem 9.14, Lemmas 9.16 and 9.17]. Printed there are delta for r = 1 from a
        condition on single columns, which does not bound it; a time ``alpha log(1/delta)/eta``;
        and a growth of ``|zeta|^2`` with the exponent t from ``alpha sqrt(d)``.
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


@checked
def quadratically_parametrized_flow(
    weights: Num[ArrayLike, "..."],
    start: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
) -> Float[np.ndarray, "*times d"]:
    """Gradient flow on the population loss of ``<b * b, x>``, in closed form at every time.

    With ``E[x x'] = I`` the loss is ``|b * b - w*|^2/4``, and each coordinate goes its own way:
    ``b' = (w* - b^2) b``, so that ``b^2`` is logistic,

        b(t)^2 = w* b_0^2 / (b_0^2 + (w* - b_0^2) e^{-2 w* t}),

    and ``b_0^2/(1 + 2 b_0^2 t)`` where ``w* = 0``. The sign of b stays.

    Args:
        weights: w*, shape (d,), of any sign; where it is negative b falls to 0.
        start: b_0, shape (d,).
        time: time(s) of gradient flow, learning rate times steps, finite and >= 0: a scalar, or
            shape (m,).

    Returns:
        b(t) in float64, shape (d,) or (m, d).

    Raises:
        ValueError: a wrong shape or a value that is not finite.

    Example:
        >>> quadratically_parametrized_flow([1.0], [0.001], time=[0.0, 20.0]).round(3).tolist()
        [[0.001], [1.0]]

    References:
        [Ma2022, Theorem 9.13]
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
