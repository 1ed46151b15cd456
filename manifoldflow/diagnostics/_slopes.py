"""The rate at which an error falls with the size of a step, measured above rounding."""

import equinox as eqx
import numpy as np
from jaxtyping import Float

from manifoldflow import _tree
from manifoldflow._types import Point

_NUM_SIZES, _WINDOW, _FEW = 41, 9, 3
_MOST_BENT = 2.0


class SlopeCheck(eqx.Module):
    """The rate at which an error falls with the size t of a step, error ~ t^slope.

    Attributes:
        name: of the check.
        slope: at vanishing t, from the window of sizes where it is steadiest; NaN if the error is
            at rounding everywhere.
        expected: the slope by theory.
        window: (smallest, largest) t of that window.
        sizes: all t.
        errors: the error at each of them.
        holds: True where the slope is at least `expected` − 0.1, or all errors are at rounding.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import diagnostics
        >>> sizes = np.logspace(-3, 0, 4)
        >>> check = diagnostics.SlopeCheck("gradient", 2.0, 2.0, (1e-3, 1.0), sizes, sizes**2, True)
        >>> print(bool(check), check)
        True gradient: slope 2.000 over t = 1.0e-03 … 1.0e+00, expected 2: holds
    """

    name: str
    slope: float
    expected: float
    window: tuple[float, float]
    sizes: Float[np.ndarray, " sizes"]
    errors: Float[np.ndarray, " sizes"]
    holds: bool

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        low, high = self.window
        return (
            f"{self.name}: slope {self.slope:.3f} over t = {low:.1e} … {high:.1e}, "
            f"expected {self.expected:g}: {verdict}"
        )


def step_sizes(point: Point) -> np.ndarray:
    """Steps from 1 down to where differences of second order drown in rounding."""
    eps = _tree.eps_of(_tree.split(point, None)[0])
    # An error of order t² drowns in rounding at t = √eps; one of order t³ before that.
    return np.logspace(0, np.log10(eps) / 2, _NUM_SIZES)


def slope_check(
    name: str, errors: np.ndarray, expected: float, point: Point, scale: float
) -> SlopeCheck:
    """The slope in log-log scale over the window where it is steadiest, above rounding.

    It is that at vanishing steps: log error = offset + slope · log t + bend · t, since errors
    of the next order bend the line where single precision leaves large steps only.
    """
    sizes, errors = step_sizes(point), np.abs(errors)
    # Errors are differences of numbers of size `scale`, wrong by some eps of it.
    floor = 50 * _tree.eps_of(_tree.split(point, None)[0]) * max(1.0, abs(scale))
    usable = np.isfinite(errors) & (errors > floor)
    best: tuple[float, float, tuple[float, float]] = (np.inf, np.nan, (np.nan, np.nan))
    for start in range(_NUM_SIZES - _WINDOW + 1):
        part = slice(start, start + _WINDOW)
        if not usable[part].all():
            continue
        slope, bend, misfit = _slope(sizes[part], errors[part])
        # Errors of higher orders alone, as where the sum of all changes its sign.
        if abs(bend) * sizes[part][0] > _MOST_BENT:
            continue
        # Among windows that are straight, the one of smaller steps says more.
        if misfit < 0.8 * best[0] or (misfit < 0.01 and best[0] < 0.01):
            best = misfit, slope, (float(sizes[part][-1]), float(sizes[part][0]))
    if np.isinf(best[0]) and np.sum(usable) >= _FEW:
        # Too few errors are above rounding, since they fall so fast; or none is without a bend.
        few = sizes[usable]
        slope = float(np.polyfit(np.log(few), np.log(errors[usable]), 1)[0])
        best = 0.0, slope, (float(few[-1]), float(few[0]))
    slope = best[1]
    is_zero = bool(np.all(errors[np.isfinite(errors)] <= floor)) and bool(np.isfinite(errors).any())
    holds = is_zero if np.isnan(slope) else slope >= expected - 0.1
    return SlopeCheck(name, slope, expected, best[2], sizes, errors, bool(holds))


def _slope(sizes: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """The slope at vanishing steps, the bend, and how far the errors are from such a curve."""
    terms = np.stack([np.log(sizes), np.ones_like(sizes), sizes], axis=1)
    found, *_ = np.linalg.lstsq(terms, np.log(errors), rcond=None)
    return (
        float(found[0]),
        float(found[2]),
        float(np.sqrt(np.mean((np.log(errors) - terms @ found) ** 2))),
    )
