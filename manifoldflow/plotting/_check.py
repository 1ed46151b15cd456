"""The picture of a numerical check: an error against the size of the step."""

from typing import Any

import numpy as np

from manifoldflow._boundary import checked
from manifoldflow.diagnostics import SlopeCheck
from manifoldflow.plotting._style import Colour, styled


@styled
@checked
def plot_check(check: SlopeCheck, axes: Any = None) -> Any:
    """The error of a check against the size of the step, log-log, with the slope of the theory.

    Args:
        check: from `diagnostics.check_gradient`, `check_hessian` or `check_retraction`.
        axes: of matplotlib; new ones by default.

    Returns:
        The axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.6, 0.8])
        >>> check = mf.diagnostics.check_gradient(circle, lambda x: x[0] ** 3, x, key=jr.key(0))
        >>> axes = mf.plotting.plot_check(check)
        >>> axes.get_xlabel()
        'size t of the step'
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    # A logarithmic axis has no place for an error of exactly 0.
    sizes, errors = check.sizes, np.where(check.errors > 0, check.errors, np.nan)
    axes.loglog(sizes, errors, "o", color=Colour.DATA, markersize=3, label="measured")
    finite = np.isfinite(errors)
    if finite.any():
        anchor = int(np.nanargmin(np.abs(np.log(sizes) - np.log(check.window[1] or 1))))
        anchor = anchor if finite[anchor] else int(np.flatnonzero(finite)[0])
        line = errors[anchor] * (sizes / sizes[anchor]) ** check.expected
        kept = line >= 0.1 * np.nanmin(errors)
        axes.loglog(
            sizes[kept],
            line[kept],
            "--",
            color=Colour.REFERENCE,
            label=f"slope {check.expected:g}, theory",
        )
    if np.isfinite(check.window[0]):
        axes.axvspan(
            *check.window,
            color=Colour.REFERENCE,
            alpha=0.15,
            label=f"window, measured {check.slope:.2f}",
        )
    axes.set_xlabel("size t of the step")
    axes.set_ylabel("error")
    axes.set_title(str(check).split(":")[0] + (": holds" if check else ": fails"))
    axes.legend(fontsize=9)
    return axes
