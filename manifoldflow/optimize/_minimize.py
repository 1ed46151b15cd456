"""Minimising a function over a manifold: one loop for every method."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._journal import Place
from manifoldflow._results import delivered_solution, Observables, Solution
from manifoldflow._run import checked_observables, meter_of, row_reports
from manifoldflow._types import Point
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.optimize._base import AbstractMethod, Problem
from manifoldflow.optimize._resume import minimize_to_file
from manifoldflow.optimize._search import Options, whole_search
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
    checkpoint: Place | None = None,
    throw: bool = True,
) -> Solution:
    """The descent of a function along a manifold to a stationary point.

    Every accepted step ends on the manifold. Works under jit and vmap; repeated calls on new
    data of the same shapes do not retrace. The result is not differentiable.

    A start that is stationary is a result, also if it is a saddle or a maximum: from there
    no method moves.

    Args:
        manifold: the manifold to search.
        fn: the function F to be minimised, point → scalar, on and near the manifold; twice
            differentiable for `RiemannianTrustRegion`, once for the others.
        point: the start; it is projected on the manifold first.
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
        checkpoint: an .npz file, or an `orbax.checkpoint.CheckpointManager`, for the start and
            the point reached so far, rewritten after every eighth attempt, unless that would
            take more than a tenth of the time. If it is there already and belongs to this
            search, the search goes on from there, to the last bit as if it had never been cut
            off; `max_steps` and `stats` count the attempts of all calls. Progress is then shown
            after every eighth attempt as well, each time at the cost of one gradient and one
            factorisation, which `stats` count.
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

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> found = mf.minimize(circle, lambda x: x[1], start)  # the lowest point
        >>> print(found.final.round(3) + 0.0, found.stats["gradient_norm"] < 1e-4)
        [ 0. -1.] True
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
    options = Options(
        method=method,
        gradient_tolerance=gradient_tolerance,
        observe=checked_observables(observe),
        meter=meter_of(progress),
        reports=row_reports(progress),
        max_steps=checked_count("max_steps", max_steps),
    )
    problem = Problem(manifold, _tree.as_pytree_callable(fn), remainder)
    if checkpoint is None:
        solution = whole_search(problem, coordinates, options)
    else:
        solution = minimize_to_file(problem, coordinates, options, checkpoint)
    return delivered_solution(solution, throw)


def _check_scalar(fn: Callable[[Point], Any], point: Point) -> None:
    found = eqx.filter_eval_shape(fn, point)
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    if shape == () and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return
    got = f"a {type(found).__name__}" if shape is None else f"shape {shape} of {dtype}"
    raise ValueError(f"fn must map a point to one real number, a scalar array; got {got}.")
