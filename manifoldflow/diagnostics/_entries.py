"""The lines of a report: numbers with their uncertainty, and what was left out and why."""

import math
from typing import Any, NamedTuple

import numpy as np


class Quantity(NamedTuple):
    """A number of a report.

    Attributes:
        name: what it is.
        value: the number.
        standard_error: of the value, if it is a mean over samples; a bound on the error, if it is
            an eigenvalue; None where it is exact to rounding.
        how: from what it comes.
        num_samples: of which it is a mean; None if it is none.
    """

    name: str
    value: float
    standard_error: float | None
    how: str
    num_samples: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % by Student's t for a mean over samples; value and bound for an eigenvalue."""
        spread = self.standard_error or 0.0
        if self.num_samples is not None:
            from scipy.special import stdtrit  # it takes long to be imported

            spread *= float(stdtrit(self.num_samples - 1, 0.975))
        return self.value - spread, self.value + spread

    def __str__(self) -> str:
        error = self.standard_error
        shown = "" if error is None else f"± {error:.1g}"
        return f"{self.name:<34} {_shown(self.value, error):>13} {shown:<9} {self.how}"


class LeftOut(NamedTuple):
    """What a report does not have, and why.

    Attributes:
        name: what it would have been.
        reason: why it is not there.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<34} {'left out':>13} {'':<9} {self.reason}"


class LeafTrace(NamedTuple):
    """The share of one leaf of the model in tr G.

    Attributes:
        leaf: its path.
        size: its numbers.
        trace: its part of tr G.
        standard_error: of that.
    """

    leaf: str
    size: int
    trace: float
    standard_error: float

    def __str__(self) -> str:
        shown = _shown(self.trace, self.standard_error)
        return (
            f"  {self.leaf:<32} {shown:>13} {f'± {self.standard_error:.1g}':<9} {self.size} numbers"
        )


def mean_of(samples: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard error along the first axis."""
    count = len(samples)
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / math.sqrt(count)


def bytes_in_words(count: int) -> str:
    """In MB of a million bytes, or in kB."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _shown(value: float, error: float | None) -> str:
    if value == round(value) and abs(value) < 1e15 and error is None:
        return str(round(value))
    if not error or not math.isfinite(error) or not math.isfinite(value) or value == 0:
        return f"{value:.5g}"
    digits = max(1, 2 + math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{min(digits, 7)}g}"
