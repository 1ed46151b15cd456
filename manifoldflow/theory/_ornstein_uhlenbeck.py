"""How SGD spreads about a minimum: stationary covariances of its linearisation."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import matrix, number, semidefinite


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


def _symmetric(name: str, value: ArrayLike) -> np.ndarray:
    array = matrix(name, value)
    is_square = array.shape[0] == array.shape[1]
    scale = np.max(np.abs(array))
    if not is_square or np.max(np.abs(array - array.T)) > 1e-10 * scale:
        raise ValueError(f"{name}: got shape {array.shape}, expected a symmetric matrix.")
    return (array + array.T) / 2
