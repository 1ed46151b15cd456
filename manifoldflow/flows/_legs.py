"""Solves that are written to a file as they go, and go on from it to the last bit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._journal import digest, Identity, Journal, parts_of, Place, program
from manifoldflow._reports import Report
from manifoldflow._solution import RESULTS, Solution
from manifoldflow._types import Point, Scalar, Tangent
from manifoldflow.flows._base import AbstractDiffusion, AbstractFlow
from manifoldflow.flows._landing import started, there
from manifoldflow.flows._options import Options, Stationary, Whole
from manifoldflow.flows._stepping import smallest_step
from manifoldflow.manifolds import AbstractManifold

Run = Callable[..., Solution]
"""Follows a flow from save to save: `solve` has one with Diffrax and one without."""


def solve_by_legs(
    run: Run,
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
    legs = jnp.append(times, end_time) if _has_tail(times, end_time, options) else times
    solution, stats, result = None, {}, RESULTS.successful
    meter_state = options.meter.init()
    with journal.opened(checkpoint) as store:
        if store.has_any():
            journal.read(store)
            _report(options.reports, times[journal.num_done - 1], journal.last())
        for number in range(max(journal.num_done - 1, 0), len(legs) - 1):
            if number:
                coordinates, _, step = journal.last()
                start = there(_tree.join(coordinates, remainder))
            else:
                start, step = started(flow, point, options.max_steps), jnp.nan
            ends = legs[number : number + 2]
            solution = run(
                flow,
                start,
                ends,
                ends[1],
                jnp.asarray(number),
                _for_leg(options, times, end_time, step),
            )
            stats, result = _added(stats, solution.stats), solution.result
            left = _steps_left(options, stats)
            if left < 0:
                result, solution = RESULTS.max_steps_reached, _nothing(solution)
                break
            _take_in(journal, store, solution, times, number, options.reports)
            if result != RESULTS.successful:
                break
            share = jnp.asarray((number + 1) / (len(legs) - 1))
            meter_state = options.meter.step(meter_state, share)
            if left == 0 and number < len(legs) - 2:
                result, solution = RESULTS.max_steps_reached, _nothing(solution)
                break
    options.meter.close(meter_state)
    return _joined(journal, solution, stats, result, times, remainder, options)


def _for_leg(options: Options, times: Array, end_time: Scalar, first_step: Any) -> Options:
    """What a leg is asked for: nothing that is done between the legs."""
    noise = options.noise
    smallest = None if noise is None else smallest_step(noise, times, end_time)
    whole = Whole(end_time, smallest, jnp.asarray(first_step, end_time.dtype))
    return dataclasses.replace(options, whole=whole, meter=dfx.NoProgressMeter(), reports=())


def _has_tail(times: Array, end_time: Scalar, options: Options) -> bool:
    if options.noise is not None:
        return options.noise.has_tail
    return float(times[-1]) < float(end_time)


def _take_in(
    journal: Journal,
    store: Any,
    solution: Solution,
    times: Array,
    number: int,
    reports: tuple[Report, ...],
) -> None:
    """Write down the save that a leg has come to, and then show it."""
    has_come = bool(solution.result == RESULTS.successful) and number < len(times) - 1
    saves = [0] * (number == 0) + [number + 1] * has_come
    rows = [_row(solution, times, save) for save in saves]
    for save, row in zip(saves, rows):
        journal.add(row, save)
    if has_come:
        journal.write(store, (), must=True)
    for save, row in zip(saves, rows):
        _report(reports, times[save], row)


def _row(solution: Solution, times: Array, number: int) -> Any:
    """A save that a leg began or ended with. The next leg begins with the mean step of this."""
    at = min(number, 1)
    step = (times[number] - times[number - 1]) / jnp.maximum(solution.stats["num_steps"], 1)
    step = step.astype(times.dtype) if number else jnp.asarray(jnp.nan, times.dtype)
    row = jax.tree.map(lambda leaf: leaf[at], (solution.points, solution.observables))
    return *row, step


def _report(reports: tuple[Report, ...], time: Scalar, row: Any) -> None:
    for report in reports:
        try:
            report(time, *row[:2])
        except Exception as error:
            error.add_note(f"This came from the callback `progress` at time {float(time):.6g}.")
            raise


def _steps_left(options: Options, stats: dict[str, Array]) -> int:
    """Of those that may be attempted; steps whose number was asked for are not counted."""
    is_counted = options.noise is None or options.noise.is_adaptive
    attempted = int(stats["num_steps"] + stats["num_rejected"])
    return options.max_steps - attempted if is_counted else options.max_steps


def _added(before: dict[str, Array], stats: Any) -> dict[str, Array]:
    """The counts of several legs, and their largest defect."""
    if not before:
        return dict(stats)
    add = lambda name: jnp.maximum if name == "max_defect" else jnp.add
    return {name: add(name)(before[name], value) for name, value in stats.items()}


def _nothing(solution: Solution) -> Solution:
    """A leg that did not come to its end."""
    lost = lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0)
    parts = lambda s: (s.points, s.observables, s.final_coordinates)
    return eqx.tree_at(parts, solution, jax.tree.map(lost, parts(solution)))


def _joined(
    journal: Journal,
    last: Solution | None,
    stats: dict[str, Array],
    result: RESULTS,
    times: Array,
    remainder: Point,
    options: Options,
) -> Solution:
    """All saves, those that were not come to filled as the last leg says."""
    points, observables, _ = journal.rows()
    final, num_left = journal.last()[0], len(times) - journal.num_done
    if last is not None and (num_left or _has_tail_of(last, times)):
        final = last.final_coordinates
    if num_left:
        assert last is not None
        filled = lambda rows, leg: jnp.concatenate([rows, jnp.stack([leg[-1]] * num_left)])
        points, observables = jax.tree.map(
            filled, (points, observables), (last.points, last.observables)
        )
        is_early = result == RESULTS.stopped_early
        ended = jnp.where(is_early, last.times[-1], times[journal.num_done :])
        times = jnp.concatenate([times[: journal.num_done], ended])
    if not stats:
        stats = {name: jnp.asarray(0) for name in _COUNTS} | {
            "max_defect": jnp.zeros_like(times[0])
        }
    return Solution(
        times=times,
        points=points,
        observables=observables,
        stats=stats,
        result=result,
        final_coordinates=final,
        remainder=remainder,
    )


_COUNTS = "num_steps", "num_rejected", "num_gradients", "num_factorizations"


def _has_tail_of(leg: Solution, times: Array) -> bool:
    return float(leg.times[0]) >= float(times[-1])


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
