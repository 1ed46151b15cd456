"""Two-layer networks: where label noise ends, and how long it takes at most [Gatmiry2024]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow.theory._arguments import finite, matrix, number

_FARTHEST = 2.0**60


def two_layer_minimizer(
    targets: Num[ArrayLike, "..."],
    width: int,
    activation: Callable[[Any], Any],
    *,
    second_layer: Num[ArrayLike, "..."] | None = None,
) -> Float[np.ndarray, "m n"]:
    """The features ``theta_j' x_i`` at which tr H is stationary on the zero-loss manifold.

    For ``f_i = sum_j phi(theta_j' x_i)`` they are ``phi^{-1}(y_i / m)`` for all j. With a second
    layer, ``f_i = sum_j w_j phi(theta_j' x_i)``, they are ``phi''^{-1}(a_i / w_j)`` with the a_i
    for which the targets are fitted.

    Args:
        targets: y, shape (n,), finite.
        width: m, the number of neurons.
        activation: phi, number -> number, a JAX function; increasing, with an increasing
            second derivative if there is a second layer.
        second_layer: w, shape (m,), none of them 0; ones if not given.

    Returns:
        The features in float64, shape (m, n): one row for each neuron.

    Raises:
        ValueError: a wrong shape, or a value that the activation (or its second derivative)
            does not take within +-1e18.

    Assumes:
        linearly independent inputs, so that any features can be had.

    References:
        [Gatmiry2024, Theorem 2].
    """
    y = finite("targets", targets)
    if y.ndim != 1:
        raise ValueError(f"targets: got shape {y.shape}, expected (n,); flatten it.")
    if isinstance(width, bool) or int(width) != width or width < 1:
        raise ValueError(f"width: got {width!r}, expected a number of neurons.")
    phi = _in_double(activation)
    if second_layer is None:
        features = [_inverse(phi, value / width, "activation") for value in y]
        return np.tile(np.array(features), (int(width), 1))
    w = finite("second_layer", second_layer)
    if w.ndim and w.size and np.all(w == w.flat[0]) and w.flat[0] != 0.0 and w.shape == (width,):
        return two_layer_minimizer(y / w.flat[0], width, activation)
    if w.shape != (width,) or np.any(w == 0.0):
        raise ValueError(f"second_layer: got {w}, expected {width} numbers other than 0.")
    bend = _in_double(jax.grad(jax.grad(activation)))

    def at(level: float) -> np.ndarray:
        return np.array([_inverse(bend, level / each, "second derivative") for each in w])

    def output(level: float) -> float:
        return float(sum(each * phi(z) for each, z in zip(w, at(level))))

    levels = [_inverse(output, value, "network") for value in y]
    return np.stack([at(level) for level in levels], axis=1)


def coherence(inputs: Num[ArrayLike, "..."]) -> float:
    """mu, the least eigenvalue of the Gram matrix of the inputs: ``X X' >= mu I``.

    Positive where the inputs are linearly independent; 1 where they are orthonormal.

    Args:
        inputs: X, shape (n, d), one row for each example.

    References:
        [Gatmiry2024, Assumption 2].
    """
    x = matrix("inputs", inputs)
    return float(max(0.0, np.linalg.eigvalsh(x @ x.T)[0]))


def simplicity_time_bound(
    flatness: float,
    accuracy: float,
    *,
    coherence: float,
    normality: float,
    slope: float,
    third_derivative: float,
) -> float:
    """When the features are within `accuracy` of `two_layer_minimizer`, at the latest.

    ``F/(mu beta^2) + ln(beta^2/(rho_1^2 rho_2^2 eps^2) v 1)/(rho_1 rho_2 mu)`` in the time of
    ``theta' = -P grad F`` with ``F = sum_ij phi'(theta_j' x_i)^2 |x_i|^2``; on the limit clock of
    label noise, with tr H = 2 F, it is 2/c times that.

    Args:
        flatness: F at the start.
        accuracy: eps > 0, of each feature.
        coherence: mu of the inputs.
        normality: beta with ``beta |phi''| <= phi'^2 phi'''``.
        slope: rho_1 > 0, a lower bound of phi'.
        third_derivative: rho_2 > 0, a lower bound of phi'''.

    Raises:
        ValueError: a bound that is not positive.

    References:
        [Gatmiry2024, Theorem 3].
    """
    start = number("flatness", flatness, least=0.0)
    eps = number("accuracy", accuracy, least=0.0, strict=True)
    mu = number("coherence", coherence, least=0.0, strict=True)
    beta = number("normality", normality, least=0.0, strict=True)
    rates = number("slope", slope, least=0.0, strict=True) * number(
        "third_derivative", third_derivative, least=0.0, strict=True
    )
    return start / (mu * beta**2) + np.log(max(beta**2 / (rates * eps) ** 2, 1.0)) / (rates * mu)


def _in_double(fn: Callable[[Any], Any]) -> Callable[[float], float]:
    """A JAX function of a number, in float64 whatever JAX is set to."""

    def value(z: float) -> float:
        with jax.enable_x64(True):
            return float(fn(jnp.asarray(z, jnp.float64)))

    return value


def _inverse(fn: Callable[[float], float], value: float, name: str) -> float:
    """z with fn(z) = value, for a monotone function, in a bracket that grows."""
    # Here, since scipy is slow to import and only some oracles need it.
    from scipy.optimize import brentq

    reach = 1.0
    while reach <= _FARTHEST:
        low, high = fn(-reach) - value, fn(reach) - value
        if low * high <= 0.0:
            if low == high:
                raise ValueError(f"activation: its {name} is constant, so it has no inverse.")
            found: Any = brentq(lambda z: fn(z) - value, -reach, reach, xtol=1e-14)
            return float(found)
        reach *= 4.0
    raise ValueError(
        f"activation: its {name} never takes the value {value:.6g}. Use an activation with an "
        "unbounded range, or other targets."
    )
