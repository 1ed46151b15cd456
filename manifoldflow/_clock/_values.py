"""Clocks as values: a step of learning rate η takes the time gain·η^power."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from manifoldflow._boundary import checked
from manifoldflow._clock._sums import checked_momentum, num_steps_for, step_times
from manifoldflow._errors import checked_positive
from manifoldflow._types import Scalar


class AbstractClock(eqx.Module):
    """The time in which a limit runs: each step of learning rate η adds gain·η^power.

    Two solutions can be compared if their clocks are of one kind; their gains may differ. A
    subclass defines `power`, `gain` and `formula`.

    Examples:
        >>> import manifoldflow as mf
        >>> clock = mf.LimitClock(momentum=0.9)
        >>> isinstance(clock, mf.AbstractClock), clock.power, clock.formula
        (True, 2, 'Ση²/(1−β)²')
        >>> print(clock.times(0.1, 2).round(3))
        [0. 1. 2.]
    """

    @property
    @abc.abstractmethod
    def power(self) -> int:
        """The power 1 or 2 of the learning rate in the time of a step."""

    @property
    @abc.abstractmethod
    def gain(self) -> Any:
        """The time of a step over η^power, a positive number."""

    @property
    @abc.abstractmethod
    def formula(self) -> str:
        """The formula of the time after k steps, for axes and messages."""

    @checked
    def times(self, learning_rate: Any, num_steps: int) -> Float[Array, " k"]:
        """The times of the clock after 0, 1, …, num_steps steps.

        Args:
            learning_rate: η, a positive number, or a schedule step ↦ η ≥ 0.
            num_steps: a positive integer.

        Returns:
            num_steps + 1 times in JAX's default float type, correct to a few rounding errors.

        Raises:
            ValueError: a concrete learning rate out of range.
        """
        return step_times(learning_rate, num_steps, self.power, self.gain)

    @checked
    def num_steps(self, learning_rate: Any, end_time: Any, *, max_steps: int = 10**8) -> int:
        """The smallest number of steps after which the clock shows at least `end_time`.

        Args:
            learning_rate: η > 0, or a schedule; concrete, as it decides the length of a run.
            end_time: positive and finite.
            max_steps: more steps than these are an error.

        Raises:
            ValueError: values that are traced or out of range; an end time that is not reached
                within `max_steps`.
        """
        return num_steps_for(learning_rate, end_time, max_steps=max_steps, clock=self)


class LimitClock(AbstractClock):
    """The clock Ση²/(1−β)² of the limiting diffusion of SGD.

    Args:
        momentum: β in [0, 1), heavy-ball or Nesterov.

    References:
        [LiWangArora2022, Theorem 4.6].

    Examples:
        >>> import manifoldflow as mf
        >>> mf.LimitClock().num_steps(learning_rate=0.01, end_time=1.0)
        10000
    """

    momentum: Any

    def __init__(self, momentum: Any = 0.0):
        self.momentum = checked_momentum(momentum)

    @property
    def power(self) -> int:
        return 2

    @property
    def gain(self) -> Any:
        # Momentum moves each gradient by η/(1−β) in all: the limit clock has its square.
        return (1 - self.momentum) ** -2

    @property
    def formula(self) -> str:
        return "Ση²/(1−β)²"


class GradientClock(AbstractClock):
    """The clock Ση/(1−β) of gradient flow.

    Args:
        momentum: β in [0, 1), heavy-ball or Nesterov.

    Examples:
        >>> import manifoldflow as mf
        >>> mf.GradientClock().num_steps(learning_rate=0.01, end_time=1.0)
        100
    """

    momentum: Any

    def __init__(self, momentum: Any = 0.0):
        self.momentum = checked_momentum(momentum)

    @property
    def power(self) -> int:
        return 1

    @property
    def gain(self) -> Any:
        return 1 / (1 - self.momentum)

    @property
    def formula(self) -> str:
        return "Ση/(1−β)"


class SAMClock(AbstractClock):
    """The clock Σηρ² of sharpness-aware minimisation.

    Args:
        radius: ρ > 0.

    References:
        [WenMaLi2023].

    Examples:
        >>> import manifoldflow as mf
        >>> mf.SAMClock(radius=0.1).num_steps(learning_rate=0.01, end_time=1.0)
        10000
    """

    radius: Scalar

    def __init__(self, radius: Any):
        self.radius = checked_positive("SAMClock: radius", radius, "It is a length.")

    @property
    def power(self) -> int:
        return 1

    @property
    def gain(self) -> Any:
        return self.radius**2

    @property
    def formula(self) -> str:
        return "Σηρ²"


class DecayClock(AbstractClock):
    """The clock Σηλ of weight decay alone.

    Args:
        weight_decay: λ > 0, where a step subtracts ηλθ; 1 for times in units of 1/λ.

    Examples:
        >>> import manifoldflow as mf
        >>> mf.DecayClock(weight_decay=0.1).num_steps(learning_rate=0.01, end_time=1.0)
        1000
    """

    weight_decay: Scalar

    def __init__(self, weight_decay: Any = 1.0):
        self.weight_decay = checked_positive("DecayClock: weight_decay", weight_decay)

    @property
    def power(self) -> int:
        return 1

    @property
    def gain(self) -> Any:
        return self.weight_decay

    @property
    def formula(self) -> str:
        return "Σηλ"


def clock_of(run: Any) -> str | None:
    """The formula of the clock of a flow, an update or a solution, None where it has none."""
    clock = getattr(run, "clock", None)
    return clock.formula if isinstance(clock, AbstractClock) else clock


def check_same_clock(name: str, *runs: Any) -> None:
    """Refuse to compare what runs on different clocks.

    Raises:
        ValueError: two of the clocks that are known differ in kind.
    """
    kinds = sorted({clock for clock in map(clock_of, runs) if clock is not None})
    if len(kinds) > 1:
        raise ValueError(
            f"{name} compares runs on one clock; got those on {' and '.join(kinds)}. Run both to "
            "the same time of one clock, or compare their final points."
        )
