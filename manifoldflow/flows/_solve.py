"""Solving a flow by Diffrax: one driver for every flow, the same `Solution` for all."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count
from manifoldflow._journal import Place
from manifoldflow._reports import checked_observables, meter_of, row_reports
from manifoldflow._solution import delivered_solution, Observables, or_nan, RESULTS, Solution
from manifoldflow._types import Coordinates, Flag, Key, Point, Scalar
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.flows._landing import check_can_move, Start, started
from manifoldflow.flows._legs import solve_by_legs
from manifoldflow.flows._options import (
    noise_options,
    Options,
    save_times_of,
    solver_of,
    Stationary,
    tolerance,
)
from manifoldflow.flows._stepping import controller_of, first_step, max_steps_of, terms_of
from manifoldflow.flows._walk import walk
from manifoldflow.manifolds import Projected


@checked_but("flow", "solver", "observe")
def solve(
    flow: AbstractFlow,
    point: Point,
    *,
    end_time: Any,
    num_saves: int = 1,
    save_times: Any = None,
    solver: dfx.AbstractSolver | None = None,
    step_size: Any = None,
    rtol: Scalar | float | None = None,
    atol: Scalar | float | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    observe: Observables | None = None,
    key: Key | None = None,
    until: Callable[[Point], Any] | Stationary | None = None,
    progress: bool | dfx.AbstractProgressMeter | Callable[[dict[str, Any]], None] = False,
    checkpoint: Place | None = None,
    throw: bool = True,
    max_steps: int = 16384,
) -> Solution:
    """Follow a flow from a point until `end_time`.

    Every accepted step and every saved point lies on the flow's manifold. Works under
    jit, vmap and grad; repeated calls on new data of the same shapes do not retrace.

    Args:
        flow: what to follow.
        point: where to start; it is projected on the flow's manifold first.
        end_time: on the clock of the flow, positive.
        num_saves: saves at equal distances up to `end_time`, besides the start.
        save_times: increasing times in (0, end_time] to save at instead, besides the
            start.
        solver: a Diffrax solver. By default `diffrax.Tsit5()`; for stochastic flows
            Euler-Maruyama steps in one scan, without Diffrax, whose noise at step k comes
            from `fold_in(key, k)`. Itô and Stratonovich solvers get the drift they need.
        step_size: a fixed step, by default `end_time / 1000` for stochastic flows; all others
            have adaptive steps by default. On a manifold steps end on the saves: no step is
            longer than asked for, most are a little shorter.
        rtol: relative tolerance of adaptive steps: 1e-6 in float64, 1e-4 in float32. For
            stochastic flows it asks for adaptive steps, whose paths are reproducible in
            law only: a rounding error can change a step and with it the noise.
        atol: absolute tolerance: 1e-8 in float64, 1e-6 in float32, times the largest
            coordinate at the start.
        adjoint: by default reverse mode works; `diffrax.ForwardMode()` for jvp.
        observe: name → function of a point, evaluated at every save.
        key: for stochastic flows, which need one; ordinary differential equations ignore it.
        until: stop early: `Stationary(tolerance)`, or a predicate of the point, asked
            after every step. The remaining saves then repeat the final point.
        progress: True prints percentages, a Diffrax progress meter shows itself, a
            function is called at every save with a dict: time, coordinates, observables.
        checkpoint: an .npz file, or an `orbax.checkpoint.CheckpointManager`, for the saves so
            far, rewritten at every save. If it is there already and belongs to this solve, the
            solve goes on from its last save, to the last bit as if it had never been cut off.
            `stats` then count the steps of this call.
        throw: raise when the solve fails. With `throw=False` look at
            `solution.result`; what was not reached is NaN.
        max_steps: attempted steps before the solve gives up.

    Returns:
        A `Solution` with `len(times) == saves + 1`. In its `stats`, `num_gradients`
        counts the drift evaluations of all attempted steps, `num_factorizations` those
        and the factorisations of the projections after accepted steps.

    Raises:
        ValueError: wrong options, structure or shapes.
        EquinoxRuntimeError: a failed solve, with the message of its `RESULTS` member.
    """
    if not isinstance(flow, AbstractFlow):
        raise ValueError(
            f"solve follows a flow, e.g. LimitDiffusion(manifold, noise); got "
            f"{type(flow).__name__}."
        )
    max_steps = checked_count("max_steps", max_steps)
    coordinates, remainder = flow.split(point)
    dtype = _tree.dtype_of(coordinates)
    times = save_times_of(end_time, num_saves, save_times, dtype)
    noise = noise_options(
        flow, key, solver, step_size, (rtol, atol), num_saves, save_times, end_time
    )
    _, size = _tree.in_own_units(jax.lax.stop_gradient(coordinates))
    options = Options(
        solver=None if noise is not None and solver is None else solver_of(flow, solver, step_size),
        step_size=None if step_size is None else jnp.asarray(step_size, dtype),
        noise=noise,
        rtol=tolerance("rtol", rtol, 1e-6, 1e-4, dtype),
        atol=tolerance("atol", atol, 1e-8, 1e-6, dtype) * (size if atol is None else 1),
        adjoint=dfx.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        observe=checked_observables(observe),
        until=until,
        meter=meter_of(progress),
        reports=row_reports(progress),
        max_steps=max_steps,
    )
    if noise is not None:
        check_can_move(flow, point)
    end_time = jnp.asarray(end_time, dtype)
    run = _solve if options.solver is not None else walk
    if checkpoint is None:
        start = started(flow, point, max_steps)
        solution = run(flow, start, times, end_time, jnp.asarray(0), options)
    else:
        solution = solve_by_legs(run, flow, point, times, end_time, options, checkpoint)
    return delivered_solution(solution, throw)


class _Save(eqx.Module):
    coordinates: Coordinates
    observables: dict[str, PyTree[Array]] | None


@eqx.filter_jit
def _solve(
    flow: AbstractFlow,
    begin: Start,
    times: Float[Array, " saves"],
    end_time: Scalar,
    first_save: Int[Array, ""],
    options: Options,
) -> Solution:
    del first_save
    start, remainder = flow.split(begin.point)
    has_until = options.until is not None

    def save(t: Scalar, y: Coordinates, args: Any) -> _Save:
        del args
        y = _tree.cast_like(y, start)
        saved = _Save(y, options.observed(_tree.join(y, remainder)))
        for report in options.reports:
            jax.debug.callback(report, t, saved.coordinates, saved.observables)
        return saved

    def at_end(t: Scalar, y: Coordinates, args: Any) -> _Save:
        del t, args
        y = _tree.cast_like(y, start)
        # Only an early end has saves to fill with what is observed there.
        observables = options.observed(_tree.join(y, remainder)) if has_until else None
        return _Save(y, observables)

    subs = dfx.SubSaveAt(ts=times, fn=save), dfx.SubSaveAt(t1=True, fn=at_end)
    assert options.solver is not None
    solver, has_manifold = options.solver, flow.manifold is not None
    if flow.manifold is not None:
        solver = Projected(solver, flow.manifold, begin.point, interpolates=False)
    with _without_marker_warning():
        solution = dfx.diffeqsolve(
            terms_of(flow, begin.point, times, end_time, options),
            solver,
            times[0],
            end_time,
            first_step(times, end_time, options),
            start,
            saveat=dfx.SaveAt(subs=subs, solver_state=has_manifold),
            stepsize_controller=controller_of(options, times, end_time, has_manifold),
            adjoint=options.adjoint,
            event=dfx.Event(_Until(flow, remainder, options)) if has_until else None,
            max_steps=max_steps_of(options, times),
            throw=False,
            progress_meter=options.meter,
        )
    assert solution.ts is not None and solution.ys is not None
    saved, last = solution.ys
    last = jax.tree.map(lambda leaf: leaf[0], last)
    reached = jnp.isfinite(solution.ts[0])
    result = _result(solution, begin.result, last, end_time)
    is_early = result == RESULTS.stopped_early
    is_fine = is_early | (result == RESULTS.successful)

    def filled(leaf: Array, end: Array) -> Array:
        mask = reached.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(mask, leaf, end.astype(leaf.dtype))

    if not has_until:
        last_observables = jax.tree.map(lambda leaf: leaf[0], saved.observables)
        last = _Save(last.coordinates, last_observables)
    # What was not reached repeats an early end, or is NaN; so are its derivatives.
    saved = jax.tree.map(filled, saved, or_nan(last, is_fine))
    final = or_nan(last.coordinates, is_fine)
    return Solution(
        times=jnp.where(reached | ~is_early, times, solution.ts[1][0]),
        points=saved.coordinates,
        observables=saved.observables,
        stats=_stats(solution, options),
        result=result,
        final_coordinates=final,
        remainder=remainder,
    )


@contextlib.contextmanager
def _without_marker_warning() -> Iterator[None]:
    """Diffrax sees the marker of a solver through one wrapper only; `form_of` has checked it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not marked as converging to either")
        yield


class _Until(eqx.Module):
    flow: AbstractFlow
    remainder: Point
    options: Options

    def __call__(self, t: Scalar, y: Coordinates, args: Any, **kwargs: Any) -> Flag:
        del t, args, kwargs
        return self.options.stops_at(self.flow, _tree.join(y, self.remainder))


def _result(solution: dfx.Solution, start: RESULTS, last: _Save, end_time: Scalar) -> RESULTS:
    result = solution.result
    ours = RESULTS.where(result == dfx.RESULTS.successful, RESULTS.successful, RESULTS.nonfinite)
    for theirs, mine in (
        (dfx.RESULTS.event_occurred, RESULTS.stopped_early),
        (dfx.RESULTS.max_steps_reached, RESULTS.max_steps_reached),
        (dfx.RESULTS.dt_min_reached, RESULTS.step_too_small),
    ):
        ours = RESULTS.where(result == theirs, mine, ours)
    # Fixed steps never fail in Diffrax's eyes, whatever they run into: look at the end.
    ended = (ours == RESULTS.successful) | (ours == RESULTS.stopped_early)
    finite = _tree.all_finite(last.coordinates)
    ours = RESULTS.where(ended & ~finite, RESULTS.nonfinite, ours)
    ours = RESULTS.where(start == RESULTS.successful, ours, start)
    is_forward = (end_time > 0) & jnp.isfinite(end_time)
    return RESULTS.where(is_forward, ours, RESULTS.bad_end_time)


def _stats(solution: dfx.Solution, options: Options) -> dict[str, Array]:
    attempted = solution.stats["num_steps"]
    tableau = getattr(options.solver, "tableau", None)
    stages = getattr(tableau, "num_stages", 1)
    num_gradients = jnp.asarray(attempted) * stages
    num_factorizations, max_defect = jnp.zeros_like(num_gradients), jnp.zeros(())
    if solution.solver_state is not None:
        num_factorizations = num_gradients + solution.solver_state.num_factorizations
        max_defect = solution.solver_state.max_defect
    return {
        "num_steps": jnp.asarray(solution.stats["num_accepted_steps"]),
        "num_rejected": jnp.asarray(solution.stats["num_rejected_steps"]),
        "num_gradients": num_gradients,
        "num_factorizations": num_factorizations,
        "max_defect": max_defect,
    }
