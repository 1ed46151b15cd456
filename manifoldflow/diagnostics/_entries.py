"""The lines of a report: numbers with their uncertainty, and what was left out and why."""

import math
from typing import Any, NamedTuple

import numpy as np


class Quantity(NamedTuple):
    """A number of a report, with its uncertainty and its origin.

    Attributes:
        name: of the number.
        value: the number.
        standard_error: of the value, if it is a mean over samples; a bound on the error, if it is
            an eigenvalue; None where it is exact to rounding.
        how: the origin of the number.
        num_samples: the number of samples of a mean; None for others.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> trace = diagnostics.Quantity("trace of G", 2.5, 0.1, "tr JᵀWJ", num_samples=64)
        >>> print(f"{trace.interval[0]:.2f} to {trace.interval[1]:.2f}")
        2.30 to 2.70
    """

    name: str
    value: float
    standard_error: float | None
    how: str
    num_samples: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a mean, by Student's t; value ± bound for an eigenvalue."""
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
    """A number that a report does not have, with the reason.

    Attributes:
        name: of the number.
        reason: for its absence.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> print(" ".join(str(diagnostics.LeftOut("distance", "no residuals")).split()))
        distance left out no residuals
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<34} {'left out':>13} {'':<9} {self.reason}"


class LeafTrace(NamedTuple):
    """The share of one leaf of the model in tr G.

    Attributes:
        leaf: its path.
        size: the number of its entries.
        trace: its part of tr G.
        standard_error: of that part.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> print(" ".join(str(diagnostics.LeafTrace(".weight", 12, 0.5, 0.01)).split()))
        .weight 0.5 ± 0.01 12 numbers
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
    """The number of bytes in MB of a million bytes, or in kB."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _shown(value: float, error: float | None) -> str:
    if value == round(value) and abs(value) < 1e15 and error is None:
        return str(round(value))
    if not error or not math.isfinite(error) or not math.isfinite(value) or value == 0:
        return f"{value:.5g}"
    digits = max(1, 2 + math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{min(digits, 7)}g}"
