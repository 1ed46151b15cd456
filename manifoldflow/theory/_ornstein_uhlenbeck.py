"""How SGD spreads about a minimum: the laws of its linearisation, at every time and in the end."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import matrix, number, semidefinite, times_of, vector


@checked
def ornstein_uhlenbeck_covariance(
    hessian: Num[ArrayLike, "..."],
    covariance: Num[ArrayLike, "..."],
    *,
    learning_rate: float,
    discrete: bool = False,
) -> Float[np.ndarray, "D D"]:
    """S, the stationary covariance of SGD near a minimum with this Hessian.

    In continuous time ``dX = -eta H X dt + eta F dW`` with ``F F' = Sigma``, so that ``H S + S H =
    eta Sigma``. SGD itself, ``X <- (I - eta H) X + eta xi``, has ``S = (I - eta H) S (I - eta H) +
    eta^2 Sigma`` exactly: ``discrete=True``. Label noise, ``Sigma = c H``, gives ``S = (eta c/2)
    P_perp`` and ``eta c (2 I - eta H)^{-1} P_perp``.

    Along directions in which the Hessian vanishes nothing pulls back; S is 0 there, and noise
    there is refused.

    Args:
        hessian: H, symmetric positive semidefinite.
        covariance: Sigma of the gradient noise, symmetric positive semidefinite.
        learning_rate: eta > 0.
        discrete: for the steps of SGD, not for the diffusion.

    Returns:
        S in float64.

    Raises:
        ValueError: wrong shapes, no symmetry, a negative eigenvalue, noise along a flat
            direction, or a learning rate at which SGD is unstable, ``eta lambda >= 2``.

    References:
        [Ma2022, chapter 9]; S. Mandt, M. Hoffman, D. Blei, JMLR 18 (2017).
    """
    h = _symmetric("hessian", hessian)
    sigma = semidefinite("covariance", _symmetric("covariance", covariance))
    if h.shape != sigma.shape:
        raise ValueError(f"hessian and covariance need one shape; got {h.shape} and {sigma.shape}.")
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    values, vectors = np.linalg.eigh(h)
    floor = len(h) * np.finfo(np.float64).eps * np.max(np.abs(values), initial=0.0)
    if values[0] < -100 * floor:
        raise ValueError(
            f"hessian: got the eigenvalue {values[0]:.3g}, expected none below 0; a saddle has no "
            "stationary covariance."
        )
    values = np.where(values > floor, values, 0.0)
    if discrete and eta * values[-1] >= 2.0:
        raise ValueError(
            f"learning_rate: got {eta}, expected less than 2 over the largest eigenvalue, "
            f"{2.0 / values[-1]:.6g}, from which on SGD is unstable."
        )
    turned = vectors.T @ sigma @ vectors
    is_flat = values == 0.0
    leak = np.max(np.abs(turned[is_flat]), initial=0.0)
    if leak > 1e-10 * np.max(np.abs(turned), initial=0.0):
        raise ValueError(
            f"covariance: got noise of size {leak:.3g} along directions in which the Hessian "
            "vanishes, expected none; it would grow for ever. Restrict both to the others."
        )
    rates = values[:, None] + values
    if discrete:
        rates = rates - eta * values[:, None] * values
    kept = ~(is_flat[:, None] | is_flat)
    spread = np.where(kept, eta * turned / np.where(kept, rates, 1.0), 0.0)
    return vectors @ spread @ vectors.T


class OrnsteinUhlenbeckLaw(NamedTuple):
    """A normal law at one time or at several, in float64.

    Attributes:
        mean: E X(t), shape (D,) or (m, D).
        covariance: Cov X(t), shape (D, D) or (m, D, D).
        autocovariance: Cov(X(t + lag), X(t)), of the same shape.
    """

    mean: Float[np.ndarray, "*times D"]
    covariance: Float[np.ndarray, "*times D D"]
    autocovariance: Float[np.ndarray, "*times D D"]


@checked
def ornstein_uhlenbeck_law(
    hessian: Num[ArrayLike, "..."],
    covariance: Num[ArrayLike, "..."],
    start: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
    learning_rate: float,
    lag: float = 0.0,
    discrete: bool = False,
) -> OrnsteinUhlenbeckLaw:
    """The law of SGD near a stationary point with this Hessian, at every time after a fixed start.

    Of ``dX = -eta H X dt + eta F dW`` with ``F F' = Sigma``, the point of zero gradient at 0: in an
    eigenbasis of H, with rates ``a_j = eta lambda_j``,

        E X(t) = e^{-a t} x_0,   Cov X(t)_jk = eta^2 Sigma_jk (1 - e^{-(a_j + a_k) t})/(a_j + a_k),
        Cov(X(t + lag), X(t)) = e^{-eta H lag} Cov X(t).

    SGD itself, ``X <- (I - eta H) X + eta xi``, has ``1 - a`` in place of ``e^{-a}`` and, exactly,
    ``Cov X(t)_jk = eta^2 Sigma_jk sum_{i < t} ((1 - a_j)(1 - a_k))^i``: ``discrete=True``.

    Where the Hessian vanishes this is Brownian motion, of covariance ``eta^2 Sigma t``; where it is
    negative, or a step of SGD is too long, the law spreads exponentially but exists at every time.
    Where there is a stationary law, `ornstein_uhlenbeck_covariance` gives it, the limit of large
    times.

    Args:
        hessian: H, symmetric, shape (D, D).
        covariance: Sigma of the gradient noise, symmetric positive semidefinite.
        start: x_0, shape (D,), less the stationary point.
        time: t in steps, finite and >= 0: a scalar, or shape (m,).
        learning_rate: eta > 0.
        lag: in steps, >= 0.
        discrete: for the steps of SGD, with whole times and lag, not for the diffusion.

    Returns:
        `OrnsteinUhlenbeckLaw`.

    Raises:
        ValueError: wrong shapes, no symmetry, a value out of range, fractions of steps, or a law
            that has spread beyond the range of floats.

    References:
        [Ma2022, section 9.5]
    """
    h = _symmetric("hessian", hessian)
    sigma = semidefinite("covariance", _symmetric("covariance", covariance))
    if h.shape != sigma.shape:
        raise ValueError(f"hessian and covariance need one shape; got {h.shape} and {sigma.shape}.")
    origin = vector("start", start, len(h))
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    times, delay = times_of(time), number("lag", lag, least=0.0)
    if discrete and not np.all(np.mod(np.r_[np.ravel(times), delay], 1.0) == 0.0):
        raise ValueError(
            f"time and lag: got {time} and {lag}, expected whole numbers of steps with "
            "discrete=True."
        )
    values, vectors = np.linalg.eigh(h)
    rates, t = eta * values, times[..., None]
    pairs = rates[:, None] + rates
    with np.errstate(over="ignore", invalid="ignore"):
        if discrete:
            kept = lambda steps: (1.0 - rates) ** steps
            summed = _powers_summed(pairs - rates[:, None] * rates, t[..., None])
        else:
            kept = lambda steps: np.exp(-rates * steps)
            summed = _exponentials_integrated(pairs, t[..., None])
        mean = (kept(t) * (vectors.T @ origin)) @ vectors.T
        spread = eta**2 * summed * (vectors.T @ sigma @ vectors)
        delayed = kept(delay)[:, None] * spread
        law = mean, vectors @ spread @ vectors.T, vectors @ delayed @ vectors.T
    if not all(np.all(np.isfinite(part)) for part in law):
        raise ValueError(
            f"time: got {np.max(times):g} steps, after which the law has spread beyond the range "
            f"of floats, for eigenvalues of the Hessian from {values[0]:.3g} to {values[-1]:.3g}; "
            "expected fewer."
        )
    return OrnsteinUhlenbeckLaw(*law)


def _exponentials_integrated(rates: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The integral of e^{-rate s} over s from 0 to t; t where the rate is 0."""
    x = rates * time
    is_zero = x == 0.0
    return time * np.where(is_zero, 1.0, -np.expm1(-x) / np.where(is_zero, 1.0, x))


def _powers_summed(gaps: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """sum_{i < t} (1 - gap)^i; t where the gap is 0, without loss where it is small."""
    is_small = np.abs(gaps) < 0.5
    small = np.where(is_small, gaps, 0.25)
    rates = -np.log1p(-small)
    slow = _exponentials_integrated(rates, steps) * np.where(
        small == 0.0, 1.0, rates / np.where(small == 0.0, 1.0, small)
    )
    far = np.where(is_small, 1.0, gaps)
    return np.where(is_small, slow, (1.0 - (1.0 - far) ** steps) / far)


def _symmetric(name: str, value: ArrayLike) -> np.ndarray:
    array = matrix(name, value)
    is_square = array.shape[0] == array.shape[1]
    scale = np.max(np.abs(array))
    if not is_square or np.max(np.abs(array - array.T)) > 1e-10 * scale:
        raise ValueError(f"{name}: got shape {array.shape}, expected a symmetric matrix.")
    return (array + array.T) / 2
