"""The weights of modular addition as waves: how much of each frequency is in each unit."""

from typing import Any

import numpy as np


def power(modulus: int, point: Any) -> np.ndarray:
    """Squared length of a unit's weights, by frequency: (units, ⌊p/2⌋ + 1).

    Each unit has p weights from a, p from b and p to the outputs; cos and sin of a frequency
    count together, so that a row adds up to the squared length of all weights of the unit.
    """
    p = modulus
    inputs, outputs = np.asarray(point["W"], float), np.asarray(point["V"], float).T
    blocks = [inputs[:, :p], inputs[:, p:], outputs]
    full = np.sum([np.abs(np.fft.fft(block, axis=1)) ** 2 for block in blocks], axis=0) / p
    half = full[:, : p // 2 + 1].copy()
    half[:, 1 : (p + 1) // 2] *= 2  # k and −k
    return half


def concentration(modulus: int, point: Any) -> float:
    """The part of |θ|² that is in the strongest frequency of its unit, at most 1."""
    spectrum = power(modulus, point)
    return float(np.sum(np.max(spectrum, axis=1)) / np.sum(spectrum))


def order_of_units(modulus: int, point: Any) -> np.ndarray:
    """Units by their largest frequency, and the strongest first among those of one."""
    spectrum = power(modulus, point)
    return np.lexsort((-np.sum(spectrum, axis=1), np.argmax(spectrum, axis=1)))
