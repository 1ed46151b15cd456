"""The limit map Φ of gradient flow, by extrapolated linearly implicit Euler steps.

Gradient flow is stiff: explicit solvers need 10⁴ and more steps before the loss is
tight. Each step here takes 1, 2, …, 7 implicit Euler substeps (`AbstractStiffness`) and
extrapolates them to seventh order.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_positive, is_traced
from manifoldflow._jvp import constraint_dot, filled, no_tangent
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Coordinates, Flag, Point, Scalar, Tangent
from manifoldflow.limits._shown import Shown, shown_of
from manifoldflow.limits._stiffness import AbstractStiffness, stiffness
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss, PerExampleLoss
from manifoldflow.manifolds import AbstractManifold, MinimizerManifold, ZeroLossManifold

ORDER = 7

# A slow step goes less than this share of the way that remains. Steps grow tenfold, so that a kink
# that is crossed takes a few of them; this number in a row goes to and fro across one.
_SLOW, _MOST_SLOW = 1e-3, 100


@checked_but("loss_or_manifold")
def limit_map(
    loss_or_manifold: AbstractLoss | AbstractManifold,
    point: Point,
    *,
    rtol: ArrayLike | None = None,
    max_steps: int = 1000,
    progress: bool | dfx.AbstractProgressMeter | Callable[[dict[str, Any]], None] = False,
    throw: bool = True,
) -> Point:
    """The limit Φ(point) = lim x(t) of gradient flow x' = −∇L(x), x(0) = point.

    Φ is not the nearest point of the manifold, nor `manifold.project(point)`: all three
    agree to first order in the distance only. The derivative is that of the flow, and
    exactly the tangent projection P where the point lies on the manifold
    [LiWangArora2022, Lemma 4.3].

    Args:
        loss_or_manifold: a loss, or a manifold with one. Residual losses need no D×D
            matrix; `FunctionLoss`, and weight decay, take dense Hessians. Inside jit a
            `PerExampleLoss` must come as its `ZeroLossManifold`.
        point: any point in the basin of the manifold.
        rtol: relative error of the result; default 1e-6 in float64, 1e-3 in float32.
        max_steps: steps, each with one Gram matrix or Hessian.
        progress: True prints a line for every step, with what remains of the way: ‖A†∇L‖ for
            the Gauss-Newton matrix (or Hessian) A. A Diffrax progress meter shows the share of
            the decimal places that this has to fall. A function is called with a dict: time
            (steps so far), coordinates, remaining.
        throw: raise where the flow does not reach a minimum; else NaN coordinates.

    Returns:
        A point of the manifold, of the kind of `point`.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member; `not_smooth` where the flow
            is held by a kink of the loss, as that of networks with ReLU mostly is.

    References:
        [LiWangArora2022, §4; Katzenberger1991].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda w: (w[0] * w[1] - 1) ** 2 / 2)
        >>> end = mf.limit_map(loss, jnp.array([2.0, 1.0]))
        >>> print(end.round(3))
        [1.817 0.55 ]
        >>> print(f"{end[0] ** 2 - end[1] ** 2:.4f}")  # gradient flow conserves w₀² − w₁²
        3.0000
    """
    return limit_map_with_info(
        loss_or_manifold, point, rtol=rtol, max_steps=max_steps, progress=progress, throw=throw
    )[0]


@checked_but("loss_or_manifold")
def limit_map_with_info(
    loss_or_manifold: AbstractLoss | AbstractManifold,
    point: Point,
    *,
    rtol: ArrayLike | None = None,
    max_steps: int = 1000,
    progress: bool | dfx.AbstractProgressMeter | Callable[[dict[str, Any]], None] = False,
    throw: bool = False,
) -> tuple[Point, Info]:
    """The limit of gradient flow as by `limit_map`, with the `Info` of the solve.

    Args:
        loss_or_manifold: a loss, or a manifold with one.
        point: any point in the basin of the manifold.
        rtol: relative error of the result.
        max_steps: steps, each with one Gram matrix or Hessian.
        progress: as for `limit_map`.
        throw: raise where the flow does not reach a minimum; else NaN coordinates.

    Returns:
        Φ(point), and the `Info`.

    Raises:
        EquinoxRuntimeError: with `throw=True`, with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda w: (w[0] * w[1] - 1) ** 2 / 2)
        >>> end, info = mf.limit_map_with_info(loss, jnp.array([2.0, 1.0]))
        >>> print(info.is_successful, info.num_steps < 20)
        True True
    """
    if rtol is not None:  # as an array, an argument and not a constant
        rtol = jnp.asarray(rtol) if is_traced(rtol) else checked_positive("limit_map: rtol", rtol)
    manifold = _manifold(loss_or_manifold, point)
    limit, info = _limit_map(manifold, point, rtol, max_steps, shown_of(progress))
    return delivered(limit, info.result, throw), info


@eqx.filter_jit
def _limit_map(
    manifold: AbstractManifold,
    point: Point,
    rtol: Scalar | None,
    max_steps: int,
    shown: Shown,
) -> tuple[Point, Info]:
    coordinates, remainder = manifold.split(point)
    dtype = _tree.dtype_of(coordinates)
    default = 1e-6 if _precision.is_double(_tree.dtype_of(coordinates)) else 1e-3
    rtol = jnp.asarray(default if rtol is None else rtol, dtype)
    limit, info = _limit(
        manifold, coordinates, remainder, rtol=rtol, max_steps=max_steps, shown=shown
    )
    return _tree.join(or_nan(limit, info.is_successful), remainder), info


def _manifold(what: AbstractLoss | AbstractManifold, point: Point) -> AbstractManifold:
    if isinstance(what, AbstractManifold):
        return what
    is_fit = isinstance(what, PerExampleLoss) and what.weight_decay is None
    if is_fit or isinstance(what, AbstractResidualLoss):
        return ZeroLossManifold(what)
    if isinstance(what, AbstractLoss):
        dtype = _tree.dtype_of(what.split(point)[0])
        return MinimizerManifold(what, _tree.relative_rank_cutoff(dtype))
    raise ValueError(
        f"limit_map needs a loss or a manifold; got {type(what).__name__}. Wrap a plain "
        "function of the point in FunctionLoss."
    )


class _State(eqx.Module):
    coordinates: Coordinates
    step_size: Scalar
    remaining: Scalar
    is_done: Flag
    num_steps: Int[Array, ""]
    num_slow: Int[Array, ""]  # the last ones in a row
    meter: PyTree[Array]


class _History(eqx.Module):
    """The accepted steps, kept only where a derivative is wanted."""

    coordinates: Coordinates
    step_sizes: Array


@eqx.filter_custom_jvp
def _limit(
    manifold: AbstractManifold,
    coordinates: Coordinates,
    remainder: Point,
    *,
    rtol: Scalar,
    max_steps: int,
    shown: Shown,
) -> tuple[Coordinates, Info]:
    end, _ = _follow(manifold, coordinates, remainder, rtol, max_steps, None, shown)
    return _landed(manifold, end, remainder, rtol)


@_limit.def_jvp
def _limit_jvp(
    primals: tuple, tangents: tuple, *, rtol: Scalar, max_steps: int, shown: Shown
) -> tuple:
    # The tangent follows the variational equation, by the same steps with the same
    # frozen matrices: a scan, so that it can be transposed. P at the end takes out what
    # the last projection takes out, and is all there is if the start is on the manifold.
    manifold, coordinates, remainder = primals
    manifold_dot, coordinates_dot, remainder_dot = tangents
    history = _History(
        jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), coordinates),
        jnp.zeros(max_steps, _tree.dtype_of(coordinates)),
    )
    end, history = _follow(manifold, coordinates, remainder, rtol, max_steps, history, shown)
    limit, info = _landed(manifold, end, remainder, rtol)

    def replay(tangent: Tangent, record: tuple[Coordinates, Scalar, Array]) -> tuple:
        x, step_size, index = record
        loss, loss_dot = manifold.loss, None if manifold_dot is None else manifold_dot.loss

        def moved() -> Tangent:
            # Held fixed: A keeps the steps stable, and the flow does not depend on it.
            frozen = stiffness(loss, _tree.join(x, remainder))

            def step(loss: AbstractLoss, x: Coordinates, remainder: Point) -> Coordinates:
                return _extrapolated_step(loss, frozen, x, remainder, step_size)[0]

            return eqx.filter_jvp(step, (loss, x, remainder), (loss_dot, tangent, remainder_dot))[1]

        # Else reverse mode would keep all that is inside of every step, and not its start alone.
        moved = jax.checkpoint(moved, prevent_cse=False)
        # A scan has a fixed length, or it could not be transposed: turns after the end do nothing.
        return jax.lax.cond(index < end.num_steps, moved, lambda: tangent), None

    records = (history.coordinates, history.step_sizes, jnp.arange(max_steps))
    tangent, _ = jax.lax.scan(replay, filled(coordinates_dot, coordinates), records)
    # The projection at the end moves along the normal space only: to first order P takes it out.
    space = manifold.normal_space(_tree.join(limit, remainder))
    limit_dot = space.tangent(tangent)
    drift = constraint_dot(manifold, manifold_dot, limit, remainder, remainder_dot)
    if drift is not None:
        limit_dot = _tree.subtract(limit_dot, space.pseudo_inverse(drift))
    return (limit, info), (limit_dot, no_tangent(info))


def _follow(
    manifold: AbstractManifold,
    coordinates: Coordinates,
    remainder: Point,
    rtol: Scalar,
    max_steps: int,
    history: Any,
    shown: Shown,
) -> tuple[_State, Any]:
    """Gradient flow until what remains of it is below the tolerance.

    The last bit is left to the projection, which is right to first order in it. Local
    errors add up, and in the stiff phase they reach twice their estimate: hence 0.05.
    """
    loss = manifold.loss
    dtype = _tree.dtype_of(coordinates)
    # Below 4 eps a local error cannot be told from rounding, and no step would ever be accepted.
    local_rtol = jnp.maximum(0.05 * rtol, 4 * _tree.eps_of(coordinates)).astype(dtype)

    def body(carry: tuple[_State, Any]) -> tuple[_State, Any]:
        state, history = carry
        point = _tree.join(state.coordinates, remainder)
        frozen = stiffness(loss, point)
        remaining = frozen.remaining(loss.gradient(point))
        wanted = rtol * _tree.norm(state.coordinates)
        is_there = remaining <= wanted
        size = frozen.size()
        # The first step: of the fastest time scale, 1/λ_max.
        guess = _tree.where(state.num_steps == 0, 1 / size, state.step_size)

        def is_trying(trial: tuple) -> Flag:
            _, ratio, _, next_size = trial
            # Steps that much shorter than the fastest time scale are not refused for their length:
            # without this bound the loop would go on for ever.
            return ~is_there & (ratio > 1) & (next_size * size > 1e-12)

        def attempt(trial: tuple) -> tuple:
            *_, step_size = trial
            moved, error = _extrapolated_step(loss, frozen, state.coordinates, remainder, step_size)
            allowed = local_rtol * jnp.maximum(_tree.norm(moved), _tree.norm(state.coordinates))
            ratio = _tree.norm(error) / allowed
            # NaN compares as False, and would pass for an accepted step.
            ratio = _tree.where(jnp.isfinite(ratio), ratio, jnp.inf)
            smaller = step_size * jnp.minimum(0.5, _step_factor(ratio))
            return moved, ratio, step_size, smaller

        untried = state.coordinates, jnp.asarray(jnp.inf, dtype), guess, guess
        moved, ratio, step_size, _ = jax.lax.while_loop(is_trying, attempt, untried)
        ratio = _tree.where(is_there, 1, ratio)
        way = _tree.norm(_tree.subtract(moved, state.coordinates))
        num_slow = _tree.where(way < _SLOW * remaining, state.num_slow + 1, 0)
        is_stuck = ~(ratio <= 1) | (num_slow >= _MOST_SLOW)
        # Kept for derivatives alone: a value needs no memory of its path.
        if history is not None:
            history = jax.tree.map(
                lambda all_, one: all_.at[state.num_steps].set(one),
                history,
                _History(state.coordinates, step_size),
            )
        is_done = is_there | is_stuck
        return _State(
            moved,
            step_size * _step_factor(ratio),
            remaining,
            is_done,
            state.num_steps + ~is_done,
            num_slow,
            shown.step(state.meter, state.num_steps, state.coordinates, remaining, wanted),
        ), history

    def is_going(carry: tuple[_State, Any]) -> Flag:
        return ~carry[0].is_done & (carry[0].num_steps < max_steps)

    start = _State(
        coordinates,
        jnp.ones((), dtype),
        jnp.asarray(jnp.inf, dtype),
        jnp.asarray(False),
        jnp.asarray(0),
        jnp.asarray(0),
        shown.init(dtype),
    )
    end, history = jax.lax.while_loop(is_going, body, (start, history))
    shown.close(end.meter)
    return end, history


def _step_factor(ratio: Scalar) -> Scalar:
    """The factor to the next step size from error/tolerance, for a local error h⁷."""
    return jnp.clip(0.9 * jnp.maximum(ratio, 1e-12) ** (-1 / ORDER), 0.1, 10.0)


def _landed(
    manifold: AbstractManifold, end: _State, remainder: Point, rtol: Scalar
) -> tuple[Coordinates, Info]:
    landed, info = manifold.gauss_newton_project(_tree.join(end.coordinates, remainder))
    limit = manifold.split(landed)[0]
    reached = end.remaining <= rtol * _tree.norm(end.coordinates)
    # Later lines overrule earlier ones: the order says which of several reasons is told.
    result = _tree.where(end.is_done, RESULTS.step_too_small, RESULTS.max_steps_reached)
    result = _tree.where(end.num_slow >= _MOST_SLOW, RESULTS.not_smooth, result)
    result = _tree.where(reached, info.result, result)
    finite = jnp.isfinite(end.remaining) & _tree.all_finite(end.coordinates)
    result = _tree.where(finite, result, RESULTS.nonfinite)
    factorizations = end.num_steps + 1 + info.num_factorizations
    return limit, Info(result, info.defect, end.num_steps, factorizations)


def _extrapolated_step(
    loss: AbstractLoss,
    frozen: AbstractStiffness,
    start: Coordinates,
    remainder: Point,
    step_size: Scalar,
) -> tuple[Coordinates, Tangent]:
    """One step of seventh order and its difference from the one of sixth order."""

    def row(_: None, count: Array) -> tuple[None, Tangent]:
        # Linearly implicit Euler: d ← d − h(I + hA)⁻¹∇L(x + d), `count` times with h = step/count.
        h = step_size / count.astype(step_size.dtype)
        resolvent = frozen.resolvent(h)

        def substep(displacement: Tangent, number: Array) -> tuple[Tangent, None]:
            def moved() -> Tangent:
                here = _tree.join(_tree.add(start, displacement), remainder)
                return _tree.subtract(displacement, _tree.scale(h, resolvent(loss.gradient(here))))

            return jax.lax.cond(number < count, moved, lambda: displacement), None

        # Loops of fixed length have derivatives in both modes.
        return None, jax.lax.scan(substep, _tree.zeros_like(start), jnp.arange(ORDER))[0]

    _, table = jax.lax.scan(row, None, jnp.arange(1, ORDER + 1))
    best, error = _weights()

    def combine(weights: np.ndarray) -> Tangent:
        return jax.tree.map(
            lambda t: _precision.tensordot(jnp.asarray(weights, t.dtype), t, axes=1),
            table,
        )

    return _tree.add(start, combine(best)), combine(error)


def _weights() -> tuple[np.ndarray, np.ndarray]:
    """Extrapolation of the rows to step size zero, and its error estimate.

    The Aitken-Neville table for an error expansion in powers of h, summed up.
    """

    def to_zero(counts: np.ndarray) -> np.ndarray:
        # Lagrange's weights at h = 0 for the nodes h = 1/count: Π_{k≠j} nⱼ/(nⱼ − nₖ).
        differences = counts[:, None] - counts[None, :] + np.eye(len(counts))
        return np.prod(np.where(np.eye(len(counts)), 1, counts[:, None] / differences), axis=1)

    counts = np.arange(1, ORDER + 1, dtype=float)
    best = to_zero(counts)
    lower = np.concatenate([[0.0], to_zero(counts[1:])])
    return best, best - lower
