"""Checks of the arguments of `theory`: each function returns a float64 NumPy array."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from manifoldflow import _precision
from manifoldflow._errors import real_numbers


def problem(inputs: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Inputs Z, (n, d), and targets y, (n,), as float64 arrays of matching lengths."""
    z = matrix("inputs", inputs)
    return z, vector("targets", targets, z.shape[0])


def matrix(name: str, value: ArrayLike) -> np.ndarray:
    """A non-empty matrix of finite numbers in float64."""
    array = finite(name, value)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name}: got shape {array.shape}, expected (n, d): one row for each example; "
            "reshape it."
        )
    return array


def vector(name: str, value: ArrayLike, length: int) -> np.ndarray:
    """A vector of finite numbers of the given length in float64."""
    array = finite(name, value)
    if array.shape != (length,):
        raise ValueError(
            f"{name}: got shape {array.shape}, expected ({length},) to match the inputs; "
            "flatten it."
        )
    return array


def eps_of(*values: Any) -> float:
    """The rounding error of the coarsest argument, in the dtype that it came in.

    Oracles compute in float64, but a float32 argument brings the rounding of float32 with it.
    """
    floats = [v.dtype for v in values if jnp.issubdtype(getattr(v, "dtype", int), jnp.floating)]
    return max(map(_precision.eps_of_dtype, [np.dtype(np.float64), *floats]))


def rounding_of(*values: Any) -> float:
    """The relative size below which numbers computed from these arguments count as zero."""
    return max(1e-10, eps_of(*values) ** (2 / 3))


def semidefinite(name: str, array: np.ndarray, rounding: float) -> np.ndarray:
    """The matrix itself, refused unless it is symmetric and positive semidefinite to rounding."""
    scale = np.max(np.abs(array))
    if np.max(np.abs(array - array.T)) > rounding * scale:
        raise ValueError(f"{name}: expected a symmetric matrix; got one that is not.")
    least = np.linalg.eigvalsh(array)[0]
    if least < -rounding * scale:
        raise ValueError(f"{name}: got the eigenvalue {least:.3g}, expected none below 0.")
    return array


def number(name: str, value: float, *, least: float, strict: bool = False) -> float:
    """One finite number at least (or, with `strict`, above) `least`, as a Python float."""
    array = finite(name, value)
    if array.ndim != 0 or array < least or (strict and array == least):
        raise ValueError(
            f"{name}: got {value!r}, expected one number {'>' if strict else '>='} {least}."
        )
    return float(array)


def times_of(value: ArrayLike) -> np.ndarray:
    """Times ≥ 0 as a float64 array, a scalar or (m,)."""
    array = finite("time", value)
    if array.ndim > 1 or np.any(array < 0.0):
        raise ValueError(
            f"time: got shape {array.shape} with minimum {np.min(array, initial=0.0)}, "
            "expected a scalar or (m,), all >= 0."
        )
    return array


def finite(name: str, value: ArrayLike) -> np.ndarray:
    """Finite numbers as a float64 array of any shape."""
    # In float64 whatever JAX is set to: the oracles must not round where what they judge does.
    array = np.asarray(real_numbers(name, value), dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"{name}: got NaN or infinity, expected finite numbers; remove or mask them first."
        )
    return array
