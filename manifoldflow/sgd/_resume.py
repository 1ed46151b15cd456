"""Runs that are written to a file as they go, and go on from it to the last bit."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._solution import Solution
from manifoldflow._types import Coordinates, Scalar
from manifoldflow.sgd._journal import Journal
from manifoldflow.sgd._loop import Problem, Row, share, solution_of, State, Stepper, steps_of_saves
from manifoldflow.sgd._store import Place, store_of


def resumable_run(
    problem: Problem,
    coordinates: Coordinates,
    times: Float[Array, " saves"],
    num_steps: int,
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
    fingerprint, num_gradients = _first_step(problem, state)
    row_like = eqx.filter_eval_shape(lambda p, s, t: Stepper(p).row(s, t), problem, state, times[0])
    identity = {"key": jr.key_data(problem.key), "fingerprint": fingerprint}
    journal = Journal(save_steps, times, identity, row_like)
    target = None if checkpoint is None else store_of("checkpoint", checkpoint)
    if resume is not None:
        state = journal.read(store_of("resume", resume), state)
    elif target is not None and target.has_any():
        state = journal.read(target, state)
    meter_state = problem.meter.init()
    for number in range(journal.num_done, len(save_steps)):
        last = int(save_steps[number])
        state, row = _leg(problem, state, np.int32(journal.step), np.int32(last), times[number])
        journal.add(row, last)
        if target is not None:
            journal.write(target, state, must=last == num_steps)
        meter_state = problem.meter.step(meter_state, share(last, num_steps))
    problem.meter.close(meter_state)
    return solution_of(problem, journal.rows(), state, times, num_steps, num_gradients)


@eqx.filter_jit
def _begin(problem: Problem, coordinates: Coordinates) -> State:
    return Stepper(problem).start(coordinates)


@eqx.filter_jit
def _first_step(problem: Problem, state: State) -> tuple[Array, Int[Array, ""]]:
    """What tells this run from others, and how many gradients a step takes.

    Sums over the first gradient, which change with the loss, the data, the noise and the
    key, and over the first step, which change with the optimiser and its learning rate.
    """
    stepper = Stepper(problem)
    first = jnp.zeros((), jnp.int32)
    gradient = stepper.gradient(state.coordinates, first)
    step = _tree.subtract(stepper(state, first).coordinates, state.coordinates)
    leaves = jax.tree.leaves((state.coordinates, gradient, step))
    sums = jnp.stack([jnp.stack([jnp.sum(x), jnp.sum(jnp.abs(x))]).astype(float) for x in leaves])
    return sums, jnp.asarray(stepper.num_gradients)


@eqx.filter_jit
def _leg(problem: Problem, state: State, first: Any, last: Any, time: Scalar) -> tuple[State, Row]:
    stepper = Stepper(problem)
    state = jax.lax.fori_loop(first, last, lambda k, s: stepper(s, k), state)
    return state, stepper.row(state, time)
