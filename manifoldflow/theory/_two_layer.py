"""Two-layer networks: the end of label noise, and its assumptions [Gatmiry2024]."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_but, checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, matrix

_FARTHEST = 2.0**60
_GRID = 2001
_ZOOMS = 4
_ROUNDING = 1e-12


class ActivationConstants(NamedTuple):
    """The constants of an activation that the theorems on two-layer networks need; all must be > 0.

    Attributes:
        slope: ϱ₁ = min φ′.
        third_derivative: ϱ₂ = min φ‴.
        normality: the largest β with β|φ″| ≤ φ′²φ‴; inf where φ″ vanishes and φ‴ does not become
            negative.
        slope_at: the place where φ′ is least.
        third_derivative_at: the place where φ‴ is least.
        normality_at: the place that decides β.

    Examples:
        >>> from manifoldflow import theory
        >>> found = theory.activation_constants(lambda z: z**3 + z, -1.0, 1.0)
        >>> isinstance(found, theory.ActivationConstants), found.slope_at
        (True, 0.0)
    """

    slope: float
    third_derivative: float
    normality: float
    slope_at: float
    third_derivative_at: float
    normality_at: float


@checked_concrete
def activation_constants(
    activation: Callable[[Any], Any], low: float = -10.0, high: float = 10.0
) -> ActivationConstants:
    """The constants ϱ₁, ϱ₂ and β of an activation on a range, each with the place that decides it.

    An activation that breaks an assumption has a constant ≤ 0. For z³ + νz they are ν at 0, 6, and
    (16/3)ν^{3/2} at ±√ν/3.

    Args:
        activation: φ, number → number, a JAX function with three derivatives.
        low: lower end of the range of the features θⱼᵀxᵢ.
        high: upper end.

    Returns:
        An `ActivationConstants` on [low, high], from a grid that is refined around the least value.
        A dip narrower than (high − low)/2000 may be missed.

    Raises:
        ValueError: an empty range; derivatives that are NaN or infinite there.

    Examples:
        >>> from manifoldflow import theory
        >>> found = theory.activation_constants(lambda z: z**3 + z, -1.0, 1.0)
        >>> print(
        ...     round(found.slope, 3), round(found.third_derivative, 3), round(found.normality, 3)
        ... )
        1.0 6.0 5.333

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


@checked_but("width", is_concrete=True)
def two_layer_minimizer(
    targets: Num[ArrayLike, "..."],
    width: int,
    activation: Callable[[Any], Any],
    *,
    second_layer: Num[ArrayLike, "..."] | None = None,
) -> Float[np.ndarray, "m n"]:
    """The features θⱼᵀxᵢ of a two-layer network at which tr ∇²L is stationary at zero loss.

    For fᵢ = Σⱼ φ(θⱼᵀxᵢ) they are φ⁻¹(yᵢ/m) for all j. With a second layer, fᵢ = Σⱼ wⱼφ(θⱼᵀxᵢ), they
    are φ″⁻¹(aᵢ/wⱼ), with the aᵢ for which the targets are fitted.

    Args:
        targets: y, shape (n,), finite.
        width: m, the number of neurons.
        activation: φ, number → number, a JAX function; increasing, with an increasing second
            derivative if there is a second layer.
        second_layer: w, shape (m,), none of them 0; None for ones.

    Returns:
        The features in float64, shape (m, n): one row for each neuron.

    Raises:
        ValueError: a wrong shape, or a value that the activation (or its second derivative) does
            not take within ±1e18.

    Assumes:
        linearly independent inputs, so that any features can be attained.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> print(
        ...     theory.two_layer_minimizer(np.array([4.0]), 2, lambda z: z**3 + z).round(6).tolist()
        ... )
        [[1.0], [1.0]]

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


@checked_concrete
def coherence(inputs: Num[ArrayLike, "..."]) -> float:
    """The coherence μ of inputs: the least eigenvalue of their Gram matrix, XXᵀ ≥ μI.

    It is positive where the inputs are linearly independent, and 1 where they are orthonormal.

    Args:
        inputs: X, shape (n, d), one row for each example.

    Returns:
        μ, a Python float.

    Raises:
        ValueError: a wrong shape, or values that are not finite.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> round(theory.coherence(np.array([[1.0, 0.0], [0.6, 0.8]])), 6)
        0.4

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
    """The least value of a function on a range, and its place; 0 if it is rounding."""
    value, place, scale = np.inf, low, 0.0
    # A lambda, since modules have no hash. Third derivatives lose most digits in float32.
    compiled = jax.jit(jax.vmap(lambda z: fn(z)))
    for zoom in range(_ZOOMS):
        with jax.enable_x64(True):
            # With 0, where activations like z³ + νz are decided, and which a grid may miss.
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
    """A JAX function of a number, evaluated in float64 whatever JAX is set to."""
    compiled = jax.jit(lambda z: fn(z))  # modules have no hash

    def value(z: float) -> float:
        with jax.enable_x64(True):
            return float(compiled(np.float64(z)))

    return value


def _inverse(fn: Callable[[float], float], value: float, name: str) -> float:
    """The z with fn(z) = value, for a monotone function, in a bracket that grows."""
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
