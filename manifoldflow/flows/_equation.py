"""A limit in one line: its form, and the numbers that say how fast it is."""

from typing import Any

from manifoldflow._clock import AbstractClock
from manifoldflow._errors import is_traced
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss
from manifoldflow.noise import (
    AbstractDataNoise,
    AbstractNoise,
    hessian_trace,
    log_determinant,
    ShortLimit,
)
from manifoldflow.updates import AbstractUpdate

_POTENTIALS: dict[Any, str] = {hessian_trace: "tr∇²L", log_determinant: "ln|∇²L|₊"}


def equation_of(
    limit: ShortLimit | None,
    loss: AbstractLoss | None,
    noise: AbstractNoise,
    update: AbstractUpdate,
) -> str:
    """The equation Y' = −rate·P∇potential with its rate, c and batch size, and the clock."""
    name = type(update).__name__
    if limit is None:
        words = f"the general limit of {name} under {type(noise).__name__}"
    else:
        potential = _POTENTIALS.get(limit.potential, "f(∇²L)")
        slope = f"{_number(limit.rate)}·P∇{potential}"
        words = f"Y' = −{slope}" if limit.is_ode else f"dY = PF dW + ½ tr II dt − {slope} dt"
        if getattr(update, "weight_decay", None) is not None:
            words += " + PG" if limit.is_ode else " + PG dt"
    if isinstance(noise, AbstractDataNoise) and isinstance(loss, AbstractExampleLoss):
        multiple = noise.hessian_multiple(loss)
        size = getattr(noise, "batch_size", None) or loss.num_examples
        strength = "" if multiple is None else f"c = {_number(multiple)} in "
        words += f", {strength}batches of {size} of {loss.num_examples} examples"
    clock: AbstractClock = update.clock
    return f"{words}, t = {clock.formula}"


def _number(value: Any) -> str:
    return "(traced)" if is_traced(value) or getattr(value, "ndim", 0) else f"{float(value):.3g}"
