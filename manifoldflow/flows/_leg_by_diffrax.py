"""One leg of a solve, from one save to the next, by Diffrax."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _precision, _tree
from manifoldflow._results import from_diffrax, RESULTS
from manifoldflow._run import AdaptiveSteps, EqualSteps, form_of, next_step
from manifoldflow._types import Coordinates, Flag, Point, Scalar
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.flows._here import added, Here
from manifoldflow.flows._options import Options
from manifoldflow.flows._task import Task
from manifoldflow.manifolds import Projected


def leg_by_diffrax(task: Task, here: Here, number: Any, end: Scalar) -> Here:
    """The state at `end` by Diffrax, unless the solve has ended before."""
    del number
    flow, options = task.flow, task.options
    assert options.solver is not None
    point, solver = _tree.join(here.coordinates, task.remainder), options.solver
    if flow.manifold is not None:
        solver = Projected(solver, flow.manifold, point)
    controller, step = _controller_of(here, end, task)
    has_event, is_ours = options.until is not None, isinstance(controller, AdaptiveSteps)
    with _without_marker_warning():
        solution = dfx.diffeqsolve(
            _terms_of(point, task),
            solver,
            here.time,
            # Over no time where it has ended: under `vmap` legs are run for all members.
            _tree.where(here.is_going, end, here.time),
            step,
            here.coordinates,
            saveat=dfx.SaveAt(
                t1=True, solver_state=flow.manifold is not None, controller_state=is_ours
            ),
            stepsize_controller=controller,
            adjoint=options.adjoint,
            event=dfx.Event(_Until(task)) if has_event else None,
            max_steps=_max_steps_of(options),
            # An error would stop all members of a batch, and keep the program out of the cache.
            throw=False,
            progress_meter=task.meter,
        )
    assert solution.ts is not None and solution.ys is not None
    moved = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    # Times in float64 make Diffrax promote a state in float32.
    moved = _tree.cast_like(moved, here.coordinates)
    stats = added(here.stats, _stats(solution, options))
    result = _result(solution, moved, stats, options)
    reached = _tree.where(result == RESULTS.stopped_early, solution.ts[0], end)
    if is_ours:
        step = next_step(solution)
    else:
        # A controller that is not ours does not tell its last step: the mean one will do for the
        # next leg.
        mean = (end - here.time) / jnp.maximum(solution.stats["num_accepted_steps"], 1)
        step = jax.lax.stop_gradient(_tree.where(mean > 0, mean, here.step))
    return Here(
        moved,
        _tree.where(here.is_going, reached, here.time),
        _tree.where(here.is_going, result, here.result),
        step,
        stats,
        here.meter,
    )


@contextlib.contextmanager
def _without_marker_warning() -> Iterator[None]:
    """Diffrax sees the marker of a solver through one wrapper only; `form_of` has checked it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not marked as converging to either")
        yield


class _Until(eqx.Module):
    task: Task

    # Diffrax calls it by keyword where it looks for the time of an event: the names are its own.
    def __call__(self, t: Scalar, y: Coordinates, args: Any, **kwargs: Any) -> Flag:
        del t, args, kwargs
        task = self.task
        return task.options.stops_at(task.flow, _tree.join(y, task.remainder))


def _terms_of(point: Point, task: Task) -> dfx.AbstractTerm:
    flow, options = task.flow, task.options
    noise = options.noise
    if noise is None:
        return flow.terms(point)
    assert isinstance(flow, AbstractDiffusion) and options.solver is not None
    assert task.smallest_step is not None
    # One path for the whole time, so that a solve that goes on sees the same noise. Far
    # below the steps, since the tree is only right down to its tolerance.
    path = dfx.VirtualBrownianTree(
        jnp.zeros_like(task.end_time),
        task.end_time,
        task.smallest_step / 4,
        flow.diffusion(point).in_structure(),
        noise.key,
        getattr(options.solver, "minimal_levy_area", dfx.BrownianIncrement),
    )
    return flow.terms(point, path, form=form_of(options.solver))


def _controller_of(
    here: Here, end: Scalar, task: Task
) -> tuple[dfx.AbstractStepSizeController, Scalar | None]:
    """The controller of the steps, and the first step where the controller does not know it."""
    options = task.options
    noise = options.noise
    if noise is not None and not noise.is_adaptive:
        return EqualSteps((end - here.time) / noise.num_steps), None
    if options.step_size is not None:
        return EqualSteps(options.step_size), None
    if noise is None:
        # Not forced below: where no step is short enough the solve fails, and does not go on with
        # an error that was refused.
        smallest = _precision.eps_of_dtype(end) * task.end_time
        controller = dfx.PIDController(
            options.rtol, options.atol, dtmin=smallest, force_dtmin=False
        )
        return AdaptiveSteps(controller, here.step), None
    # Rejected steps are revisited, without which adaptive steps would bias the law of the noise.
    smallest = task.end_time / 2**12
    controller = dfx.PIDController(
        options.rtol,
        options.atol,
        # Diffrax's advice for stochastic equations: a gentle controller rejects fewer steps.
        pcoeff=0.1,
        icoeff=0.3,
        dtmin=smallest,
        dtmax=task.end_time / 10,
    )
    return dfx.ClipStepSizeController(controller, store_rejected_steps=100), here.step


def _max_steps_of(options: Options) -> int:
    if options.noise is None or options.noise.is_adaptive:
        return options.max_steps
    # One more than there are: rounding in the sum of equal steps can leave a last tiny one.
    return options.noise.num_steps + 1


def _result(
    solution: dfx.Solution, moved: Coordinates, stats: dict[str, Array], options: Options
) -> RESULTS:
    # The end is looked at as well: Diffrax calls equal steps successful where they led to NaN.
    ours = from_diffrax(solution.result, moved)
    # Steps whose number was asked for are not counted.
    if options.noise is None or options.noise.is_adaptive:
        ended = (ours == RESULTS.successful) | (ours == RESULTS.stopped_early)
        is_over = ended & (stats["num_steps"] + stats["num_rejected"] > options.max_steps)
        ours = _tree.where(is_over, RESULTS.max_steps_reached, ours)
    return ours


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
