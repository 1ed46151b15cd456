"""The picture of a walk along a zero-loss manifold."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow._results import Solution
from manifoldflow.plotting._style import Colour, styled


@styled
@checked
def plot_walk(
    walk: Solution,
    *,
    sharpness: str = "sharpness",
    test: str = "test_accuracy",
    test_label: str = "test accuracy",
    spectra: tuple[Any, Any] | None = None,
    max_eigenvalues: int = 60,
    caption: str = "",
) -> Figure:
    """Sharpness and test performance against limit time, and Gram spectra before and after.

    Args:
        walk: a solution with the two observables named next.
        sharpness: name of the observable with tr∇²L.
        test: name of the observable with the test performance.
        test_label: the words for that performance on the axis.
        spectra: eigenvalues of the Gram matrix at the start and at the end, any order.
        max_eigenvalues: the number of the largest to show.
        caption: sentences to print below.

    Returns:
        The figure, to be saved or shown.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> flow = mf.RiemannianGradientFlow(circle, lambda x: x[0])
        >>> seen = {"sharpness": lambda x: x[0] + 2, "test_accuracy": lambda x: 0.9 + 0 * x[0]}
        >>> walk = mf.solve(flow, jnp.array([0.6, 0.8]), end_time=1.0, observe=seen)
        >>> figure = mf.plotting.plot_walk(walk)
        >>> figure.axes[0].get_ylabel()
        'sharpness  tr ∇²L'
    """
    columns, width = (1, 6) if spectra is None else (2, 11)
    figure, panels = plt.subplots(1, columns, figsize=(width, 4.6), squeeze=False)
    _draw_path(panels[0, 0], walk, sharpness, test, test_label)
    if spectra is not None:
        _draw_spectra(panels[0, 1], spectra, max_eigenvalues)
    bottom = 0.0
    if caption:
        lines = textwrap.wrap(caption, 165 if spectra is not None else 90)
        figure.text(0.02, 0.02, "\n".join(lines), fontsize=9, va="bottom", color="#333333")
        bottom = 0.04 * len(lines) + 0.01
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return figure


def _draw_path(axes: Any, walk: Solution, sharpness: str, test: str, test_label: str) -> None:
    times = np.asarray(walk.times)
    (first,) = axes.plot(
        times, np.asarray(walk.observables[sharpness]), color=Colour.LIMIT, label="tr ∇²L"
    )
    axes.set_xlabel("limit time  t = Σ η²  (steps × learning rate²)")
    axes.set_ylabel("sharpness  tr ∇²L", color=Colour.LIMIT)
    # From 0, so that a fall of a few percent does not look like one to nothing.
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    (second,) = right.plot(
        times, np.asarray(walk.observables[test]), color=Colour.TEST, ls="--", label=test_label
    )
    right.set_ylabel(test_label, color=Colour.TEST)
    # A wide axis: differences of a percent on a few hundred test examples are noise.
    middle = np.mean(right.get_ylim())
    reach = max(0.15 * abs(middle), np.ptp(right.get_ylim()))
    right.set_ylim(middle - reach, middle + reach)
    axes.legend(handles=[first, second], loc="upper right", frameon=False)
    axes.set_title("Along the manifold of perfect fits")


def _draw_spectra(axes: Any, spectra: tuple[Any, Any], max_eigenvalues: int) -> None:
    for values, colour, style, label in (
        (spectra[0], Colour.GRADIENT_FLOW, "o", "before the walk"),
        (spectra[1], Colour.LIMIT, ".", "after the walk"),
    ):
        largest = np.sort(np.asarray(values))[::-1][:max_eigenvalues]
        positive = np.where(largest > 0, largest, np.nan)
        axes.semilogy(np.arange(1, len(largest) + 1), positive, style, color=colour, label=label)
    axes.set_xlabel("eigenvalue number, largest first")
    axes.set_ylabel("eigenvalue of scale·J Jᵀ")
    axes.legend(frameon=False)
    axes.set_title("Largest eigenvalues of the Gram matrix (NTK)")
