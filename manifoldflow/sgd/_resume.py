"""Runs that are written to a file as they go, and go on from it to the last bit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._journal import (
    Identity,
    Journal,
    observables_of,
    parts_of,
    Place,
    program,
    start_of,
)
from manifoldflow._results import Solution
from manifoldflow._run import (
    AbstractRun,
    check_concrete,
    Leg,
    recorded,
    Report,
    Save,
    Stationary,
)
from manifoldflow._types import Coordinates, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.sgd._loop import Problem, Row, share, solution_of, State, Stepper, steps_of_saves

_TIME_TOLERANCE = 1e-5


def resumable_run(
    problem: Problem,
    coordinates: Coordinates,
    times: Float[Array, " saves"],
    num_steps: int,
    momentum: Any,
    checkpoint: Place | None,
    resume: Place | None,
) -> Solution:
    """The run save by save, from wherever a file has got to."""
    check_concrete("simulate", (problem, coordinates, times))
    save_steps = steps_of_saves(num_steps, len(times) - 1)
    # What is shown is shown between the legs.
    quiet = dataclasses.replace(problem, meter=dfx.NoProgressMeter(), reports=())
    state = _begin(quiet, coordinates)
    row_like = eqx.filter_eval_shape(lambda p, s, t: Stepper(p).row(s, t), quiet, state, times[0])
    journal = Journal(
        "simulate",
        _identity(quiet, state, momentum),
        (row_like.coordinates, row_like.observables, ()),
        state,
        {int(step): float(time) for step, time in zip(save_steps, times)},
        _TIME_TOLERANCE,
    )
    run = _Simulation(problem.meter, problem.reports, quiet, state, times, save_steps)
    state = recorded(run, journal, checkpoint, resume)
    rows = Row(*journal.rows()[:2])
    num_gradients = jnp.asarray(
        eqx.filter_eval_shape(_step, quiet, state, jnp.zeros((), jnp.int32))[1]
    )
    return solution_of(quiet, coordinates, rows, state, times, num_steps, num_gradients)


class _Simulation(AbstractRun[State]):
    """SGD by legs."""

    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    problem: Problem
    first: State
    times: Float[Array, " saves"]
    save_steps: np.ndarray

    def start(self) -> Leg:
        return self._leg_to(0, self.first, 0)

    def again(self, journal: Journal, state: State, step: int) -> State:
        """At the last save where the file has gone further than wanted."""
        if journal.step == step:
            return state
        is_later = state.diverged_at >= journal.step
        stopped = state.stopped_after
        if stopped is not None:
            stopped = jnp.where(stopped > journal.step, -1, stopped)
        return dataclasses.replace(
            state,
            coordinates=journal.last()[0],
            diverged_at=jnp.where(is_later, -1, state.diverged_at),
            stopped_after=stopped,
        )

    def legs(self, state: State, journal: Journal) -> Iterator[Leg]:
        for number in range(journal.num_done, len(self.times)):
            leg = self._leg_to(number, state, journal.step)
            state = leg.state
            yield leg

    def _leg_to(self, number: int, state: State, step: int) -> Leg:
        last, num_steps = int(self.save_steps[number]), int(self.save_steps[-1])
        time = self.times[number]
        state, row = _leg(self.problem, state, np.int32(step), np.int32(last), time)
        kept = row.coordinates, row.observables, ()
        is_end, is_going = last == num_steps, bool(state.is_going)
        save = Save(last, time, kept, state, must_write=is_end, is_told=is_going)
        return Leg(state, share(last, num_steps), save)


def _identity(problem: Problem, state: State, momentum: Any) -> Identity:
    """The identity of this run among others: all that its steps depend on."""
    point = _tree.join(state.coordinates, problem.remainder)
    rate, step, until = problem.learning_rate, jnp.zeros((), jnp.int32), problem.until
    functions, ends = observables_of(problem.observe, point), {}
    if until is not None:
        ends = {"until": "a function", **parts_of("until", until)}
    if until is not None and not isinstance(until, Stationary):
        functions["until"] = program(until, point)
    # The steps themselves, whatever ends them.
    problem = dataclasses.replace(problem, until=None)
    state = dataclasses.replace(state, stopped_after=None)
    return Identity(
        values={
            "key": parts_of("key", problem.key)["key"],
            **start_of(state.coordinates, problem.remainder),
            **parts_of("loss", problem.loss),
            **parts_of("noise", problem.noise),
            **parts_of("learning rate", rate),
            "momentum": repr(float(momentum)),
            **parts_of("optimizer", problem.optimizer),
            **parts_of("first state of the optimizer", state.opt_state, whole=True),
            **ends,
        },
        functions=functions,
        chain={
            "loss": program(_value, problem.loss, point),
            "noise": program(_gradient, problem, state),
            "learning rate": program(rate, step) if callable(rate) else "",
            "optimizer": program(_step, problem, state, step),
        },
    )


@eqx.filter_jit
def _begin(problem: Problem, coordinates: Coordinates) -> State:
    return Stepper(problem).start(coordinates)


@eqx.filter_jit
def _value(loss: AbstractLoss, point: Any) -> Scalar:
    return loss(point)


@eqx.filter_jit
def _gradient(problem: Problem, state: State) -> Tangent:
    return Stepper(problem).gradient(state.coordinates, jnp.zeros((), jnp.int32))


@eqx.filter_jit
def _step(problem: Problem, state: State, step: Array) -> tuple[State, int]:
    """One step, and how many gradients it takes."""
    stepper = Stepper(problem)
    return stepper(state, step), stepper.num_gradients


@eqx.filter_jit
def _leg(problem: Problem, state: State, first: Any, last: Any, time: Scalar) -> tuple[State, Row]:
    stepper = Stepper(problem)
    state = jax.lax.fori_loop(first, last, lambda k, s: stepper(s, k), state)
    return state, stepper.row(state, time)
