"""Sums of powers of learning rates, and the way back from a time to a number of steps.

The clocks of SGD: steps k, the gradient flow's Σηⱼ, the limit's Σηⱼ².

Momentum β makes SGD move like plain SGD with learning rate η/(1−β), so that the first clock
runs (1−β)⁻¹ and the second (1−β)⁻² faster. SAM's clock kηρ² is ρ² times the gradient flow's.
A learning rate is a number, or a schedule step ↦ η as in Optax. Whatever is concrete is summed
by NumPy in double precision or better, inside jit as well and when JAX computes in single.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow._errors import checked_count, is_traced, real_numbers

_BLOCK = 2**14


def limit_times(learning_rate: Any, num_steps: int, momentum: Any = 0.0) -> Float[Array, " k"]:
    """The limit clock after 0, 1, …, num_steps steps: tₖ = Σ_{j<k} ηⱼ²/(1−β)².

    Args:
        learning_rate: η, a positive number, or a schedule step ↦ η ≥ 0.
        num_steps: a positive integer.
        momentum: β in [0, 1), heavy-ball or Nesterov.

    Returns:
        num_steps + 1 times in JAX's default float type, correct to a few rounding errors
        however many steps there are. Traced values out of range give NaN times, so that
        one bad member of a batch does not stop the others.

    Raises:
        ValueError: a concrete learning rate or momentum out of range.

    References: [LiWangArora2022, Theorem 4.6].
    """
    return step_times(learning_rate, num_steps, 2, (1 - checked_momentum(momentum)) ** -2)


def gradient_flow_times(
    learning_rate: Any, num_steps: int, momentum: Any = 0.0
) -> Float[Array, " k"]:
    """The gradient flow's clock after 0, 1, …, num_steps steps: tₖ = Σ_{j<k} ηⱼ/(1−β).

    Args, Returns and Raises as for `limit_times`.
    """
    return step_times(learning_rate, num_steps, 1, 1 / (1 - checked_momentum(momentum)))


def num_steps_for(
    learning_rate: Any,
    end_time: Any,
    momentum: Any = 0.0,
    max_steps: int = 10**8,
    *,
    clock: Any = limit_times,
    advice: str = "Raise the learning rate or max_steps, or ask for an earlier end",
) -> int:
    """The smallest number of steps after which the clock shows at least `end_time`.

    A clock that falls short of `end_time` by a few rounding errors, and by less than half a
    step, has reached it: η = 0.1 reaches 1 in 100 steps.

    Args:
        learning_rate: η > 0, or a schedule; concrete, as it decides the length of a scan.
        end_time: positive and finite.
        momentum: β in [0, 1).
        max_steps: more steps than these are an error.
        clock: `limit_times`, `gradient_flow_times`, or any clock's value, which then knows its
            momentum.
        advice: the remedy where the end is too far, for callers with other options.

    Raises:
        ValueError: values that are traced or out of range; an end time that is not reached
            within `max_steps`, or never because the schedule decays.
    """
    max_steps = checked_count("max_steps", max_steps)
    if is_traced((learning_rate, end_time, momentum, clock)):
        raise ValueError(_TRACED)
    power, gain = _power_and_gain(clock, momentum)
    # By NumPy: the answer is the length of a scan and must be known when tracing.
    known = np.asarray(real_numbers("end_time", end_time), float)
    if known.ndim or not 0 < known < math.inf:
        raise ValueError(f"end_time must be one positive, finite number; got {end_time!r}.")
    end = float(end_time) / gain
    rounding = 8 * max(_eps(value) for value in (learning_rate, end_time, momentum))
    if not callable(learning_rate):
        step = _checked_rate(learning_rate) ** power
        # Ten steps of 0.1 are 1 − eps in floating point: without the slack there would be eleven.
        count, shown = math.ceil((end - min(rounding * end, step / 2)) / step), max_steps * step
        if count <= max_steps:
            return max(count, 1)
    else:
        shown, done = np.longdouble(0), 0
        for rates in _blocks(learning_rate, max_steps):
            if is_traced(rates):
                raise ValueError(_TRACED)
            slack = np.minimum(max(rounding, 8 * _eps(rates)) * end, _powers(rates, power) / 2)
            shows = shown + np.cumsum(_powers(rates, power))
            reached = np.flatnonzero(shows + slack >= end)
            if len(reached):
                return done + int(reached[0]) + 1
            shown, done = shows[-1], done + len(rates)
    steps = f"max_steps={max_steps}" if "max_steps" in advice else max_steps
    reached_time = float(shown) * float(end_time) / end
    raise ValueError(
        f"The clock shows only {reached_time:.6g} after {steps} steps, short of "
        f"end_time={end_time}. {advice}; a schedule that decays fast never gets there."
    )


_TRACED = (
    "The number of steps to end_time must be known when tracing; got a traced learning_rate, "
    "schedule, end_time or momentum. Give num_steps instead, or stay outside jit and vmap."
)


def _power_and_gain(clock: Any, momentum: Any) -> tuple[int, float]:
    if hasattr(clock, "power"):
        return clock.power, float(clock.gain)
    power = 1 + (clock is limit_times)
    return power, (1 - checked_momentum(momentum)) ** -power


def step_times(learning_rate: Any, num_steps: int, power: int, gain: Any) -> Array:
    """gain·Σηᵖ after 0, 1, …, num_steps steps."""
    num_steps = checked_count("num_steps", num_steps)
    if callable(learning_rate):
        sums = _schedule_sums(learning_rate, num_steps, power)
    else:
        sums = np.arange(num_steps + 1, dtype=np.float64) * _checked_rate(learning_rate) ** power
    return jnp.asarray(sums * gain, float)


def _schedule_sums(schedule: Callable[[Any], Any], num_steps: int, power: int) -> Any:
    sums, last = [np.zeros(1)], np.longdouble(0)
    for rates in _blocks(schedule, num_steps):
        if is_traced(rates):
            return _traced_sums(_rates(schedule, 0, num_steps), power)
        block = last + np.cumsum(_powers(rates, power))
        sums, last = [*sums, block.astype(np.float64)], block[-1]
    return np.concatenate(sums)


def _traced_sums(rates: Array, power: int) -> Array:
    # JAX adds pairwise: a few rounding errors in single precision too.
    rates = jnp.where((rates >= 0) & (rates < jnp.inf), rates, jnp.nan).astype(float)
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(rates**power)])


def _blocks(schedule: Callable[[Any], Any], num_steps: int) -> Iterator[Any]:
    """The learning rates of all steps in NumPy blocks; just one traced block if they are traced."""
    for first in range(0, num_steps, _BLOCK):
        # Always whole blocks, so that odd lengths need no compilation of their own.
        rates = _rates(schedule, first, first + _BLOCK)
        if is_traced(rates):
            yield rates
            return
        rates = np.asarray(rates)[: num_steps - first]
        wrong = np.flatnonzero(~((rates >= 0) & (rates < np.inf)))
        if len(wrong):
            raise ValueError(
                "A learning-rate schedule must be finite and not negative; got "
                f"{rates[wrong[0]]} at step {first + wrong[0]}."
            )
        yield rates


def _rates(schedule: Callable[[Any], Any], first: int, stop: int) -> Array:
    # Inside jit as well, a schedule that closes over no tracer is evaluated here and now.
    with jax.ensure_compile_time_eval():
        rates = jax.vmap(lambda step: jnp.asarray(schedule(step)))(
            jnp.arange(first, stop, dtype=jnp.int32)
        )
    if rates.ndim != 1:
        raise ValueError(
            "A learning-rate schedule maps a step to one number; got an array of shape "
            f"{rates.shape[1:]}."
        )
    return rates


def _powers(rates: np.ndarray, power: int) -> np.ndarray:
    # Where there is an extended precision, a million additions cost no digit of a double.
    return rates.astype(np.longdouble) ** power


def _checked_rate(value: Any) -> Any:
    message = "learning_rate must be a positive, finite number or a schedule step ↦ η"
    return _checked(value, lambda rate: (rate > 0) & (rate < jnp.inf), message)


def checked_momentum(value: Any) -> Any:
    message = "momentum must be a number in [0, 1)"
    return _checked(value, lambda momentum: (momentum >= 0) & (momentum < 1), message)


def _checked(value: Any, is_fine: Callable[[Any], Any], message: str) -> Any:
    is_number = isinstance(value, int | float | np.ndarray | np.generic | jax.Array)
    if not is_number or isinstance(value, bool) or jnp.ndim(value):
        raise ValueError(f"{message}; got {value!r}.")
    if is_traced(value):
        value = jnp.asarray(value, float)
        return jnp.where(is_fine(value), value, jnp.nan)
    number = float(np.asarray(value))
    if not is_fine(number):
        raise ValueError(f"{message}; got {value!r}.")
    return number


def _eps(value: Any) -> float:
    """The rounding error of a value's type: that of a double for Python numbers."""
    dtype = getattr(value, "dtype", np.dtype(np.float64))
    return _precision.eps_of_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else 2.0**-52
