"""Pictures of walks and manifolds. Needs matplotlib: `pip install manifoldflow[plot]`."""

from manifoldflow.plotting._before_after import plot_before_after as plot_before_after
from manifoldflow.plotting._check import plot_check as plot_check
from manifoldflow.plotting._convergence import plot_convergence as plot_convergence
from manifoldflow.plotting._ensemble import plot_ensemble as plot_ensemble
from manifoldflow.plotting._light import light_png as light_png
from manifoldflow.plotting._report import plot_report as plot_report
from manifoldflow.plotting._spectrum import plot_spectrum as plot_spectrum
from manifoldflow.plotting._style import Colour as Colour, shades as shades
from manifoldflow.plotting._surface import (
    draw_curve as draw_curve,
    draw_surface as draw_surface,
    surface_axes as surface_axes,
)
from manifoldflow.plotting._walk import plot_walk as plot_walk
