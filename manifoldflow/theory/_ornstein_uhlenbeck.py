"""The Gaussian laws of SGD linearised about a minimum, at every time and at late times."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import (
    eps_of,
    matrix,
    number,
    rounding_of,
    semidefinite,
    times_of,
    vector,
)


@checked_concrete
def ornstein_uhlenbeck_covariance(
    hessian: Num[ArrayLike, "..."],
    covariance: Num[ArrayLike, "..."],
    *,
    learning_rate: float,
    discrete: bool = False,
) -> Float[np.ndarray, "D D"]:
    """The stationary covariance S of SGD near a minimum with this Hessian.

    In continuous time dX = −ηHX dt + ηF dW with FFᵀ = Σ, so that HS + SH = ηΣ. The steps of SGD, X
    ← (I − ηH)X + ηξ, have S = (I − ηH)S(I − ηH) + η²Σ exactly (`discrete=True`). Label noise, Σ =
    cH, gives S = (ηc/2)·P⊥ in continuous time and ηc(2I − ηH)⁻¹P⊥ in steps.

    Along directions in which the Hessian vanishes nothing pulls back. S is 0 there, and noise there
    is refused.

    Args:
        hessian: H, symmetric positive semidefinite, (D, D).
        covariance: Σ of the gradient noise, symmetric positive semidefinite, (D, D).
        learning_rate: η > 0.
        discrete: True for the steps of SGD, False for the diffusion.

    Returns:
        S in float64, (D, D).

    Raises:
        ValueError: wrong shapes; no symmetry; a negative eigenvalue; noise along a flat direction;
            a learning rate at which SGD is unstable, ηλ ≥ 2.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> hessian = np.array([[2.0, 0.0], [0.0, 0.0]])
        >>> print(
        ...     theory.ornstein_uhlenbeck_covariance(hessian, hessian, learning_rate=0.1).tolist()
        ... )
        [[0.05, 0.0], [0.0, 0.0]]

    References:
        [Ma2022, chapter 9]; S. Mandt, M. Hoffman, D. Blei, JMLR 18 (2017).
    """
    h = _symmetric("hessian", hessian)
    rounding = rounding_of(covariance)
    sigma = semidefinite("covariance", _symmetric("covariance", covariance), rounding)
    if h.shape != sigma.shape:
        raise ValueError(f"hessian and covariance need one shape; got {h.shape} and {sigma.shape}.")
    eta = number("learning_rate", learning_rate, least=0.0, strict=True)
    values, vectors = np.linalg.eigh(h)
    # A flat direction of a float32 Hessian has an eigenvalue of about 1e-8 of the largest.
    floor = len(h) * eps_of(hessian) * np.max(np.abs(values), initial=0.0)
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
    if leak > max(rounding, rounding_of(hessian)) * np.max(np.abs(turned), initial=0.0):
        raise ValueError(
            f"covariance: got noise of size {leak:.3g} along directions in which the Hessian "
            "vanishes, expected none; it would grow for ever. Restrict both to the others."
        )
    rates = values[:, None] + values
    if discrete:
        # (1 − ηλⱼ)(1 − ηλₖ) = 1 − η(λⱼ + λₖ − ηλⱼλₖ).
        rates = rates - eta * values[:, None] * values
    # The rate of a pair is 0 only where both are flat, but noise across is left out as well.
    kept = ~(is_flat[:, None] | is_flat)
    spread = np.where(kept, eta * turned / np.where(kept, rates, 1.0), 0.0)
    return vectors @ spread @ vectors.T


class OrnsteinUhlenbeckLaw(NamedTuple):
    """A normal law at one time or at several, in float64.

    Attributes:
        mean: E X(t), shape (D,) or (m, D).
        covariance: Cov X(t), shape (D, D) or (m, D, D).
        autocovariance: Cov(X(t + lag), X(t)), of the same shape.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> one = np.array([[1.0]])
        >>> law = theory.ornstein_uhlenbeck_law(
        ...     one, one, np.array([1.0]), time=0.0, learning_rate=0.1
        ... )
        >>> isinstance(law, theory.OrnsteinUhlenbeckLaw), law.mean.tolist(), law.covariance.tolist()
        (True, [1.0], [[0.0]])
    """

    mean: Float[np.ndarray, "*times D"]
    covariance: Float[np.ndarray, "*times D D"]
    autocovariance: Float[np.ndarray, "*times D D"]


@checked_concrete
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
    """The law of SGD near a stationary point with this Hessian, at any time after a fixed start.

    The law is that of dX = −ηHX dt + ηF dW with FFᵀ = Σ and the stationary point at 0. In an
    eigenbasis of H, with rates aⱼ = ηλⱼ,

        E X(t) = e^{−at}x₀,   Cov X(t)ⱼₖ = η²Σⱼₖ(1 − e^{−(aⱼ + aₖ)t})/(aⱼ + aₖ),
        Cov(X(t + lag), X(t)) = e^{−ηH·lag} Cov X(t).

    The steps of SGD, X ← (I − ηH)X + ηξ, have 1 − a in place of e^{−a} and, exactly, Cov X(t)ⱼₖ =
    η²Σⱼₖ Σ_{i<t} ((1 − aⱼ)(1 − aₖ))ⁱ (`discrete=True`).

    Where the Hessian vanishes this is Brownian motion of covariance η²Σt. Where it is negative, or
    where a step of SGD is too long, the law spreads exponentially; it exists at every time. Where
    there is a stationary law, `ornstein_uhlenbeck_covariance` gives it.

    Args:
        hessian: H, symmetric, shape (D, D).
        covariance: Σ of the gradient noise, symmetric positive semidefinite, (D, D).
        start: x₀, shape (D,), relative to the stationary point.
        time: t ≥ 0 in steps, finite: a scalar, or shape (m,).
        learning_rate: η > 0.
        lag: ≥ 0, in steps.
        discrete: True for the steps of SGD, with whole numbers for time and lag; False for the
            diffusion.

    Returns:
        An `OrnsteinUhlenbeckLaw`.

    Raises:
        ValueError: wrong shapes; no symmetry; a value out of range; fractions of steps; a law that
            has spread beyond the range of floats.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> options = {"time": np.array([0.0, 10.0, 1e3]), "learning_rate": 0.1}
        >>> law = theory.ornstein_uhlenbeck_law(
        ...     np.array([[1.0]]), np.array([[1.0]]), np.array([1.0]), **options
        ... )
        >>> print(law.mean.ravel().round(3).tolist(), law.covariance.ravel().round(3).tolist())
        [1.0, 0.368, 0.0] [0.0, 0.043, 0.05]

    References:
        [Ma2022, section 9.5].
    """
    h = _symmetric("hessian", hessian)
    rounding = rounding_of(covariance)
    sigma = semidefinite("covariance", _symmetric("covariance", covariance), rounding)
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
    # A law that spreads beyond floats is refused below, with the time at which it does.
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
    """∫₀ᵗ e^{−rate·s} ds; t where the rate is 0."""
    x = rates * time
    is_zero = x == 0.0
    return time * np.where(is_zero, 1.0, -np.expm1(-x) / np.where(is_zero, 1.0, x))


def _powers_summed(gaps: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Σ_{i<t} (1 − gap)ⁱ; t where the gap is 0, without loss of digits where it is small."""
    is_small = np.abs(gaps) < 0.5
    small = np.where(is_small, gaps, 0.25)
    # (1 − gap)ⁱ = e^{−rate·i}: 1 − gap itself would drop the digits of a small gap.
    rates = -np.log1p(-small)
    slow = _exponentials_integrated(rates, steps) * np.where(
        small == 0.0, 1.0, rates / np.where(small == 0.0, 1.0, small)
    )
    far = np.where(is_small, 1.0, gaps)
    return np.where(is_small, slow, (1.0 - (1.0 - far) ** steps) / far)


def _symmetric(name: str, value: ArrayLike) -> np.ndarray:
    array = matrix(name, value)
    is_square = array.shape[0] == array.shape[1]
    tolerance = rounding_of(value) * np.max(np.abs(array))
    if not is_square or np.max(np.abs(array - array.T)) > tolerance:
        raise ValueError(f"{name}: got shape {array.shape}, expected a symmetric matrix.")
    return (array + array.T) / 2
