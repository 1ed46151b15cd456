"""The parts that all legs of a solve have in common."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow._types import Point, Scalar
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.flows._options import Options


class Task(eqx.Module):
    """The flow that is followed from save to save, and the options for its steps."""

    flow: AbstractFlow
    remainder: Point  # what of the point is no coordinate
    options: Options
    end_time: Scalar
    smallest_step: Scalar | None  # of steps with noise
    meter: dfx.AbstractProgressMeter  # for the steps of a leg
    num_legs: int = eqx.field(static=True)


def task_of(
    flow: AbstractFlow, remainder: Point, times: Array, end_time: Scalar, options: Options
) -> Task:
    legs, noise, smallest = options.legs(times, end_time), options.noise, None
    if noise is not None and noise.is_adaptive:
        # A quarter of `dtmin` of the adaptive controller: the Brownian tree must be finer than any
        # step.
        smallest = end_time / 2**14
    elif noise is not None:
        smallest = jnp.min(jnp.diff(legs)) / noise.num_steps
    # Of its steps Diffrax shows those of one solve only: of several legs the ends are shown.
    num_legs = len(legs) - 1
    shows_steps = options.solver is None or num_legs == 1
    meter = options.meter if shows_steps else dfx.NoProgressMeter()
    return Task(flow, remainder, options, end_time, smallest, meter, num_legs)
