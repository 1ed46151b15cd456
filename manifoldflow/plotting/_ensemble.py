"""The picture of an ensemble beside its limit."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from manifoldflow._boundary import checked
from manifoldflow._clock import check_same_clock
from manifoldflow._results import Solution
from manifoldflow.ensembles import statistics
from manifoldflow.plotting._style import Colour, styled


@styled
@checked
def plot_ensemble(
    members: Solution,
    limit: Solution | None = None,
    *,
    observable: str,
    label: str = "SGD",
    axes: Any = None,
) -> Any:
    """Draw the mean of an observable over many runs, with error bars, and the limit as a line.

    Bars are two standard errors of the mean. A band covers the middle nine tenths of the runs.
    Runs with NaN or infinity are left out, and counted in the legend.

    Args:
        members: solutions with a leading axis of runs, as `ensemble` and `jax.vmap` give them.
        limit: one solution on the same clock, or None.
        observable: name of an observable of both, one number at every save.
        label: what the runs are, for the legend.
        axes: of matplotlib; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: solutions without that observable or the axis of runs; different clocks.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow.plotting import plot_ensemble
        >>> sphere = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
        >>> options = {"end_time": 0.1, "step_size": 0.05, "observe": {"height": lambda p: p[2]}}
        >>> start, flow = jnp.array([0.6, 0.0, 0.8]), mf.BrownianMotion(sphere)
        >>> run = lambda key: mf.solve(flow, start, key=key, throw=False, **options)
        >>> runs = jax.vmap(run)(jax.random.split(jax.random.key(0), 5))
        >>> axes = plot_ensemble(runs, observable="height", label="Brownian motion")
        >>> print(axes.get_ylabel())
        height
    """
    values = _values(members, observable, "members", ndim=2)
    times = np.asarray(members.times)
    if limit is not None:
        check_same_clock("plot_ensemble: members and limit", members, limit)
    if axes is None:
        _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    found = statistics(values, levels=(0.05, 0.95))
    failed = f", {int(found.num_failed)} failed" if int(found.num_failed) else ""
    mean, error = np.asarray(found.mean), 2 * np.asarray(found.standard_error)
    low, high = np.asarray(found.quantiles)
    share = {"color": Colour.SGD, "alpha": 0.15, "lw": 0}
    axes.fill_between(times[0], low, high, label="middle 90 % of the runs", **share)
    name = f"{label}: mean of {int(found.count)} ± 2 standard errors{failed}"
    axes.errorbar(times[0], mean, error, fmt="o", ms=4, color=Colour.SGD, label=name)
    if limit is not None:
        line = _values(limit, observable, "limit", ndim=1)
        axes.plot(np.asarray(limit.times), line, color=Colour.LIMIT, label="limit")
    axes.set_xlabel("time of the run" if members.clock is None else f"time  t = {members.clock}")
    axes.set_ylabel(observable)
    axes.legend()
    return axes


def _values(solution: Solution, observable: str, name: str, ndim: int) -> Any:
    if observable not in solution.observables:
        raise ValueError(
            f"plot_ensemble: {name} must have observed {observable!r}; got "
            f"{sorted(solution.observables)}."
        )
    values = np.asarray(solution.observables[observable])
    if values.ndim != ndim:
        axes = "(runs, saves)" if ndim == 2 else "(saves,)"
        raise ValueError(
            f"plot_ensemble: {observable!r} of {name} must have the axes {axes}; got an array of "
            f"shape {values.shape}."
        )
    return values
