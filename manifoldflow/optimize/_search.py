"""The loop of `minimize`, the same for every method."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._results import Info, or_nan, RESULTS, Solution
from manifoldflow._run import observed, Report, share_of_decades, show
from manifoldflow._types import Coordinates, Flag, Point, Scalar
from manifoldflow.optimize._base import (
    AbstractMethod,
    Attempt,
    Iterate,
    Problem,
    value_rounding,
    Work,
)


class Options(eqx.Module):
    """The options of a `minimize`, ready to be passed through jit."""

    method: AbstractMethod
    gradient_tolerance: Scalar | None
    observe: dict[str, Callable[[Point], PyTree[Any]]]
    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    max_steps: int = eqx.field(static=True)

    def tolerance(self, iterate: Iterate, slope: Scalar) -> Scalar:
        """The tolerance, where the largest gradient in the whole space was this."""
        given = self.gradient_tolerance
        return _tree.eps_of(iterate.coordinates) ** (2 / 3) * slope if given is None else given


class Tally(eqx.Module):
    """The counts of a search so far, and the extremes that it has met."""

    num_steps: Int[Array, ""]
    num_rejected: Int[Array, ""]
    num_idle: Int[Array, ""]
    work: Work
    max_defect: Scalar
    first_gradient: Scalar
    least_gradient: Scalar
    largest_slope: Scalar

    @property
    def num_attempts(self) -> Int[Array, ""]:
        return self.num_steps + self.num_rejected


class State(eqx.Module):
    """The state of a search."""

    iterate: Iterate
    inner: PyTree[Any]  # what the method remembers
    result: RESULTS  # what it will be if the search ends here
    is_done: Flag
    tally: Tally
    meter: PyTree[Any]


def landed(problem: Problem, coordinates: Coordinates, max_steps: int) -> tuple[Coordinates, Info]:
    """The point of the manifold to start from; the given one if there is none.

    A program of its own, which other functions and methods need not compile again.
    """
    manifold = problem.manifold
    # `max_steps` is meant for the descent: a small one must not end the search for its start.
    point, info = manifold.project_with_info(
        problem.point(coordinates), max_steps=max(100, max_steps)
    )
    return _tree.where(info.is_successful, manifold.split(point)[0], coordinates), info


def whole_search(problem: Problem, coordinates: Coordinates, options: Options) -> Solution:
    """All attempts in one program."""
    return _whole(problem, *landed(problem, coordinates, options.max_steps), options)


@eqx.filter_jit
def _whole(problem: Problem, coordinates: Coordinates, info: Info, options: Options) -> Solution:
    start, is_fine = begun(problem, coordinates, info, options)
    _report(problem, options, start)
    end = attempted(problem, options, start, options.max_steps)
    options.meter.close(end.meter)
    return solution_of(
        problem, options, (coordinates, end.iterate.coordinates), end.iterate.gradient_norm,
        end.tally, end.result, is_fine,
    )  # fmt: skip


def begun(
    problem: Problem, coordinates: Coordinates, info: Info, options: Options
) -> tuple[State, Flag]:
    """The state of a search at its start, and a mark if there is a point to start from."""
    first, is_on, zero = problem.at(coordinates), info.is_successful, jnp.asarray(0)
    result = _tree.where(first.is_finite, RESULTS.successful, RESULTS.nonfinite)
    result = _tree.where(is_on, result, info.result)
    is_fine = result == RESULTS.successful
    slope = first.slope_norm
    verdict, is_done = _judged(first, options.tolerance(first, slope), result)
    work = Work(num_gradients=1, num_factorizations=info.num_factorizations + 1)
    defect, gradient = _tree.where(is_on, info.defect, 0), first.gradient_norm
    return State(
        first,
        options.method.init(problem, first),
        _tree.where(is_fine, verdict, result),
        is_done | ~is_fine,
        Tally(zero, zero, zero, work, defect, gradient, gradient, slope),
        options.meter.init(),
    ), is_fine


def attempted(problem: Problem, options: Options, state: State, most: Any) -> State:
    """The state when the search ends, or when this number of attempts has been made in all."""

    def going(state: State) -> Flag:
        return ~state.is_done & (state.tally.num_attempts < most)

    def step(state: State) -> State:
        attempt = options.method.step(problem, state.iterate, state.inner)
        tally, there = _counted(state, attempt), attempt.iterate
        # Near the minimum values stop changing long before gradients do: count idle steps, not one.
        is_stalled = tally.num_idle >= options.method.patience
        result = _tree.where(is_stalled, RESULTS.stalled, attempt.result)
        tolerance = options.tolerance(there, tally.largest_slope)
        result, is_done = _judged(there, tolerance, result)
        new = State(there, attempt.state, result, is_done, tally, state.meter)
        _report(problem, options, new)
        if isinstance(options.meter, dfx.NoProgressMeter):
            return new
        meter = options.meter.step(new.meter, share_of(options, new, options.max_steps))
        return eqx.tree_at(lambda s: s.meter, new, meter)

    return jax.lax.while_loop(going, step, state)


def _report(problem: Problem, options: Options, state: State) -> None:
    if options.reports:
        seen = shown(problem, options, state)
        show(options.reports, state.tally.num_steps, state.iterate.coordinates, seen)


def shown(problem: Problem, options: Options, state: State) -> dict[str, PyTree[Array]]:
    """The values that a user is told of a search on its way."""
    iterate = state.iterate
    found = {"value": iterate.value, "gradient_norm": iterate.gradient_norm}
    return found | observed(options.observe, problem.point(iterate.coordinates))


def share_of(options: Options, state: State, max_steps: Any) -> Scalar:
    """The share of the way that is done: of the decimal places that the gradient has to fall.

    Or of the attempts, if those are used up earlier.
    """
    tally = state.tally
    tolerance = options.tolerance(state.iterate, tally.largest_slope)
    fallen = share_of_decades(tally.first_gradient, tally.least_gradient, tolerance)
    share = jnp.clip(jnp.maximum(fallen, tally.num_attempts / max_steps), 0, 1)
    # In the type that Diffrax's meters count in.
    return _tree.where(state.is_done, 1, share).astype(float)


def _counted(state: State, attempt: Attempt) -> Tally:
    """The tally after one more attempt."""
    tally, there = state.tally, attempt.iterate
    return Tally(
        tally.num_steps + attempt.is_accepted,
        tally.num_rejected + ~attempt.is_accepted,
        _idle(state, attempt),
        tally.work + attempt.work,
        jnp.maximum(tally.max_defect, attempt.defect),
        tally.first_gradient,
        jnp.minimum(tally.least_gradient, there.gradient_norm),
        jnp.maximum(tally.largest_slope, there.slope_norm),
    )


def _judged(iterate: Iterate, tolerance: Scalar, result: RESULTS) -> tuple[RESULTS, Flag]:
    """The result of a search that ends here, and a mark if it does."""
    is_there = iterate.gradient_norm <= tolerance
    is_lost = result != RESULTS.successful
    ours = _tree.where(is_there, RESULTS.successful, RESULTS.max_steps_reached)
    return _tree.where(is_lost & ~is_there, result, ours), is_there | is_lost


def _idle(state: State, attempt: Attempt) -> Int[Array, ""]:
    """The number of accepted steps in a row that changed nothing but rounding."""
    before, after = state.iterate, attempt.iterate
    is_same = jnp.abs(after.value - before.value) <= 10 * value_rounding(before, after)
    has_fallen = after.gradient_norm <= 0.99 * state.tally.least_gradient
    # Below the rounding of ∇F a gradient along the manifold means nothing.
    is_real = after.gradient_norm > _tree.eps_of(after.slope) * after.slope_norm
    is_idle = is_same & ~(has_fallen & is_real)
    counted = _tree.where(is_idle, state.tally.num_idle + 1, 0)
    return _tree.where(attempt.is_accepted, counted, state.tally.num_idle)


def solution_of(
    problem: Problem,
    options: Options,
    ends: tuple[Coordinates, Coordinates],
    gradient_norm: Scalar,
    tally: Tally,
    result: RESULTS,
    has_start: Flag,
) -> Solution:
    """The `Solution` for the user; NaN as the final point where the search failed."""
    points = jax.tree.map(lambda x, y: jnp.stack([x, y]), *ends)
    # One after the other, and compiled once.
    seen = jax.lax.map(lambda x: observed(options.observe, problem.point(x)), points)
    points, seen = or_nan((points, seen), has_start)
    num_steps = tally.num_steps.astype(gradient_norm.dtype)
    return Solution(
        times=jnp.stack([jnp.zeros_like(num_steps), num_steps]),
        points=points,
        observables=seen,
        stats={
            "num_steps": tally.num_steps,
            "num_rejected": tally.num_rejected,
            "num_gradients": tally.work.num_gradients,
            "num_hessian_products": tally.work.num_hessian_products,
            "num_factorizations": tally.work.num_factorizations,
            "max_defect": tally.max_defect,
            "gradient_norm": gradient_norm,
        },
        result=result,
        final_coordinates=or_nan(ends[1], result == RESULTS.successful),
        remainder=problem.remainder,
    )
