"""Solving a flow: one driver for every flow, the same `Solution` for all."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count
from manifoldflow._journal import Place
from manifoldflow._results import delivered_solution, Observables, Solution
from manifoldflow._run import (
    checked_observables,
    meter_of,
    over_legs,
    row_reports,
    Stationary,
)
from manifoldflow._types import Key, Point, Scalar
from manifoldflow.flows._adjoints import through
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.flows._checkpointed import solve_to_file
from manifoldflow.flows._here import at_start, Here, report, Row, row_of, solution_of
from manifoldflow.flows._legs import leg_of
from manifoldflow.flows._options import (
    has_tail,
    noise_options,
    Options,
    save_times_of,
    solver_of,
    tolerance,
)
from manifoldflow.flows._start import check_can_move, Start, started
from manifoldflow.flows._task import task_of


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
    """The path of a flow from a point until `end_time`.

    Every accepted step and every saved point lies on the flow's manifold. It works under
    jit, vmap and grad; repeated calls on new data of the same shapes do not retrace.

    Args:
        flow: the flow to follow.
        point: the start; it is projected on the flow's manifold first.
        end_time: the last time on the clock of the flow, positive.
        num_saves: the number of saves at equal distances up to `end_time`, besides the start.
        save_times: increasing times in (0, end_time] to save at instead, besides the
            start.
        solver: a Diffrax solver. By default `diffrax.Tsit5()`; for stochastic flows
            Euler-Maruyama steps in one scan, without Diffrax, whose noise at step k comes
            from `fold_in(key, k)`. Itô and Stratonovich solvers get the drift they need.
        step_size: a fixed step, by default `end_time / 1000` for stochastic flows; all others
            have adaptive steps by default. Steps end on the saves: none is longer than asked
            for, most are a little shorter.
        rtol: relative tolerance of adaptive steps: 1e-6 in float64, 1e-4 in float32. For
            stochastic flows it asks for adaptive steps, whose paths are reproducible in
            law only: a rounding error can change a step and with it the noise.
        atol: absolute tolerance: 1e-8 in float64, 1e-6 in float32, times the largest
            coordinate at the start.
        adjoint: the direction of derivatives: by default backwards, once;
            `diffrax.ForwardMode()` is for jvp, `diffrax.DirectAdjoint()` for both ways and for
            second derivatives.
        observe: name → function of a point, evaluated at every save.
        key: the random key that stochastic flows need; ordinary differential equations ignore it.
        until: a condition to stop early: `Stationary(tolerance)`, or a predicate of the point,
            asked after every step. The remaining saves then repeat the final point.
        progress: True prints percentages, a Diffrax progress meter shows itself: after every
            step where there is one save or noise, else after every save. A function is
            called at every save with a dict: time, coordinates, observables.
        checkpoint: an .npz file, or an `orbax.checkpoint.CheckpointManager`, for the saves so
            far, rewritten at every save. If it is there already and belongs to this solve, the
            solve goes on from its last save, to the last bit as if it had never been cut off.
            `stats` then count the steps of this call.
        throw: raise when the solve fails. With `throw=False` look at
            `solution.result`; what was not reached is NaN.
        max_steps: the number of attempted steps before the solve gives up.

    Returns:
        A `Solution` with `len(times) == saves + 1`. In its `stats`, `num_gradients`
        counts the drift evaluations of all attempted steps, `num_factorizations` those
        and the factorisations of the projections after accepted steps.

    Raises:
        ValueError: wrong options, structure or shapes.
        EquinoxRuntimeError: a failed solve, with the message of its `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> noise = mf.LabelNoise(std=1.0, batch_size=1)
        >>> flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise)
        >>> flatness = {"flatness": loss.trace_gauss_newton}
        >>> walk = mf.solve(flow, jnp.array([2.0, 0.5]), end_time=5.0, observe=flatness)
        >>> print(walk.observables["flatness"].round(2), walk.final.round(2))
        [4.25 2.  ] [1.01 0.99]
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
    # Tolerances are no function of the start: a derivative through them would be spurious.
    size = _tree.size_of(jax.lax.stop_gradient(coordinates))
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
        has_tail=has_tail(save_times, end_time),
    )
    if noise is not None:
        check_can_move(flow, point)
    # In the dtype of the point: a Python number is float64 under x64, and would promote the state.
    end_time = jnp.asarray(end_time, dtype)
    if checkpoint is None:
        start = started(flow, point, max_steps)
        solution = through(options, _follow, flow, start, times, end_time)
    else:
        solution = solve_to_file(flow, point, times, end_time, options, checkpoint)
    return delivered_solution(solution, throw)


@eqx.filter_jit
def _follow(
    flow: AbstractFlow,
    start: Start,
    times: Float[Array, " saves"],
    end_time: Scalar,
    options: Options,
) -> Solution:
    task = task_of(flow, flow.split(start.point)[1], times, end_time, options)
    here = at_start(flow, start, times, end_time, options)
    first = row_of(here, task)
    report(here, first, options)
    # A scan carries its meter from leg to leg; what Diffrax does not show is shown in between.
    nothing, is_scan = dfx.NoProgressMeter(), options.solver is None
    between = nothing if is_scan or task.num_legs == 1 else options.meter
    carried = task.meter if is_scan else between
    here = dataclasses.replace(here, meter=carried.init())

    def leg(here: Here, inputs: tuple[Array, Scalar]) -> Here:
        return leg_of(options)(task, here, *inputs)

    def save(here: Here) -> tuple[Here, tuple[Scalar, Row]]:
        row = row_of(here, task)
        report(here, row, options)
        state = between.step(here.meter, (here.time / end_time).astype(float))
        return dataclasses.replace(here, meter=state), (here.time, row)

    ends = jnp.arange(task.num_legs), options.legs(times, end_time)[1:]
    here, (ended, rest) = over_legs(leg, save, here, ends)
    carried.close(here.meter)
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)
    ended = jnp.concatenate([times[:1], ended])
    return solution_of(here, joined, ended, times, task)
