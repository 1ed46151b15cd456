"""Clocks: how far the steps of an optimiser go in the time of its limit."""

from manifoldflow._clock._sums import (
    gradient_flow_times as gradient_flow_times,
    limit_times as limit_times,
    num_steps_for as num_steps_for,
)
from manifoldflow._clock._values import (
    AbstractClock as AbstractClock,
    check_same_clock as check_same_clock,
    clock_of as clock_of,
    DecayClock as DecayClock,
    GradientClock as GradientClock,
    LimitClock as LimitClock,
    SAMClock as SAMClock,
)
