"""The picture of a report: eigenvalues, the trace by leaf, and the learning rate."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow.diagnostics import Report
from manifoldflow.plotting._style import Colour, styled

# The number of leaves shown, those with the largest share of the trace.
_LEAVES = 16
# Up to this number eigenvalues have bars, more of them a band.
_FEW = 12


@styled
@checked
def plot_report(report: Report) -> Figure:
    """Eigenvalues with their bounds, tr G by leaf, and the learning rate against its threshold.

    Where η is to be stable for full batches, eigenvalues of G are below 2/η: that line is drawn
    where the report has a learning rate. The title of the second panel has η/η*.

    Args:
        report: from `report`.

    Returns:
        The figure, to be saved or shown.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: x @ w**2)
        >>> figure = mf.plotting.plot_report(mf.report(loss, jnp.ones(2), learning_rate=0.1))
        >>> len(figure.axes)
        2
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _draw_eigenvalues(left, report)
    _draw_leaves(right, report)
    return figure


def _draw_eigenvalues(axes: Any, report: Report) -> None:
    values = np.array([q.value for q in report.eigenvalues])
    bounds = np.array([q.standard_error or 0.0 for q in report.eigenvalues])
    numbers = np.arange(1, len(values) + 1)
    positive = values > 0
    of = "G" if "trace of G" in report.quantities else "∇²L"
    if positive.any():
        shown = np.where(positive, values, np.nan)
        # On a logarithmic axis no bound goes below a tenth of the smallest value.
        low = np.maximum(values - bounds, 0.1 * np.min(values[positive]))
        if len(values) > _FEW:
            axes.semilogy(numbers, shown, ".", color=Colour.SGD, label=of)
            band = {"color": Colour.REFERENCE, "alpha": 0.4, "label": "bounds on the error"}
            axes.fill_between(numbers, low, values + bounds, **band)
        else:
            axes.set_yscale("log")
            errors = np.maximum([values - low, bounds], 0)
            bars = {"color": Colour.SGD, "ecolor": Colour.REFERENCE, "capsize": 3}
            axes.errorbar(
                numbers, shown, errors, fmt="o", label=f"{of}, bounds on the error", **bars
            )
    else:
        axes.text(0.5, 0.5, "none is known", ha="center", transform=axes.transAxes)
    _draw_rate(axes, report)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("eigenvalue number, largest first")
    axes.set_ylabel(f"eigenvalue of {of}")
    axes.set_title(
        "All eigenvalues that are not zero" if report.is_whole else "Largest eigenvalues"
    )
    # matplotlib warns about a legend without entries.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _draw_rate(axes: Any, report: Report) -> None:
    """The sharpness at which the learning rate, and its threshold, would be at 2/λ."""
    threshold = report.quantities.get("largest stable learning rate")
    share = report.quantities.get("learning rate / largest stable")
    if threshold is None:
        return
    label = f"2/η*, η* = {threshold.value:.3g}"
    axes.axhline(2 / threshold.value, color=Colour.REFERENCE, ls=":", label=label)
    if share is not None:
        rate = share.value * threshold.value
        label = f"2/η, η = {rate:.3g} = {share.value:.2g} η*"
        axes.axhline(2 / rate, color=Colour.SGD, ls="--", label=label)


def _draw_leaves(axes: Any, report: Report) -> None:
    leaves = sorted(report.leaves, key=lambda leaf: leaf.trace)[-_LEAVES:]
    if not leaves:
        axes.set_axis_off()
        return
    places = np.arange(len(leaves))
    traces = np.array([leaf.trace for leaf in leaves])
    errors = 2 * np.array([leaf.standard_error for leaf in leaves])
    axes.barh(places, traces, xerr=errors, color=Colour.SGD, ecolor=Colour.REFERENCE, capsize=2)
    axes.set_yticks(places, [_short(leaf.leaf) for leaf in leaves], fontsize=9)
    axes.set_xlim(left=0)
    axes.set_xlabel("part of tr G, ± 2 standard errors")
    rest = len(report.leaves) - len(leaves)
    whole = report["trace of G"]
    error = "" if whole.standard_error is None else f" ± {whole.standard_error:.1g}"
    where = f"the {len(leaves)} largest of {rest + len(leaves)} leaves" if rest else "leaf by leaf"
    axes.set_title(f"tr G = {whole.value:.4g}{error}, {where}")


def _short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= 36 else "…" + name[-35:]
