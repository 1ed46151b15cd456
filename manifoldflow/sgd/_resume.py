"""Runs that are written to a file as they go, and go on from it to the last bit."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._journal import Identity, Journal, parts_of, Place, program, store_of
from manifoldflow._results import Solution
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
    """The run save by save, from wherever a file has got to.

    One program does the steps between any two saves, however many they are: the bits of a
    step cannot depend on where the run was cut.
    """
    if is_traced((problem, coordinates, times)):
        raise ValueError(
            "`checkpoint` and `resume` need concrete values: call `simulate` outside jit and vmap."
        )
    save_steps = steps_of_saves(num_steps, len(times) - 1)
    state = _begin(problem, coordinates)
    row_like = eqx.filter_eval_shape(lambda p, s, t: Stepper(p).row(s, t), problem, state, times[0])
    journal = Journal(
        "simulate",
        _identity(problem, state, momentum),
        (row_like.coordinates, row_like.observables, ()),
        state,
        {int(step): float(time) for step, time in zip(save_steps, times)},
        _TIME_TOLERANCE,
    )
    meter_state = problem.meter.init()
    is_written = checkpoint is not None
    with journal.opened(checkpoint) if is_written else contextlib.nullcontext() as target:
        if resume is not None:
            state = _taken_up(journal, store_of("resume", resume))
        elif target is not None and target.has_any():
            state = _taken_up(journal, target)
        for number in range(journal.num_done, len(save_steps)):
            last = int(save_steps[number])
            state, row = _leg(problem, state, np.int32(journal.step), np.int32(last), times[number])
            journal.add((row.coordinates, row.observables, ()), last)
            if target is not None:
                journal.write(target, state, must=last == num_steps)
            meter_state = problem.meter.step(meter_state, share(last, num_steps))
    problem.meter.close(meter_state)
    rows = Row(*journal.rows()[:2])
    num_gradients = jnp.asarray(
        eqx.filter_eval_shape(_step, problem, state, jnp.zeros((), jnp.int32))[1]
    )
    return solution_of(problem, rows, state, times, num_steps, num_gradients)


def _taken_up(journal: Journal, store: Any) -> State:
    """The state in a store, or at the last save where that has gone further than wanted."""
    state, step = journal.read(store)
    if journal.step == step:
        return state
    is_later = state.diverged_at >= journal.step
    return eqx.tree_at(
        lambda s: (s.coordinates, s.diverged_at),
        state,
        (journal.last()[0], jnp.where(is_later, -1, state.diverged_at)),
    )


def _identity(problem: Problem, state: State, momentum: Any) -> Identity:
    """What tells this run from others: all that its steps depend on."""
    point = _tree.join(state.coordinates, problem.remainder)
    rate, step = problem.learning_rate, jnp.zeros((), jnp.int32)
    return Identity(
        values={
            "key": parts_of("key", problem.key)["key"],
            **parts_of("start", state.coordinates, whole=True),
            **parts_of("frozen part of the point", problem.remainder, whole=True),
            **parts_of("loss", problem.loss),
            **parts_of("noise", problem.noise),
            **parts_of("learning rate", rate),
            "momentum": repr(float(momentum)),
            **parts_of("optimizer", problem.optimizer),
            **parts_of("first state of the optimizer", state.opt_state, whole=True),
        },
        functions={
            f"observable {name!r}": program(fn, point) for name, fn in problem.observe.items()
        },
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
