"""The picture of a spectrum, or of two."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow.plotting._style import Colour, styled


@styled
@checked
def plot_spectrum(
    values: Any,
    other: Any = None,
    *,
    labels: tuple[str, str] = ("before the walk", "after the walk"),
    max_eigenvalues: int = 60,
    axes: Any = None,
) -> Any:
    """Draw the largest eigenvalues, largest first, on a logarithmic axis; or those of two spectra.

    Args:
        values: eigenvalues, any order; those that are not positive are left out.
        other: a second spectrum, or None.
        labels: of both, for the legend.
        max_eigenvalues: of each, the largest.
        axes: of matplotlib; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: a spectrum that is no vector of numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow.plotting import plot_spectrum
        >>> axes = plot_spectrum(jnp.array([1.0, 0.1]), jnp.array([0.5, 0.2]))
        >>> print(axes.get_yscale())
        log
    """
    checked_count("plot_spectrum: max_eigenvalues", max_eigenvalues)
    if axes is None:
        _, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    styles = ((Colour.GRADIENT_FLOW, "o"), (Colour.LIMIT, "."))
    for spectrum, (colour, style), label in zip((values, other), styles, labels):
        if spectrum is None:
            continue
        spectrum = np.asarray(spectrum)
        if spectrum.ndim != 1 or spectrum.dtype.kind not in "fiu":
            raise ValueError(
                "plot_spectrum: a spectrum must be a vector of real numbers; got an array of shape "
                f"{spectrum.shape} and dtype {spectrum.dtype}."
            )
        largest = np.sort(spectrum)[::-1][:max_eigenvalues]
        numbers = np.arange(1, len(largest) + 1)
        shown = np.where(largest > 0, largest, np.nan)
        axes.semilogy(numbers, shown, style, color=colour, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("eigenvalue number, largest first")
    axes.set_ylabel("eigenvalue")
    if other is not None:
        axes.legend()
    return axes
