"""What oracles are asked: checked, as float64 NumPy arrays."""

import numpy as np
from jax.typing import ArrayLike

from manifoldflow._errors import real_numbers

_ROUNDING = 1e-10


def problem(inputs: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    z = matrix("inputs", inputs)
    return z, vector("targets", targets, z.shape[0])


def matrix(name: str, value: ArrayLike) -> np.ndarray:
    array = finite(name, value)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name}: got shape {array.shape}, expected (n, d): one row for each example; "
            "reshape it."
        )
    return array


def vector(name: str, value: ArrayLike, length: int) -> np.ndarray:
    array = finite(name, value)
    if array.shape != (length,):
        raise ValueError(
            f"{name}: got shape {array.shape}, expected ({length},) to match the inputs; "
            "flatten it."
        )
    return array


def semidefinite(name: str, array: np.ndarray) -> np.ndarray:
    """A covariance: symmetric, without negative eigenvalues, to rounding."""
    scale = np.max(np.abs(array))
    if np.max(np.abs(array - array.T)) > _ROUNDING * scale:
        raise ValueError(f"{name}: expected a symmetric matrix; got one that is not.")
    least = np.linalg.eigvalsh(array)[0]
    if least < -_ROUNDING * scale:
        raise ValueError(f"{name}: got the eigenvalue {least:.3g}, expected none below 0.")
    return array


def number(name: str, value: float, *, least: float, strict: bool = False) -> float:
    array = finite(name, value)
    if array.ndim != 0 or array < least or (strict and array == least):
        raise ValueError(
            f"{name}: got {value!r}, expected one number {'>' if strict else '>='} {least}."
        )
    return float(array)


def times_of(value: ArrayLike) -> np.ndarray:
    array = finite("time", value)
    if array.ndim > 1 or np.any(array < 0.0):
        raise ValueError(
            f"time: got shape {array.shape} with minimum {np.min(array, initial=0.0)}, "
            "expected a scalar or (m,), all >= 0."
        )
    return array


def finite(name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(real_numbers(name, value), dtype=np.float64)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"{name}: got NaN or infinity, expected finite numbers; remove or mask them first."
        )
    return array
