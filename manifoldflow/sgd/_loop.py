"""The loop of SGD: one step, many steps, and their saves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _tree
from manifoldflow._results import or_nan, RESULTS, Solution
from manifoldflow._run import observed, Report, show, stops_at, Until
from manifoldflow._types import Coordinates, Flag, Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise import AbstractStochasticGradient
from manifoldflow.sgd._optimizer import check_clock, transform_of, updated

_DIVERGED = 1e8
_METER_UPDATES = 1000


class Problem(eqx.Module):
    """The parts of a run that do not change, ready to be passed through jit."""

    loss: AbstractLoss
    noise: AbstractStochasticGradient
    optimizer: Callable[..., Any]
    learning_rate: Scalar | Callable[..., Any]
    remainder: Point
    key: Key
    observe: dict[str, Callable[[Point], PyTree[Any]]]
    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    until: Until | None
    clock_gain: float | None = eqx.field(static=True)  # that a bare transform must have
    clock: str = eqx.field(static=True)

    @property
    def has_meter(self) -> bool:
        return not isinstance(self.meter, dfx.NoProgressMeter)


class State(eqx.Module):
    """The parts of a run that a step changes: all that a checkpoint has to keep."""

    coordinates: Coordinates
    opt_state: PyTree[Array]
    diverged_at: Int[Array, ""]
    bound: Scalar
    stopped_after: Int[Array, ""] | None  # this number of steps; None where nothing stops a run

    @property
    def is_going(self) -> Flag:
        return jnp.asarray(True) if self.stopped_after is None else self.stopped_after < 0


class Row(eqx.Module):
    """One save, or all of them along a leading axis."""

    coordinates: Coordinates
    observables: dict[str, PyTree[Array]]


class Stepper:
    """One step of SGD; made anew wherever one is traced."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.transform = transform_of(problem.optimizer, problem.learning_rate)
        self.num_gradients = 0  # in one step, known once that is traced

    def start(self, coordinates: Coordinates) -> State:
        if self.problem.clock_gain is not None:
            problem = self.problem
            one = optax.constant_schedule(1.0) if callable(problem.learning_rate) else 1.0
            # Asked with the learning rate 1: the answer is then the gain itself.
            check_clock(problem.optimizer, one, coordinates, self.problem.clock_gain)
        return State(
            coordinates,
            jax.tree.map(jnp.asarray, self.transform.init(coordinates)),
            jnp.asarray(-1, jnp.int32),
            # Long before overflow: later steps would only spread NaN, and cost as much.
            _DIVERGED * jnp.maximum(_largest(coordinates), 1),
            None if self.problem.until is None else jnp.asarray(-1, jnp.int32),
        )

    def __call__(self, state: State, step: Int[Array, ""]) -> State:
        if self.problem.until is None:
            return self._moved(state, step)
        return jax.lax.cond(state.is_going, self._asked, lambda state, _: state, state, step)

    def _asked(self, state: State, step: Int[Array, ""]) -> State:
        """The state after the step, and whether the run ends with it."""
        problem, state = self.problem, self._moved(state, step)
        assert problem.until is not None
        point = _tree.join(state.coordinates, problem.remainder)
        ends = stops_at(problem.until, point, problem.loss.gradient) & (state.diverged_at < 0)
        done = jnp.where(ends, step + 1, -1).astype(jnp.int32)
        return dataclasses.replace(state, stopped_after=done)

    def _moved(self, state: State, step: Int[Array, ""]) -> State:
        # A barrier: what the compiler makes of a step must not depend on what is around it,
        # or a run that was resumed would differ in the last digit.
        state, step = jax.lax.optimization_barrier((state, step))
        here = state.coordinates
        updates, opt_state = self._update(here, state.opt_state, step)
        moved = optax.apply_updates(here, updates)
        fine = _largest(moved) < state.bound  # False for NaN as well
        newly = ~fine & (state.diverged_at < 0)
        diverged_at = jnp.where(newly, step.astype(jnp.int32), state.diverged_at)
        return State(
            _tree.where(diverged_at < 0, moved, here),
            jax.tree.map(_as_before, opt_state, state.opt_state),
            diverged_at,
            state.bound,
            state.stopped_after,
        )

    def gradient(self, coordinates: Coordinates, step: Array) -> Tangent:
        """The stochastic gradient with the batch and the labels of this step."""
        problem = self.problem
        point = _tree.join(coordinates, problem.remainder)
        found = problem.noise.gradient(problem.loss, point, jr.fold_in(problem.key, step))
        return _tree.as_tangent(coordinates, found, "The noise's gradient")

    def _update(self, here: Coordinates, opt_state: PyTree[Array], step: Array) -> Any:
        self.num_gradients = 1

        def grad_fn(coordinates: Coordinates, *_: Any) -> Tangent:
            self.num_gradients += 1
            return self.gradient(coordinates, step)

        def value_fn(coordinates: Coordinates) -> Scalar:
            return self.problem.loss(_tree.join(coordinates, self.problem.remainder))

        slope = self.gradient(here, step)
        return updated(self.transform, slope, opt_state, here, grad_fn, value_fn)

    def row(self, state: State, time: Scalar) -> Row:
        """The save of a state, told to whoever follows the run."""
        point = _tree.join(state.coordinates, self.problem.remainder)
        saved = Row(state.coordinates, observed(self.problem.observe, point))
        saved = or_nan(saved, state.diverged_at < 0, of=(self.problem, state))
        told = lambda: show(self.problem.reports, time, saved.coordinates, saved.observables)
        if self.problem.reports and self.problem.until is not None:
            jax.lax.cond(state.is_going, told, lambda: None)
        else:
            told()
        return saved


@eqx.filter_jit
def whole_run(
    problem: Problem,
    coordinates: Coordinates,
    times: Float[Array, " saves"],
    num_steps: int,
) -> Solution:
    """All steps in one program: a scan over the saves around a scan over steps."""
    stepper = Stepper(problem)
    num_saves = len(times) - 1
    save_steps = steps_of_saves(num_steps, num_saves)
    shortest = num_steps // num_saves
    has_more = np.diff(save_steps, prepend=0) > shortest

    def leg(carry: Any, first: Array, is_longer: Array) -> Any:
        state, meter_state = carry
        state, meter_state = _advance(stepper, state, meter_state, first, shortest, num_steps)
        if has_more.any():
            more = lambda state: stepper(state, first + shortest)
            state = jax.lax.cond(is_longer, more, lambda state: state, state)
        return state, meter_state

    def next_save(carry: Any, save: Any) -> Any:
        number, first, is_longer, time = save
        # The start is a save as well, so that all of them are reported in order.
        carry = jax.lax.cond(number > 0, leg, lambda carry, *_: carry, carry, first, is_longer)
        return carry, stepper.row(carry[0], time)

    firsts = np.concatenate([[0], save_steps[:-1]]).astype(np.int32)
    saves = np.arange(num_saves + 1), firsts, has_more, times
    carry = stepper.start(coordinates), problem.meter.init()
    (state, meter_state), rows = jax.lax.scan(next_save, carry, saves)
    problem.meter.close(meter_state)
    num_gradients = jnp.asarray(stepper.num_gradients)
    return solution_of(problem, coordinates, rows, state, times, num_steps, num_gradients)


def steps_of_saves(num_steps: int, num_saves: int) -> np.ndarray:
    """The number of steps before each save, ⌊i·num_steps/num_saves⌋."""
    return np.arange(num_saves + 1, dtype=np.int64) * num_steps // num_saves


def _advance(
    stepper: Stepper, state: State, meter_state: Any, first: Array, length: int, num_steps: int
) -> tuple[State, Any]:
    """`length` steps; a meter is moved a thousand times in a run, not at every step."""

    def steps(state: State, first: Array, length: int) -> State:
        numbers = first + jnp.arange(length, dtype=jnp.int32)
        return jax.lax.scan(lambda s, k: (stepper(s, k), None), state, numbers)[0]

    meter = stepper.problem.meter
    # A callback to the host stops the device: a thousand are enough for a bar.
    block = max(1, num_steps // _METER_UPDATES)
    if not stepper.problem.has_meter or length <= block:
        state = steps(state, first, length)
        return state, meter.step(meter_state, share(first + length, num_steps))

    def one_block(carry: Any, number: Array) -> Any:
        state = steps(carry[0], first + number * block, block)
        done = first + (number + 1) * block
        return (state, meter.step(carry[1], share(done, num_steps))), None

    num_blocks, rest = divmod(length, block)
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    (state, meter_state), _ = jax.lax.scan(one_block, (state, meter_state), numbers)
    if not rest:
        return state, meter_state
    state = steps(state, first + num_blocks * block, rest)
    return state, meter.step(meter_state, share(first + length, num_steps))


def share(num_done: Any, num_steps: int) -> Scalar:
    """The share of the run that is done, in the type that Diffrax's meters count in."""
    return jnp.asarray(num_done, float) / num_steps


@eqx.filter_jit
def solution_of(
    problem: Problem,
    start: Coordinates,
    rows: Row,
    state: State,
    times: Float[Array, " saves"],
    num_steps: int,
    num_gradients: Int[Array, ""],
) -> Solution:
    """The `Solution` for the user; NaN as final point where the run failed."""
    has_diverged = state.diverged_at >= 0
    # A wrong learning rate diverges as well: the later line overrules, and names the cause.
    result = _tree.where(has_diverged, RESULTS.diverged, RESULTS.successful)
    result = _tree.where(jnp.isfinite(times[-1]), result, RESULTS.bad_learning_rate)
    is_fine = result == RESULTS.successful
    done = jnp.where(has_diverged, state.diverged_at, num_steps)
    if state.stopped_after is not None:
        result = _tree.where(is_fine & ~state.is_going, RESULTS.stopped_early, result)
        done = jnp.where(state.is_going, done, state.stopped_after)
    zero = jnp.zeros_like(done)
    return Solution(
        times=times,
        points=rows.coordinates,
        observables=rows.observables,
        stats={
            "num_steps": done,
            "num_rejected": zero,
            "num_gradients": done * num_gradients,
            "num_factorizations": zero,
            "diverged_at": state.diverged_at,
        },
        result=result,
        final_coordinates=or_nan(state.coordinates, is_fine, of=(problem, start)),
        remainder=problem.remainder,
        clock=problem.clock,
    )


def _largest(coordinates: Coordinates) -> Scalar:
    """The largest absolute value among the coordinates; NaN if one is NaN."""
    leaves = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(coordinates) if leaf.size]
    # In float32 at least: 10⁸ does not fit into float16.
    return jnp.max(jnp.stack(leaves).astype(jnp.result_type(jnp.float32, *leaves)))


def _as_before(new: Any, old: Array) -> Array:
    # In double precision mode, some transforms return more digits than they were given.
    new = jnp.asarray(new)
    return new if new.dtype == old.dtype else new.astype(old.dtype)
