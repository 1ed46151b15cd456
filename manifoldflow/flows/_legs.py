"""The two methods from one save to the next."""

from collections.abc import Callable

from manifoldflow.flows._here import Here
from manifoldflow.flows._leg_by_diffrax import leg_by_diffrax
from manifoldflow.flows._leg_by_scan import leg_by_scan
from manifoldflow.flows._options import Options

Leg = Callable[..., Here]
"""(task, here, number of the leg, its end) → there."""


def leg_of(options: Options) -> Leg:
    return leg_by_scan if options.solver is None else leg_by_diffrax
