"""Walks that keep what a network does on its data, and lower its curvature or rounding error."""

from manifoldflow.walks._before_after import (
    before_after as before_after,
    BeforeAfter as BeforeAfter,
)
from manifoldflow.walks._hold import HeldOutputs as HeldOutputs, hold_outputs as hold_outputs
from manifoldflow.walks._objectives import (
    AbstractObjective as AbstractObjective,
    Flatness as Flatness,
    LargestEigenvalue as LargestEigenvalue,
    WeightNorm as WeightNorm,
)
from manifoldflow.walks._rounding import Rounding as Rounding
from manifoldflow.walks._stochastic import StochasticWalk as StochasticWalk
from manifoldflow.walks._walk import walk as walk
