"""Solves that are written to a file as they go, and go on from it to the last bit."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow._errors import is_traced
from manifoldflow._journal import digest, Identity, Journal, parts_of, Place, program
from manifoldflow._results import Solution
from manifoldflow._run import Report
from manifoldflow._types import Point, Scalar, Tangent
from manifoldflow.flows._base import AbstractDiffusion, AbstractFlow
from manifoldflow.flows._here import at_start, begun, Here, Row, row_of, solution_of
from manifoldflow.flows._landing import Start, started, successful
from manifoldflow.flows._legs import leg_of
from manifoldflow.flows._options import Options, Stationary
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
    """The solve save by save, from wherever a file has got to.

    One program follows the flow between any two saves, and all that it starts from is in the
    file: the bits of a leg cannot depend on where the solve was cut.
    """
    if is_traced((flow, point, times, options)):
        raise ValueError("`checkpoint` needs concrete values: call `solve` outside jit and vmap.")
    coordinates, remainder = flow.split(point)
    row_like = coordinates, _observables_like(options, point), end_time
    identity = _identity(flow, point, times, end_time, options)
    journal = Journal("solve", identity, row_like, (), dict(enumerate(times.tolist())))
    # What is shown is shown between the legs.
    quiet = dataclasses.replace(options, meter=dfx.NoProgressMeter(), reports=())
    task, legs = task_of(flow, remainder, times, end_time, quiet), options.legs(times, end_time)
    meter_state = options.meter.init()
    with journal.opened(checkpoint) as store:
        if store.has_any():
            journal.read(store)
            _report(options.reports, times[journal.num_done - 1], journal.last())
            coordinates, _, step = journal.last()
            here = begun(coordinates, times[journal.num_done - 1], successful(), step)
        else:
            start = started(flow, point, options.max_steps)
            here, row = _begin(task, start, times)
            journal.add((*row, here.step), 0)
            if bool(here.is_going):
                _report(options.reports, here.time, row)
        for number in range(max(journal.num_done - 1, 0), task.num_legs):
            here, row = _leg(task, here, jnp.asarray(number), legs[number + 1])
            if not bool(here.is_going):
                break
            if number + 1 < len(times):
                journal.add((*row, here.step), number + 1)
                journal.write(store, (), must=True)
                _report(options.reports, here.time, row)
            share = jnp.asarray((number + 1) / task.num_legs)
            meter_state = options.meter.step(meter_state, share)
    options.meter.close(meter_state)
    return _joined(journal, here, times, task)


@eqx.filter_jit
def _begin(task: Task, start: Start, times: Array) -> tuple[Here, Row]:
    here = at_start(task.flow, start, times, task.end_time, task.options)
    return here, row_of(here, task)


@eqx.filter_jit
def _leg(task: Task, here: Here, number: Array, end: Scalar) -> tuple[Here, Row]:
    here = leg_of(task.options)(task, here, number, end)
    return here, row_of(here, task)


def _report(reports: tuple[Report, ...], time: Scalar, row: Any) -> None:
    for report in reports:
        try:
            report(time, *row[:2])
        except Exception as error:
            error.add_note(f"This came from the callback `progress` at time {float(time):.6g}.")
            raise


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
    return solution_of(here, rows, ended, times, task.remainder)


_row = eqx.filter_jit(row_of)


# --- identity -------------------------------------------------------------------------------


def _identity(
    flow: AbstractFlow, point: Point, times: Array, end_time: Scalar, options: Options
) -> Identity:
    """What tells this solve from others: all that its steps depend on."""
    functions = {f"observable {name!r}": program(fn, point) for name, fn in options.observe.items()}
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
            **parts_of("start", flow.split(point)[0], whole=True),
            **parts_of("frozen part of the point", flow.split(point)[1], whole=True),
            **parts_of("flow", flow),
            **_option_parts(times, end_time, options),
        },
        functions,
        chain,
    )


def _recipe(solver: dfx.AbstractSolver) -> tuple[Any, ...]:
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
    return eqx.filter_eval_shape(lambda o, p: o.observed(p), options, point)
