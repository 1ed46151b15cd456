"""The picture of grokking: right answers in time, and the spectra of the weights."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from manifoldflow import _precision, Solution
from manifoldflow._command._spectrum import concentration, order_of_units, power
from manifoldflow.models import ModularAddition
from manifoldflow.plotting import Colour


def plot_grokking(model: ModularAddition, walk: Solution, start: Any) -> Figure:
    """Right answers above the training loss, against time; beside them the units' spectra."""
    figure = Figure(figsize=(12.5, 5.8), layout="constrained")  # for a file: no window is opened
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 1.05], wspace=0.03)
    left, right = halves
    answers, loss = left.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    left.suptitle(f"a + b mod {model.modulus} under weight decay, at zero training loss")
    _draw_answers(answers, model, walk)
    _draw_loss(loss, walk)
    left.align_ylabels()
    ends = [(float(walk.times[i]), float(walk.observables["test"][i])) for i in (0, -1)]
    titles = [f"time {time:g}: {test:.0%} of the tests right" for time, test in ends]
    _draw_spectra(right, model, (start, walk.final), titles)
    return figure


def _draw_answers(axes: Any, model: ModularAddition, walk: Solution) -> None:
    styles = [
        ("train", Colour.LIMIT, "s--", f"{len(model.train)} training pairs"),
        ("test", Colour.TEST, "o-", f"{len(model.test)} pairs never trained on (test)"),
    ]
    for name, colour, style, label in styles:
        values = 100 * np.asarray(walk.observables[name])
        axes.plot(walk.times, values, style, color=colour, label=label, markersize=4.5, lw=2)
    axes.axhline(100 / model.modulus, color=Colour.REFERENCE, ls=":", lw=1.3, label="guessing")
    axes.set_ylim(-4, 106)
    axes.set_ylabel("right answers (%)")
    axes.legend(loc="center right", framealpha=0.95)
    axes.grid(alpha=0.25)


def _draw_loss(axes: Any, walk: Solution) -> None:
    values = np.asarray(walk.observables["loss"])
    # Residuals that are rounding have squares of the size eps².
    zero, least = (
        10 * _precision.eps_of_dtype(values) ** 2,
        _precision.eps_of_dtype(values) ** 2 / 500,
    )
    shown = np.maximum(values, 2 * least)
    axes.semilogy(walk.times, shown, "s--", color=Colour.LIMIT, markersize=4.5, lw=2)
    axes.axhspan(least, zero, color="#999999", alpha=0.25, lw=0)
    axes.text(walk.times[-1], 10 * zero, "grey: zero, to rounding", ha="right", va="bottom")
    axes.set_ylim(least, 10)
    axes.set_ylabel("training loss")
    axes.set_xlabel("time  Σ ηλ  (steps × learning rate × weight decay)")
    axes.grid(alpha=0.25)


def _draw_spectra(figure: Any, model: ModularAddition, points: tuple, titles: list) -> None:
    p, panels, image = model.modulus, figure.subplots(1, 2, sharey=True), None
    lengths = [np.sqrt(power(p, point)) for point in points]
    order = order_of_units(p, points[1])
    for axes, length, point, title in zip(panels, lengths, points, titles):
        image = axes.imshow(
            length[order], aspect="auto", cmap="cividis", vmin=0, vmax=np.max(lengths),
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(
            f"{title}\n{concentration(p, point):.0%} in one frequency a unit", fontsize=10
        )
        if p <= 31:
            axes.set_xticks(np.arange(length.shape[1]))
    panels[0].set_ylabel("hidden unit, sorted by its main frequency at the end")
    bar = figure.colorbar(image, ax=panels, pad=0.03)
    bar.set_label("length of the unit's weights at this frequency")
    figure.supxlabel(f"frequency (waves per {p} numbers)", fontsize=10)
    figure.suptitle("Fourier spectrum of the weights: one row per hidden unit")
