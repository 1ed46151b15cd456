"""`walk`: keep what a network does on its data, and lower something else."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_positive, described, is_traced
from manifoldflow._journal import Place
from manifoldflow._results import delivered, Observables, RESULTS, Solution
from manifoldflow._run import announce, checked_observables
from manifoldflow._types import Flag, Key, Point, Scalar
from manifoldflow.flows import RiemannianGradientFlow, solve, Stationary
from manifoldflow.geometry import riemannian_gradient
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss
from manifoldflow.manifolds import AbstractManifold, OutputManifold
from manifoldflow.optimize import AbstractMethod, minimize, RiemannianGradientDescent
from manifoldflow.sgd import simulate
from manifoldflow.walks._objectives import AbstractObjective, Flatness, objective_of
from manifoldflow.walks._stochastic import StochasticWalk

# A flow that would lower the objective to 0 in one unit, were its rate to stay, goes on for ten.
_UNITS = 10


@checked_but("loss", "objective", "manifold", "method", "observe")
def walk(
    loss: AbstractLoss,
    point: Point,
    *,
    objective: str | AbstractObjective | Callable[[Point], Any] = "flatness",
    manifold: AbstractManifold | None = None,
    method: AbstractMethod | StochasticWalk | str | None = None,
    learning_rate: Any = None,
    key: Key | None = None,
    end_time: Any = None,
    max_steps: int = 100,
    num_saves: int = 1,
    stationarity: Any = 1e-2,
    observe: Observables | None = None,
    progress: Any = False,
    checkpoint: Place | None = None,
    throw: bool = True,
) -> Solution:
    """Walk to a point with the same outputs and a lower objective.

    The outputs of the model on the data of the loss stay what they are, and with them the value of
    the loss. Everything else may move. No labels are used unless the objective uses them.

    Args:
        loss: over examples, e.g. `LeastSquares`. The point need not minimise it.
        point: the trained model.
        objective: "flatness" for tr G, G the Gauss-Newton matrix, "largest_eigenvalue" for λ₁(G),
            "weight_norm" for ½‖θ‖², `walks.Rounding(bits)` for what rounding the weights costs, an
            `AbstractObjective`, or any differentiable function of the point.
        manifold: where to walk; by default the models with the outputs of `point`,
            `OutputManifold`. `ZeroLossManifold(loss)` lands on zero loss first.
        method: `RiemannianGradientDescent()` by default, `RiemannianTrustRegion()`, another method
            of `minimize`, or "flow" for the ordinary differential equation θ' = −P∇F. Where Gram
            matrices end, `walks.StochasticWalk(strength, batch_size)`: `max_steps` steps of SGD on
            L + strength·tr G, which keep the outputs to first order in the strength.
        learning_rate: for `StochasticWalk`, positive; a schedule as for `simulate`.
        key: for `StochasticWalk`.
        end_time: for "flow", the time of θ' = −P∇F. By default ten times F/‖P∇F‖² at the start, for
            a positive objective F.
        max_steps: the budget, in attempted steps. A walk that has used it up ends where it is.
        num_saves: for "flow" and `StochasticWalk`, saves at equal times besides the start.
        stationarity: the walk ends where ‖P∇F‖ has fallen to this share of its first value.
        observe: name → function of a point, beside "objective", "loss", "weight norm" and
            "largest change of an output".
        progress: as for `minimize` and `solve`; True also says when compilation begins.
        checkpoint: as for `minimize` and `solve`.
        throw: raise when the walk fails.

    Returns:
        A `Solution`; `final` is the new model, `print(walks.before_after(solution))` a table that
        begins with the reason why the walk ended. Its result is `successful` where the walk is
        stationary, `max_steps_reached` where the budget is used up, and `stalled` where
        rounding ends all progress: then go on in float64. None of these raises.

    Raises:
        ValueError: wrong options; a loss without outputs and no manifold.
        EquinoxRuntimeError: a failed walk, with the message of its `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> balanced = mf.walk(
        ...     loss, jnp.array([4.0, 0.25]), objective="weight_norm", stationarity=1e-3
        ... )
        >>> print(balanced.final.round(2))
        [1. 1.]
    """
    objective = objective_of(objective)
    announce("walk", progress, (loss, point))
    max_steps = checked_count("walk: max_steps", max_steps)
    if isinstance(method, StochasticWalk):
        key = _checked_key(loss, objective, manifold, end_time, learning_rate, key)
        fn = _Objective(objective, loss)
        return simulate(
            loss, method, optax.sgd, point, learning_rate=learning_rate, num_steps=max_steps,
            num_saves=num_saves, key=key, progress=progress, checkpoint=checkpoint, throw=throw,
            observe=_observables(loss, point, fn, checked_observables(observe)),
        )  # fmt: skip
    if learning_rate is not None or key is not None:
        raise ValueError(
            "walk: learning_rate and key belong to method=walks.StochasticWalk(…); got "
            f"method={described(method)}. Leave them out."
        )
    manifold = _manifold_of(manifold, loss, point)
    stationarity = checked_positive("walk: stationarity", stationarity)
    fn = _Objective(objective, loss)
    seen = _observables(loss, point, fn, checked_observables(observe))
    first, slope = _rates(manifold, fn, point)
    _check_start(objective, first, slope)
    tolerance = stationarity.astype(slope.dtype) * slope
    shared = {"observe": seen, "progress": progress, "checkpoint": checkpoint, "throw": False}
    if isinstance(method, str) and method == "flow":
        end = _end_time(objective, end_time, first, slope)
        solution = solve(
            RiemannianGradientFlow(manifold, fn), point, end_time=end, num_saves=num_saves,
            until=Stationary(tolerance), max_steps=max_steps, **shared,
        )  # fmt: skip
    else:
        solution = minimize(
            manifold, fn, point, method=_method_of(method, end_time, num_saves),
            gradient_tolerance=tolerance, max_steps=max_steps, **shared,
        )  # fmt: skip
    return _delivered(_ended(solution, objective.name), throw)


class _Objective(eqx.Module):
    """The objective as a function of the point alone."""

    objective: AbstractObjective
    loss: AbstractLoss

    def __call__(self, point: Point) -> Scalar:
        return self.objective(self.loss, point)


class _WeightNorm(eqx.Module):
    loss: AbstractLoss

    def __call__(self, point: Point) -> Scalar:
        return _tree.norm(self.loss.split(point)[0])


class _OutputChange(eqx.Module):
    """max |f(xᵢ) − f₀(xᵢ)| over all examples and outputs."""

    loss: AbstractExampleLoss
    outputs: Array

    def __call__(self, point: Point) -> Scalar:
        return jnp.max(jnp.abs(self.loss.outputs(point) - self.outputs))


def _manifold_of(manifold: Any, loss: Any, point: Point) -> AbstractManifold:
    if not isinstance(loss, AbstractLoss):
        raise ValueError(
            "walk: loss must be a loss, e.g. LeastSquares(inputs, targets) or PerExampleLoss(…); "
            f"got {described(loss)}."
        )
    if manifold is None and isinstance(loss, AbstractExampleLoss):
        trainable = None if loss.trainable is None else loss.trainable.tree
        return OutputManifold(loss.example_output, loss.inputs, like=point, trainable=trainable)
    if not isinstance(manifold, AbstractManifold):
        raise ValueError(
            "walk: manifold must be where the walk stays, e.g. ZeroLossManifold(loss), or None for "
            f"the outputs of a loss over examples; got {described(manifold)} and a "
            f"{type(loss).__name__}."
        )
    return manifold


def _observables(loss: AbstractLoss, point: Point, fn: _Objective, given: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        fn.objective.name: fn, "loss": loss, "weight norm": _WeightNorm(loss)
    }  # fmt: skip
    if isinstance(loss, AbstractExampleLoss):
        own["largest change of an output"] = _OutputChange(loss, loss.outputs(point))
    taken = own.keys() & given.keys()
    if taken:
        raise ValueError(
            f"walk: observe must have names of its own; got {sorted(taken)}, which walk observes "
            "itself."
        )
    return own | given


@eqx.filter_jit
def _rates(manifold: AbstractManifold, fn: _Objective, point: Point) -> tuple[Scalar, Scalar]:
    """F and ‖P∇F‖ at the start."""
    return fn(point), _tree.norm(riemannian_gradient(manifold, fn, point))


def _check_start(objective: AbstractObjective, first: Scalar, slope: Scalar) -> None:
    if not is_traced((first, slope)) and not (jnp.isfinite(first) and jnp.isfinite(slope)):
        raise ValueError(
            f"walk: objective must be finite at the start, with its gradient; the {objective.name} "
            f"is {float(first):.3g} and ‖P∇F‖ {float(slope):.3g}. Is the model trained and finite?"
        )


def _end_time(objective: AbstractObjective, end_time: Any, first: Scalar, slope: Scalar) -> Any:
    if end_time is not None:
        return end_time
    if not is_traced(first) and not float(first) > 0:
        raise ValueError(
            f"walk: end_time must be given for the flow of an objective that is not positive; the "
            f"{objective.name} is {float(first):.3g} at the start."
        )
    # A start that is stationary ends at once, whatever the time.
    return _UNITS * first / _tree.where(slope > 0, slope**2, first)


def _checked_key(
    loss: Any, objective: Any, manifold: Any, end_time: Any, learning_rate: Any, key: Any
) -> Key:
    """The key of a stochastic walk whose other options are sound too."""
    if not isinstance(loss, AbstractExampleLoss):
        raise ValueError(
            f"walk: loss must be over examples for StochasticWalk; got {described(loss)}."
        )
    if not isinstance(objective, Flatness) or manifold is not None or end_time is not None:
        raise ValueError(
            "walk: StochasticWalk lowers the flatness, without a manifold, for max_steps steps; "
            f"got the {objective.name}, {described(manifold)} and end_time={end_time!r}."
        )
    if learning_rate is None or key is None:
        raise ValueError(
            f"walk: StochasticWalk needs learning_rate and key; got {described(learning_rate)} and "
            f"{described(key)}. Try a tenth of largest_stable_learning_rate(loss, point)."
        )
    return key


def _method_of(method: Any, end_time: Any, num_saves: int) -> AbstractMethod:
    if method is not None and not isinstance(method, AbstractMethod):
        raise ValueError(
            "walk: method must be 'flow' or a method of minimisation, e.g. "
            f"RiemannianTrustRegion(); got {described(method)}."
        )
    if end_time is not None or num_saves != 1:
        raise ValueError(
            "walk: end_time and num_saves belong to method='flow'; a method of minimisation has "
            f"steps alone, max_steps. Got end_time={end_time!r}, num_saves={num_saves!r}."
        )
    return RiemannianGradientDescent() if method is None else method


def _has_come_far(result: RESULTS) -> Flag:
    """True for a walk that used up its budget, or came as far as rounding lets it."""
    return (result == RESULTS.max_steps_reached) | (result == RESULTS.stalled)


def _delivered(solution: Solution, throw: bool) -> Solution:
    """The walk, or an error if it failed; one that came far has not."""
    as_failure = _tree.where(_has_come_far(solution.result), RESULTS.successful, solution.result)
    final = delivered(solution.final_coordinates, as_failure, throw)
    return eqx.tree_at(lambda s: s.final_coordinates, solution, final)


def _ended(solution: Solution, objective: str) -> Solution:
    """The walk with the last point that it reached, also where it is not stationary there.

    Where the objective is NaN it may seem stationary: a constant has no gradient.
    """
    is_spent, is_stationary = (
        _has_come_far(solution.result), solution.result == RESULTS.stopped_early
    )  # fmt: skip
    # Saves that were not reached are NaN.
    is_there = [
        jnp.isfinite(x.reshape(len(x), -1)).all(1) for x in jax.tree.leaves(solution.points)
    ]
    reached = jnp.sum(jnp.all(jnp.stack(is_there), axis=0)) - 1
    index = jnp.minimum(jnp.arange(len(solution.times)), reached)
    last = lambda saves: jax.tree.map(lambda x: x[index], saves)
    kept = jax.tree.map(lambda x: x[reached], solution.points)
    values = solution.observables[objective][index]
    result = _tree.where(is_stationary, RESULTS.successful, solution.result)
    is_lost = solution.is_successful & ~jnp.isfinite(values[-1])
    final = _tree.where(is_spent, kept, solution.final_coordinates)
    return Solution(
        times=_tree.where(is_spent, last(solution.times), solution.times),
        points=_tree.where(is_spent, last(solution.points), solution.points),
        observables=_tree.where(is_spent, last(solution.observables), solution.observables),
        stats=solution.stats,
        result=_tree.where(is_lost, RESULTS.nonfinite, result),
        final_coordinates=_tree.where(
            is_lost, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), final), final
        ),
        remainder=eqx.combine(solution.frozen, solution.remainder.tree),
        clock=solution.clock,
    )
