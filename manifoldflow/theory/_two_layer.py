"""Two-layer networks: where label noise ends, and what that asks for [Gatmiry2024]."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked, checked_but
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, matrix

_FARTHEST = 2.0**60
_GRID = 2001
_ZOOMS = 4
_ROUNDING = 1e-12


class ActivationConstants(NamedTuple):
    """What the theorems on two-layer networks ask of an activation: all three must be > 0.

    Attributes:
        slope: rho_1 = min phi'.
        third_derivative: rho_2 = min phi'''.
        normality: the largest beta with ``beta |phi''| <= phi'^2 phi'''``; inf where
            phi'' vanishes and phi''' does not become negative.
        slope_at: where phi' is least.
        third_derivative_at: where phi''' is least.
        normality_at: where beta is decided.
    """

    slope: float
    third_derivative: float
    normality: float
    slope_at: float
    third_derivative_at: float
    normality_at: float


@checked
def activation_constants(
    activation: Callable[[Any], Any], low: float = -10.0, high: float = 10.0
) -> ActivationConstants:
    """The constants of an activation on a range, each with the place that decides it.

    An activation that breaks an assumption has a constant <= 0 and the place where it does.
    For ``z^3 + nu z`` they are nu at 0, 6, and ``16/3 nu^(3/2)`` at ``+-sqrt(nu)/3``.

    Args:
        activation: phi, number -> number, a JAX function with three derivatives.
        low: where the range of features theta_j' x_i begins.
        high: where it ends.

    Returns:
        The constants on [low, high], on a grid that is refined round the least value; a dip
        narrower than ``(high - low)/2000`` may be missed.

    Raises:
        ValueError: an empty range; derivatives that are NaN or infinite there.

    References:
        [Gatmiry2024, Assumptions 1 and 3].
    """
    low, high = float(finite("low", low)), float(finite("high", high))
    if not low < high:
        raise ValueError(f"low: got {low}, expected a number < high = {high}.")
    first = jax.grad(activation)
    second = jax.grad(first)
    third = jax.grad(second)
    slope, slope_at = _least(first, low, high)
    bend, bend_at = _least(third, low, high)
    beta, beta_at = _least(lambda z: _quotient(first(z) ** 2 * third(z), second(z)), low, high)
    return ActivationConstants(slope, bend, beta, slope_at, bend_at, beta_at)


@checked_but("width")
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
    width = checked_count("width, the number of neurons,", width)
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


@checked
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


def _quotient(number: Any, by: Any) -> Any:
    """number/|by|, where 0 does not limit anything that is not negative."""
    bounds = jnp.where(by == 0.0, 1.0, jnp.abs(by))
    free = jnp.where(number >= 0.0, jnp.inf, -jnp.inf)
    return jnp.where(by == 0.0, free, number / bounds)


def _least(fn: Callable[[Any], Any], low: float, high: float) -> tuple[float, float]:
    """The least value of a function on a range, and where; 0 if that is all but rounding."""
    value, place, scale = np.inf, low, 0.0
    compiled = jax.jit(jax.vmap(lambda z: fn(z)))
    for zoom in range(_ZOOMS):
        with jax.enable_x64(True):
            grid = np.sort(np.append(np.linspace(low, high, _GRID), np.clip(0.0, low, high)))
            values = np.asarray(compiled(grid))
        if np.any(np.isnan(values)):
            raise ValueError(
                f"activation: its derivatives are NaN or infinite at "
                f"{grid[np.argmax(np.isnan(values))]:.6g}. Use another range."
            )
        best = int(np.argmin(values))
        near = slice(max(best - 1, 0), best + 2)
        if zoom == 0:
            finite_ones = values[near][np.isfinite(values[near])]
            scale = np.max(np.abs(finite_ones), initial=0.0)
        if value == np.inf or values[best] < value - _ROUNDING * scale:
            value, place = float(values[best]), float(grid[best])
        low, high = grid[near][0], grid[near][-1]
    return (0.0 if abs(value) <= _ROUNDING * scale else value), place


def _in_double(fn: Callable[[Any], Any]) -> Callable[[float], float]:
    """A JAX function of a number, in float64 whatever JAX is set to."""
    compiled = jax.jit(lambda z: fn(z))  # modules have no hash

    def value(z: float) -> float:
        with jax.enable_x64(True):
            return float(compiled(np.float64(z)))

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
