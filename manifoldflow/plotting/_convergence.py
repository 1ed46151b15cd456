"""The picture of how fast several methods come to an end."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from manifoldflow._boundary import checked_but
from manifoldflow._clock import check_same_clock
from manifoldflow._errors import described
from manifoldflow._results import Solution
from manifoldflow.plotting._style import styled


@styled
@checked_but("runs")
def plot_convergence(
    runs: Any,
    *,
    observable: str,
    reference: Any = 0.0,
    axes: Any = None,
) -> Any:
    """Draw how far an observable of several runs still is from a number, on a logarithmic axis.

    Args:
        runs: name → a `Solution` with the observable, or rows that a `LiveTable` has kept
            (`table.rows`), as those of `minimize`, whose solutions have their ends only.
        observable: one number at every save; "value" or "gradient_norm" in rows of `minimize`.
        reference: the number, e.g. the smallest value.
        axes: of matplotlib; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: runs of another form, or without the observable.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow.plotting import plot_convergence
        >>> rows = [{"time": 0.0, "value": 1.0}, {"time": 1.0, "value": 0.1}]
        >>> axes = plot_convergence({"descent": rows}, observable="value")
        >>> print(axes.get_xlabel())
        steps
    """
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(
            f"plot_convergence: runs must map names to solutions or rows; got {described(runs)}."
        )
    curves = {name: _curve(run, name, observable) for name, run in runs.items()}
    if axes is None:
        _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (times, values) in curves.items():
        gap = np.abs(values - float(reference))
        axes.semilogy(times, np.where(gap > 0, gap, np.nan), ".-", ms=4, label=name)
    solutions = [run for run in runs.values() if isinstance(run, Solution)]
    check_same_clock("plot_convergence", *solutions)
    clocks = [f"time  t = {run.clock}" for run in solutions if run.clock is not None]
    axes.set_xlabel(clocks[0] if clocks else "time of the run" if solutions else "steps")
    far = "" if not float(reference) else f", distance from {float(reference):.4g}"
    axes.set_ylabel(f"{observable}{far}")
    axes.legend()
    return axes


def _curve(run: Any, name: str, observable: str) -> tuple[Any, Any]:
    if isinstance(run, Solution):
        if observable not in run.observables:
            raise ValueError(
                f"plot_convergence: {name!r} must have observed {observable!r}; got "
                f"{sorted(run.observables)}."
            )
        return np.asarray(run.times), np.asarray(run.observables[observable])
    is_rows = isinstance(run, Sequence) and all(isinstance(row, Mapping) for row in run)
    if not is_rows or any(observable not in row for row in run):
        raise ValueError(
            f"plot_convergence: {name!r} must be a Solution or rows with {observable!r}; got "
            f"{described(run)}."
        )
    return np.array([row["time"] for row in run]), np.array([row[observable] for row in run])
