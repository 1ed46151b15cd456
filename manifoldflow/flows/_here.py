"""The state of a solve between two saves, and the `Solution` that they add up to."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._clock import clock_of
from manifoldflow._results import or_nan, RESULTS, Solution
from manifoldflow._run import observed, show
from manifoldflow._types import Coordinates, Flag, Scalar
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.flows._options import Options
from manifoldflow.flows._start import Start
from manifoldflow.flows._task import Task

COUNTS = "num_steps", "num_rejected", "num_gradients", "num_factorizations"


class Here(eqx.Module):
    """The state of a leg, at its start and at its end."""

    coordinates: Coordinates
    time: Scalar
    result: RESULTS
    step: Scalar  # that adaptive steps will try next
    stats: dict[str, Array]
    meter: PyTree[Array] = None

    @property
    def is_going(self) -> Flag:
        return self.result == RESULTS.successful

    @property
    def is_lost(self) -> Flag:
        return ~(self.is_going | (self.result == RESULTS.stopped_early))


def begun(coordinates: Coordinates, time: Scalar, result: RESULTS, step: Scalar) -> Here:
    """The state of a solve that has done nothing yet in this call."""
    stats = {name: jnp.zeros((), int) for name in COUNTS}
    stats["max_defect"] = jnp.zeros((), _tree.dtype_of(coordinates))
    return Here(coordinates, time, result, step, stats)


def at_start(
    flow: AbstractFlow, start: Start, times: Array, end_time: Scalar, options: Options
) -> Here:
    result = start.result
    is_forward = (end_time > 0) & jnp.isfinite(end_time)
    result = _tree.where(is_forward, result, RESULTS.bad_end_time)
    step = first_step(times, end_time, options)
    return begun(flow.split(start.point)[0], times[0], result, step)


def first_step(times: Array, end_time: Scalar, options: Options) -> Scalar:
    """A thousandth of the way to the first save: adaptive steps soon find their size from there.

    A better guess would need the drift, which is most of what has to be compiled. Later saves
    have no say, so that a solve that was asked for fewer can go on to them.
    """
    # A size of steps is a choice: a derivative through it would be spurious.
    if options.noise is not None:
        return jax.lax.stop_gradient(end_time / 1000)
    step = (times[1] - times[0]) / 1000
    # The first save may be at the start.
    return jax.lax.stop_gradient(_tree.where(step > 0, step, end_time / 1000))


Row = tuple[Coordinates, dict[str, PyTree[Array]]]
"""What is kept at a save: coordinates, and what is observed there."""


def row_of(here: Here, task: Task) -> Row:
    """The row of a save: NaN where the solve has failed before; where it ended early, its end."""
    is_there = ~here.is_lost
    coordinates = or_nan(here.coordinates, is_there)
    point = _tree.join(here.coordinates, task.remainder)
    observables = observed(task.options.observe, point)
    return coordinates, or_nan(observables, is_there)


def report(here: Here, row: Row, options: Options) -> None:
    """Show a save, if the solve has come to it."""

    if options.reports:
        told = lambda: show(options.reports, here.time, *row)
        # A callback is no value that a `where` could leave out.
        jax.lax.cond(here.is_going, told, lambda: None)


def solution_of(
    here: Here, rows: Row, ended: Float[Array, " saves"], times: Array, task: Task
) -> Solution:
    """All saves, from rows with a leading axis of at least as many as there are times.

    `ended` are the times that the solve had when the rows were made: those of saves that come
    after an early end are the time of that end.
    """
    is_early = here.result == RESULTS.stopped_early
    points, observables = jax.tree.map(lambda leaf: leaf[: len(times)], rows)
    return Solution(
        times=_tree.where(is_early, ended[: len(times)], times),
        points=points,
        observables=observables,
        stats=here.stats,
        result=here.result,
        final_coordinates=or_nan(here.coordinates, ~here.is_lost),
        remainder=task.remainder,
        clock=clock_of(task.flow),
    )


def added(stats: dict[str, Array], more: dict[str, Any]) -> dict[str, Array]:
    """The counts of one leg more, and the largest defect."""
    total = {name: stats[name] + more[name] for name in COUNTS}
    return total | {"max_defect": jnp.maximum(stats["max_defect"], more["max_defect"])}
