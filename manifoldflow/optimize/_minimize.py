"""Minimising a function over a manifold: one loop for every method."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._results import (
    delivered_solution,
    Info,
    Observables,
    or_nan,
    RESULTS,
    Solution,
)
from manifoldflow._run import checked_observables, meter_of, Report, row_reports
from manifoldflow._types import Coordinates, Flag, Point, Scalar
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.optimize._base import (
    AbstractMethod,
    Attempt,
    Iterate,
    Problem,
    value_rounding,
    Work,
)
from manifoldflow.optimize._trust_region import RiemannianTrustRegion


@checked_but("manifold", "method", "fn", "observe")
def minimize(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    *,
    method: AbstractMethod | None = None,
    gradient_tolerance: Any = None,
    max_steps: int = 10_000,
    observe: Observables | None = None,
    progress: bool | dfx.AbstractProgressMeter | Callable[[dict[str, Any]], None] = False,
    throw: bool = True,
) -> Solution:
    """Go down to a stationary point of a function along a manifold.

    Every accepted step ends on the manifold. Works under jit and vmap; repeated calls on new
    data of the same shapes do not retrace. The result is not differentiable.

    A start that is stationary is a result, also if it is a saddle or a maximum: from there
    no method moves.

    Args:
        manifold: where to look.
        fn: the function F to be minimised, point → scalar, on and near the manifold; twice
            differentiable for `RiemannianTrustRegion`, once for the others.
        point: where to start; it is projected on the manifold first.
        method: `RiemannianTrustRegion()` by default, `RiemannianGradientDescent()`,
            `RiemannianOptax(optax.adam(1e-2))`, or another `AbstractMethod`.
        gradient_tolerance: stop once ‖P∇F‖ is at most this. By default eps^⅔ of the point's
            precision, 4e-11 or 2e-5, times the largest ‖∇F‖ met so far, with the gradient in
            the whole space: the units of F do not matter.
        max_steps: attempted steps before the search gives up.
        observe: name → function of a point, evaluated at the start and at the end.
        progress: True prints percentages, of the decimal places that the gradient has to
            fall, or of `max_steps` if those are used up earlier; a Diffrax progress meter
            shows itself; a function is called at the start and after every attempt with a
            dict: time (steps accepted so far), coordinates, value, gradient_norm and the
            observables.
        throw: raise when no stationary point is found. With `throw=False` look at
            `solution.result`; `final` is then NaN, and `point(-1)` the last point reached.

    Returns:
        A `Solution` with two saves, the start and the end, whose `times` count accepted
        steps. In its `stats`, `num_gradients` counts evaluations of F with its gradient,
        `num_hessian_products` products with its covariant Hessian, `num_factorizations` those
        of Gram matrices (or Hessians of the loss), and `gradient_norm` is ‖P∇F‖ at the end.
        Its `result` is `stalled` where rounding ends all progress before the
        tolerance is met.

    Raises:
        ValueError: wrong options, or a function without scalar values.
        EquinoxRuntimeError: a failed search, with the message of its `RESULTS` member.
    """
    if not isinstance(manifold, AbstractManifold):
        raise ValueError(
            "minimize goes along a manifold, e.g. ZeroLossManifold(loss); got a "
            f"{type(manifold).__name__}."
        )
    method = RiemannianTrustRegion() if method is None else method
    if not isinstance(method, AbstractMethod):
        raise ValueError(
            "method must be a method of minimisation, e.g. RiemannianTrustRegion() or "
            f"RiemannianOptax(optax.adam(1e-2)); got {method!r}."
        )
    if not callable(fn):
        raise ValueError(f"fn must be a function of a point; got a {type(fn).__name__}.")
    coordinates, remainder = manifold.split(point)
    _check_scalar(fn, point)
    dtype = _tree.dtype_of(coordinates)
    if gradient_tolerance is not None:
        mend = "Leave it out for one that suits the precision."
        gradient_tolerance = checked_nonnegative("gradient_tolerance", gradient_tolerance, mend)
        gradient_tolerance = gradient_tolerance.astype(dtype)
    options = _Options(
        method=method,
        gradient_tolerance=gradient_tolerance,
        observe=checked_observables(observe),
        meter=meter_of(progress),
        reports=row_reports(progress),
        max_steps=checked_count("max_steps", max_steps),
    )
    problem = Problem(manifold, _tree.as_pytree_callable(fn), remainder)
    # A program of its own, which other functions and methods need not compile again.
    landed, info = manifold.project_with_info(point, max_steps=max(100, options.max_steps))
    start = _tree.where(info.is_successful, manifold.split(landed)[0], coordinates)
    return delivered_solution(_minimize(problem, start, info, options), throw)


def _check_scalar(fn: Callable[[Point], Any], point: Point) -> None:
    found = eqx.filter_eval_shape(fn, point)
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    if shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return
    got = f"a {type(found).__name__}" if shape is None else f"shape {shape} of {dtype}"
    raise ValueError(f"fn must map a point to one real number, a scalar array; got {got}.")


class _Options(eqx.Module):
    """What `minimize` was asked for, ready to be passed through jit."""

    method: AbstractMethod
    gradient_tolerance: Scalar | None
    observe: dict[str, Callable[[Point], PyTree[Any]]]
    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    max_steps: int = eqx.field(static=True)


class _State(eqx.Module):
    """Where a search stands."""

    iterate: Iterate
    inner: PyTree[Any]  # what the method remembers
    result: RESULTS  # what it will be if the search ends here
    is_done: Flag
    num_steps: Int[Array, ""]
    num_rejected: Int[Array, ""]
    work: Work
    max_defect: Scalar
    least_gradient: Scalar
    largest_slope: Scalar
    num_idle: Int[Array, ""]
    meter: PyTree[Any]


@eqx.filter_jit
def _minimize(
    problem: Problem, coordinates: Coordinates, info: Info, options: _Options
) -> Solution:
    method, meter = options.method, options.meter
    is_on = info.is_successful
    first = problem.at(coordinates)

    def tolerance(slope: Scalar) -> Scalar:
        """Where the largest gradient in the whole space was this."""
        given = options.gradient_tolerance
        return _tree.eps_of(coordinates) ** (2 / 3) * slope if given is None else given

    def report(iterate: Iterate, num_steps: Int[Array, ""]) -> None:
        for each in options.reports:
            found = {"value": iterate.value, "gradient_norm": iterate.gradient_norm}
            found |= _observed(problem, options, iterate.coordinates)
            jax.debug.callback(each, num_steps, iterate.coordinates, found)

    def shown(
        state: PyTree[Any],
        num_attempts: Int[Array, ""],
        least_gradient: Scalar,
        slope: Scalar,
        is_done: Flag,
    ) -> PyTree[Any]:
        """The meter's state once it shows how much of the way is done."""
        if isinstance(meter, dfx.NoProgressMeter):
            return state
        wanted = jnp.log(first.gradient_norm / tolerance(slope))
        fallen = jnp.nan_to_num(jnp.log(first.gradient_norm / least_gradient) / wanted)
        share = jnp.clip(jnp.maximum(fallen, num_attempts / options.max_steps), 0, 1)
        # In the type that Diffrax's meters count in.
        return meter.step(state, _tree.where(is_done, 1, share).astype(float))

    def judged(iterate: Iterate, slope: Scalar, result: RESULTS) -> tuple[RESULTS, Flag]:
        """How the search would end here, and whether it does."""
        is_there = iterate.gradient_norm <= tolerance(slope)
        is_lost = result != RESULTS.successful
        ours = _tree.where(is_there, RESULTS.successful, RESULTS.max_steps_reached)
        return _tree.where(is_lost & ~is_there, result, ours), is_there | is_lost

    def going(state: _State) -> Flag:
        return ~state.is_done & (state.num_steps + state.num_rejected < options.max_steps)

    def step(state: _State) -> _State:
        attempt = method.step(problem, state.iterate, state.inner)
        num_idle = _idle(state, attempt)
        is_stalled = num_idle >= method.patience
        result = _tree.where(is_stalled, RESULTS.stalled, attempt.result)
        slope = jnp.maximum(state.largest_slope, attempt.iterate.slope_norm)
        result, is_done = judged(attempt.iterate, slope, result)
        num_steps = state.num_steps + attempt.is_accepted
        num_rejected = state.num_rejected + ~attempt.is_accepted
        least_gradient = jnp.minimum(state.least_gradient, attempt.iterate.gradient_norm)
        report(attempt.iterate, num_steps)
        return _State(
            attempt.iterate,
            attempt.state,
            result,
            is_done,
            num_steps,
            num_rejected,
            state.work + attempt.work,
            jnp.maximum(state.max_defect, attempt.defect),
            least_gradient,
            slope,
            num_idle,
            shown(state.meter, num_steps + num_rejected, least_gradient, slope, is_done),
        )

    result = _tree.where(first.is_finite, RESULTS.successful, RESULTS.nonfinite)
    result = _tree.where(is_on, result, info.result)
    is_fine = result == RESULTS.successful
    slope = first.slope_norm
    verdict, is_done = judged(first, slope, result)
    zero = jnp.asarray(0)
    start = _State(
        first,
        method.init(problem, first),
        _tree.where(is_fine, verdict, result),
        is_done | ~is_fine,
        zero,
        zero,
        Work(num_gradients=1, num_factorizations=info.num_factorizations + 1),
        _tree.where(is_on, info.defect, 0),
        first.gradient_norm,
        slope,
        zero,
        meter.init(),
    )
    report(first, zero)
    end = jax.lax.while_loop(going, step, start)
    meter.close(end.meter)
    return _solution(problem, options, first, end, is_fine)


def _idle(state: _State, attempt: Attempt) -> Int[Array, ""]:
    """For how many accepted steps in a row nothing but rounding has happened."""
    before, after = state.iterate, attempt.iterate
    is_same = jnp.abs(after.value - before.value) <= 10 * value_rounding(before, after)
    has_fallen = after.gradient_norm <= 0.99 * state.least_gradient
    # Below the rounding of ∇F a gradient along the manifold means nothing.
    is_real = after.gradient_norm > _tree.eps_of(after.slope) * after.slope_norm
    is_idle = is_same & ~(has_fallen & is_real)
    counted = _tree.where(is_idle, state.num_idle + 1, 0)
    return _tree.where(attempt.is_accepted, counted, state.num_idle)


def _observed(
    problem: Problem, options: _Options, coordinates: Coordinates
) -> dict[str, PyTree[Array]]:
    here = problem.point(coordinates)
    return {name: jax.tree.map(jnp.asarray, fn(here)) for name, fn in options.observe.items()}


def _solution(
    problem: Problem, options: _Options, first: Iterate, end: _State, has_start: Flag
) -> Solution:
    """What the user gets; NaN as the final point where the search failed."""
    is_fine = end.result == RESULTS.successful
    ends = first.coordinates, end.iterate.coordinates
    points = jax.tree.map(lambda x, y: jnp.stack([x, y]), *ends)
    # One after the other, and compiled once.
    observables = jax.lax.map(lambda x: _observed(problem, options, x), points)
    points, observables = or_nan((points, observables), has_start)
    final = or_nan(end.iterate.coordinates, is_fine)
    num_steps = end.num_steps.astype(end.iterate.value.dtype)
    return Solution(
        times=jnp.stack([jnp.zeros_like(num_steps), num_steps]),
        points=points,
        observables=observables,
        stats={
            "num_steps": end.num_steps,
            "num_rejected": end.num_rejected,
            "num_gradients": end.work.num_gradients,
            "num_hessian_products": end.work.num_hessian_products,
            "num_factorizations": end.work.num_factorizations,
            "max_defect": end.max_defect,
            "gradient_norm": end.iterate.gradient_norm,
        },
        result=end.result,
        final_coordinates=final,
        remainder=problem.remainder,
    )
