"""The picture of what a run changed."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow._results import Solution
from manifoldflow.plotting._style import Colour, styled
from manifoldflow.walks import before_after


@styled
@checked
def plot_before_after(solution: Solution) -> Figure:
    """The figure of every observable of a run, before and after.

    A quantity that is positive at both ends has a point for each, as a share of its first value, on
    a logarithmic axis. Its name and numbers stand beside it.

    Args:
        solution: of `walk`, `solve`, `simulate` or `minimize`, with observables; not a batch.

    Returns:
        The figure, to be saved or shown.

    Raises:
        ValueError: no observable is positive at both ends; a batch of solutions.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow.plotting import plot_before_after
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda w, x: w[0] * w[1] * x)
        >>> walk = mf.walk(loss, jnp.array([4.0, 0.25]), objective="weight_norm")
        >>> print(len(plot_before_after(walk).axes))
        1
    """
    changes = before_after(solution)
    positive = {k: (a, b) for k, (a, b) in changes.values.items() if a > 0 and b > 0}
    if not positive:
        raise ValueError(
            "plot_before_after needs observables that are positive before and after; got "
            f"{changes.values}. Give the run some, observe={{'trace': loss.trace_gauss_newton}}."
        )
    names = list(positive)[::-1]
    ratios = np.array([positive[name][1] / positive[name][0] for name in names])
    places = np.arange(len(names))
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.55 * len(names)), layout="constrained")
    axes.hlines(places, 1, ratios, color=Colour.REFERENCE, lw=1)
    axes.plot(np.ones(len(names)), places, "o", color=Colour.GRADIENT_FLOW, label="before")
    axes.plot(ratios, places, "o", color=Colour.LIMIT, label="after")
    axes.set_xscale("log")
    low, high = min(ratios.min(), 1), max(ratios.max(), 1)
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(places, [_label(name, *positive[name]) for name in names])
    axes.set_xlabel("value as a share of that before")
    axes.set_title(changes.summary, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _label(name: str, before: Any, after: Any) -> str:
    return f"{name}\n{before:.3g} → {after:.3g}"
