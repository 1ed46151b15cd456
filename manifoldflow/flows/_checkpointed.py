"""Solves that are written to a file as they go, and go on from it to the last bit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow._journal import (
    digest,
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
    observed,
    recorded,
    Report,
    Save,
    Stationary,
    tell,
)
from manifoldflow._types import Point, Scalar, Tangent
from manifoldflow.flows._base import AbstractDiffusion, AbstractFlow
from manifoldflow.flows._here import at_start, begun, Here, Row, row_of, solution_of
from manifoldflow.flows._legs import leg_of
from manifoldflow.flows._options import Options
from manifoldflow.flows._start import Start, started, successful
from manifoldflow.flows._task import Task, task_of
from manifoldflow.manifolds import AbstractManifold


def solve_to_file(
    flow: AbstractFlow,
    point: Point,
    times: Float[Array, " saves"],
    end_time: Scalar,
    options: Options,
    checkpoint: Place,
) -> Solution:
    """The solve save by save, from wherever a file has got to."""
    check_concrete("solve", (flow, point, times, options))
    coordinates, remainder = flow.split(point)
    row_like = coordinates, _observables_like(options, point), end_time
    identity = _identity(flow, point, times, end_time, options)
    journal = Journal("solve", identity, row_like, (), dict(enumerate(times.tolist())))
    # What is shown is shown between the legs.
    # A leg that shows nothing is one program, whoever looks on.
    quiet = dataclasses.replace(options, meter=dfx.NoProgressMeter(), reports=())
    task = task_of(flow, remainder, times, end_time, quiet)
    run = _Solve(options.meter, options.reports, task, point, times)
    return _joined(journal, recorded(run, journal, checkpoint), times, task)


class _Solve(AbstractRun[Here]):
    """A solve by legs. What steps go on with is in the rows: the size of the next step."""

    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    task: Task
    point: Point
    times: Array

    def start(self) -> Leg:
        start = started(self.task.flow, self.point, self.task.options.max_steps)
        return self._leg_to(0, *_begin(self.task, start, self.times))

    def again(self, journal: Journal, state: tuple[()], step: int) -> Here:
        row = journal.last()
        time = self.times[journal.num_done - 1]
        tell(self.reports, time, *row[:2])
        return begun(row[0], time, successful(), row[2])

    def legs(self, state: Here, journal: Journal) -> Iterator[Leg]:
        ends = self.task.options.legs(self.times, self.task.end_time)
        for number in range(max(journal.num_done, 1), len(ends)):
            # The number as an array: all legs are then one program.
            here, row = _leg(self.task, state, jnp.asarray(number - 1), ends[number])
            leg = self._leg_to(number, here, row)
            state = leg.state
            yield leg
            if leg.share is None:
                return

    def _leg_to(self, number: int, here: Here, row: Row) -> Leg:
        """A save where the solve has come to one: not where it has ended before."""
        if not bool(here.is_going):
            return Leg(here, None, None)
        is_save = number < len(self.times)
        save = Save(number, here.time, (*row, here.step), (), must_write=True)
        return Leg(here, number / self.task.num_legs, save if is_save else None)


@eqx.filter_jit
def _begin(task: Task, start: Start, times: Array) -> tuple[Here, Row]:
    here = at_start(task.flow, start, times, task.end_time, task.options)
    return here, row_of(here, task)


@eqx.filter_jit
def _leg(task: Task, here: Here, number: Array, end: Scalar) -> tuple[Here, Row]:
    here = leg_of(task.options)(task, here, number, end)
    return here, row_of(here, task)


def _joined(journal: Journal, here: Here, times: Array, task: Task) -> Solution:
    """All saves; those that were not come to are those of the end, or NaN."""
    points, observables, _ = journal.rows()
    ended, num_left = times[: journal.num_done], len(times) - journal.num_done
    rows = points, observables
    if num_left:
        last = _row(here, task)
        filled = lambda rows, end: jnp.concatenate([rows, jnp.stack([end] * num_left)])
        rows = jax.tree.map(filled, rows, last)
        ended = jnp.concatenate([ended, jnp.full(num_left, here.time)])
    return solution_of(here, rows, ended, times, task)


_row = eqx.filter_jit(row_of)


# --- identity -------------------------------------------------------------------------------


def _identity(
    flow: AbstractFlow, point: Point, times: Array, end_time: Scalar, options: Options
) -> Identity:
    """The identity of this solve among others: all that its steps depend on."""
    functions = observables_of(options.observe, point)
    until = options.until
    if until is not None and not isinstance(until, Stationary):
        functions["until"] = program(until, point)
    if options.solver is not None:
        functions["solver"] = digest(_recipe(options.solver))
    chain = {"manifold": "none"}
    if flow.manifold is not None:
        chain["manifold"] = program(_constraint, flow.manifold, point)
    chain["flow"] = program(_drift, flow, point)
    if options.noise is not None:
        chain["flow's noise"] = program(_kick, flow, point)
    return Identity(
        {
            **start_of(*flow.split(point)),
            **parts_of("flow", flow),
            **_option_parts(times, end_time, options),
        },
        functions,
        chain,
    )


def _recipe(solver: dfx.AbstractSolver) -> tuple[Any, ...]:
    # Diffrax keeps a tableau on the class, where the fields of the solver do not show it.
    return solver, getattr(solver, "tableau", None), type(solver).step


def _option_parts(times: Array, end_time: Scalar, options: Options) -> dict[str, str]:
    noise, until = options.noise, options.until
    parts = {
        **parts_of("solver", "Euler-Maruyama" if options.solver is None else options.solver),
        **parts_of("step size", options.step_size),
        **parts_of("rtol", options.rtol),
        **parts_of("atol", options.atol),
        "until": "a function" if callable(until) else repr(until),
    }
    if isinstance(until, Stationary):
        parts["until"] = f"Stationary {parts_of('until', until.tolerance)['until']}"
    if noise is not None:
        parts |= parts_of("key", noise.key)
        parts["step size"] = f"{noise.num_steps} steps from save to save"
        parts["adaptive steps"] = str(noise.is_adaptive)
        if options.solver is not None:
            # Its Brownian path is a tree over the whole time.
            parts |= parts_of("end_time", end_time) | parts_of("list of saves", times)
    return parts


@eqx.filter_jit
def _constraint(manifold: AbstractManifold, point: Point) -> PyTree[Array]:
    return manifold.constraint(point)


@eqx.filter_jit
def _drift(flow: AbstractFlow, point: Point) -> Tangent:
    return flow.drift(point)


@eqx.filter_jit
def _kick(flow: AbstractDiffusion, point: Point) -> Tangent:
    diffusion = flow.diffusion(point)
    ones = lambda leaf: jnp.ones(leaf.shape, leaf.dtype)
    return diffusion.mv(jax.tree.map(ones, diffusion.in_structure()))


def _observables_like(options: Options, point: Point) -> dict[str, PyTree[Any]]:
    return eqx.filter_eval_shape(observed, options.observe, point)
