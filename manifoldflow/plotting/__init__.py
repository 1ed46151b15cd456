"""Pictures of walks and manifolds. Needs matplotlib: `pip install manifoldflow[plot]`."""

from manifoldflow.plotting._check import plot_check as plot_check
from manifoldflow.plotting._report import plot_report as plot_report
from manifoldflow.plotting._walk import plot_walk as plot_walk
