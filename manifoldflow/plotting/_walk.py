"""The picture of a walk along a zero-loss manifold."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow._results import Solution
from manifoldflow.plotting._spectrum import plot_spectrum
from manifoldflow.plotting._style import Colour, styled


@styled
@checked
def plot_walk(
    walk: Solution,
    *,
    sharpness: str | None = None,
    test: str | None = None,
    test_label: str | None = None,
    spectra: tuple[Any, Any] | None = None,
    max_eigenvalues: int = 60,
    caption: str = "",
) -> Figure:
    """The figure of one or two observables against time; Gram spectra before and after.

    Args:
        walk: a solution of `walk`, `solve` or `simulate` with an observable that is one number.
        sharpness: name of the observable on the left axis; by default "sharpness" if it was
            observed, else the first.
        test: name of one for the right axis; by default "test_accuracy" if it was observed.
        test_label: the words for it on the axis; by default its name.
        spectra: eigenvalues of the Gram matrix at the start and at the end, any order.
        max_eigenvalues: how many of the largest to show.
        caption: sentences to print below.

    Returns:
        The figure, to be saved or shown.

    Raises:
        ValueError: an observable that the walk does not have, or that is no single number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow.plotting import plot_walk
        >>> circle = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
        >>> flow, observe = (
        ...     mf.RiemannianGradientFlow(circle, lambda p: p[1]),
        ...     {"height": lambda p: p[1]},
        ... )
        >>> walk = mf.solve(flow, jnp.array([0.6, 0.8]), end_time=1.0, observe=observe)
        >>> print(plot_walk(walk).axes[0].get_ylabel())
        height
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


def _draw_path(
    axes: Any, walk: Solution, left: str | None, right: str | None, right_label: str | None
) -> None:
    seen = _observables(walk)
    left = _known(seen, left, "sharpness" if "sharpness" in seen else next(iter(seen)))
    assert left is not None
    right = _known(seen, right, "test_accuracy" if "test_accuracy" in seen else None)
    times = np.asarray(walk.times)
    is_sharpness = left == "sharpness"
    label = "tr ∇²L" if is_sharpness else left
    handles = axes.plot(times, seen[left], color=Colour.LIMIT, label=label)
    axes.set_xlabel("time of the run" if walk.clock is None else f"time  t = {walk.clock}")
    axes.set_ylabel("sharpness  tr ∇²L" if is_sharpness else left, color=Colour.LIMIT)
    if np.nanmin(seen[left]) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_title("Along the manifold of perfect fits" if is_sharpness else "Along the walk")
    if right is not None:
        handles += _draw_right(axes.twinx(), times, seen[right], right_label or right)
    axes.legend(handles=handles, loc="upper right", frameon=False)


def _draw_right(axes: Any, times: Any, values: Any, label: str) -> list[Any]:
    handles = axes.plot(times, values, color=Colour.TEST, ls="--", label=label)
    axes.set_ylabel(label, color=Colour.TEST)
    # A wide axis: differences of a percent on a few hundred test examples are noise.
    middle = np.mean(axes.get_ylim())
    reach = max(0.15 * abs(middle), np.ptp(axes.get_ylim()))
    axes.set_ylim(middle - reach, middle + reach)
    return handles


def _observables(walk: Solution) -> dict[str, Any]:
    found = {name: np.asarray(values) for name, values in walk.observables.items()}
    found = {name: values for name, values in found.items() if values.ndim == 1}
    if not found:
        raise ValueError(
            "plot_walk needs an observable that is one number at every save; got "
            f"{sorted(walk.observables)}. Solve with observe={{'trace': loss.trace_gauss_newton}}."
        )
    return found


def _known(seen: dict[str, Any], name: str | None, default: str | None) -> str | None:
    if name is not None and name not in seen:
        raise ValueError(f"plot_walk: observables are {sorted(seen)}; got {name!r}.")
    return default if name is None else name


def _draw_spectra(axes: Any, spectra: tuple[Any, Any], max_eigenvalues: int) -> None:
    plot_spectrum(*spectra, max_eigenvalues=max_eigenvalues, axes=axes)
    axes.set_ylabel("eigenvalue of scale·J Jᵀ")
    axes.set_title("Largest eigenvalues of the Gram matrix (NTK)")
