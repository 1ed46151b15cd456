"""The contents of a file of examples."""

from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """Inputs and targets as they were read.

    Attributes:
        inputs: (N, d), finite.
        targets: (N,) of numbers or texts, or (N, k) of numbers.
        columns: the names of the inputs, for messages.
        shape: of one input as it came, or () where it came as columns.
    """

    inputs: np.ndarray
    targets: np.ndarray
    columns: list[str]
    shape: tuple[int, ...] = ()


def some(names: list[str]) -> str:
    """A list of names for a message: all, or the first ten."""
    shown = ", ".join(str(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
