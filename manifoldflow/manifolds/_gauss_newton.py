"""The way to a manifold from anywhere: damped Gauss-Newton, as one loop."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from manifoldflow import _tree
from manifoldflow._jvp import constraint_dot, filled, no_tangent
from manifoldflow._results import Info
from manifoldflow._types import Constraint, Coordinates, Flag, Point, Scalar
from manifoldflow.manifolds._normal_space import AbstractNormalSpace
from manifoldflow.manifolds._search import (
    Constrained,
    Floors,
    Found,
    look,
    MAX_STEPS,
    nothing_found,
)


class _Chord(eqx.Module):
    """Steps with one factorisation: the point that they have reached, and the next to be tried."""

    coordinates: Coordinates
    value: Constraint
    defect: Scalar
    trial: Coordinates
    value_trial: Constraint
    foreseen: Constraint  # at the trial, where f is linear
    fall: Scalar  # what the first step has made of ‖f‖, as a factor
    num_steps: Int[Array, ""]
    shrinks: Flag


def _chord_steps(
    space: AbstractNormalSpace,
    constraint: Any,
    start: Coordinates,
    value: Constraint,
    floors: Floors,
    ratio: float,
    is_full: Flag,
) -> _Chord:
    """Newton steps, or a damped one, while each shortens what was not foreseen by a ratio.

    Near the manifold, where rounding sets the pace, any shortening will do.
    """
    # Steps with an old factorisation converge linearly: after some of them a new one is cheaper.
    before, limit = space.shortfall(value), _tree.where(is_full, 7, 2)

    def going(state: _Chord) -> Flag:
        return state.shrinks & (state.defect > floors.target) & (state.num_steps < limit)

    def step(state: _Chord) -> _Chord:
        lift, foreseen = space.step(_tree.subtract(state.value_trial, state.foreseen))
        defect = _tree.norm(lift)
        wanted = _tree.where(state.defect <= floors.near, 0.9, ratio) * state.defect
        left = space.shortfall(state.value_trial)
        # Damped steps have no business where f grows.
        # A defect of NaN fails every comparison, and so ends the steps.
        shrinks = (defect <= wanted) & (is_full | (state.num_steps == 0) | (left < before))
        there = state.trial, state.value_trial, defect
        here = state.coordinates, state.value, state.defect
        x, value, defect = _tree.where(shrinks, there, here)
        trial = _tree.subtract(state.trial, lift)
        fall = left / _tree.where(before > 0, before, 1)
        return _Chord(
            x,
            value,
            defect,
            trial,
            constraint(trial),
            foreseen,
            _tree.where(state.num_steps == 1, fall, state.fall),
            state.num_steps + shrinks,
            shrinks,
        )

    infinite = jnp.asarray(jnp.inf, _tree.dtype_of(start))
    first = _Chord(
        start,
        value,
        infinite,
        start,
        value,
        _tree.zeros_like(value),
        jnp.zeros_like(infinite),
        jnp.asarray(0),
        jnp.asarray(True),
    )
    return jax.lax.while_loop(going, step, first)


class _Landing(eqx.Module):
    """The state of a search by `gauss_newton_project`."""

    coordinates: Coordinates
    value: Constraint
    found: Found
    is_full: Flag  # is the next step to be a full one?
    damping: Scalar  # if not; relative to the size of J
    num_quarters: Int[Array, ""]
    num_steps: Int[Array, ""]
    num_factorizations: Int[Array, ""]
    is_done: Flag
    is_double: Flag


# At a double zero full steps shorten ‖f‖ to a quarter to the last, elsewhere only far away.
_NUM_QUARTERS = 4


@eqx.filter_custom_jvp
def gauss_newton_project(
    manifold: Constrained,
    coordinates: Coordinates,
    remainder: Point,
    *,
    is_near: bool = False,
    max_steps: Int[Array, ""] | int = MAX_STEPS,
) -> tuple[Coordinates, Info]:
    """Damped Gauss-Newton: full steps where the constraint is nearly linear, else damped.

    Undamped steps from a random network wander ten times further than the manifold is
    away; damped ones stay near the path of gradient flow. With `is_near` steps are full
    as long as they shorten the way at all, which is enough for solvers.
    """

    def constraint(x: Coordinates) -> Constraint:
        return manifold.constraint(_tree.join(x, remainder))

    def going(state: _Landing) -> Flag:
        return ~state.is_done & (state.num_steps < max_steps)

    def step(state: _Landing) -> _Landing:
        damping = _tree.where(state.is_full, 0, state.damping)
        space = manifold.normal_space(_tree.join(state.coordinates, remainder)).damped(damping)
        chord = _chord_steps(
            space,
            constraint,
            state.coordinates,
            state.value,
            Floors(state.coordinates),
            0.97 if is_near else 0.3,
            state.is_full,
        )
        is_linear = chord.num_steps > 1
        floors = Floors(chord.coordinates)
        found = look(space, chord.value, chord.defect, floors)
        # At the target, or at a floor of rounding that is as good as the manifold.
        is_there = chord.defect <= floors.target
        is_there |= found.shortfall <= floors.each
        # At a double zero f ~ d²: a full step halves the distance d, and so takes ‖f‖ to a quarter.
        is_quarter = state.is_full & (jnp.abs(chord.fall - 0.25) < 0.02)
        # Levenberg-Marquardt: trust the linear model more after it was right, less after it was
        # wrong.
        grown = _tree.where(is_linear, state.damping / 8, 4 * state.damping)
        damping = _tree.where(state.is_full, state.damping, grown)
        num_quarters = _tree.where(is_quarter, state.num_quarters + 1, 0)
        # The last step may be lost in rounding. At the start no step can tell.
        is_double = jnp.maximum(num_quarters, state.num_quarters) >= _NUM_QUARTERS
        if not is_near:
            is_first = state.num_factorizations == 0
            x, value = state.coordinates, state.value
            is_double |= is_first & _is_slope_rounding(space, constraint, x, value)
        # Steps 10⁶ times shorter than a gradient step lead nowhere.
        is_lost = ~is_linear & (is_near | (damping > 1e6))
        return _Landing(
            chord.coordinates,
            chord.value,
            found,
            is_linear,
            damping,
            num_quarters,
            state.num_steps + is_linear,
            state.num_factorizations + 1,
            (state.is_full & (is_there | (~is_linear & found.is_stalled))) | is_lost,
            is_double,
        )

    norm, zero, false = _tree.norm(coordinates), jnp.asarray(0), jnp.asarray(False)
    start = _Landing(
        coordinates,
        constraint(coordinates),
        nothing_found(norm),
        jnp.asarray(True),
        jnp.ones_like(norm),
        zero,
        zero,
        zero,
        false,
        false,
    )
    end = jax.lax.while_loop(going, step, start)
    result = end.found.verdict(end.is_done, end.is_double)
    return end.coordinates, Info(result, end.found.defect, end.num_steps, end.num_factorizations)


def _is_slope_rounding(
    space: AbstractNormalSpace, constraint: Any, coordinates: Coordinates, value: Constraint
) -> Flag:
    """True where the slope itself is a rounding error, as on a double zero.

    √eps further on, f then has grown far more than its slope foresees.
    """
    outward, root = space.outward(), _tree.eps_of(coordinates) ** 0.5
    size = _tree.norm(outward)
    reach = root * _tree.norm(coordinates)
    move = _tree.scale(reach / _tree.where(size > 0, size, 1), outward)
    growth = _tree.subtract(constraint(_tree.add(coordinates, move)), value)
    return space.shortfall(growth) > 0.05 / root * reach


@gauss_newton_project.def_jvp
def _gauss_newton_jvp(
    primals: tuple,
    tangents: tuple,
    *,
    is_near: bool = False,
    max_steps: Int[Array, ""] | int = MAX_STEPS,
) -> tuple:
    # To first order the search moves along the normal space only: the derivative is P at
    # the result, and data that move the manifold move the result along J†.
    manifold, _, remainder = primals
    manifold_dot, coordinates_dot, remainder_dot = tangents
    landed, info = gauss_newton_project(*primals, is_near=is_near, max_steps=max_steps)
    space = manifold.normal_space(_tree.join(landed, remainder))
    landed_dot = _tree.zeros_like(landed)
    # No leaf where only the data move: then no tangent projection is compiled.
    if jax.tree.leaves(coordinates_dot):
        landed_dot = space.tangent(filled(coordinates_dot, landed))
    drift = constraint_dot(manifold, manifold_dot, landed, remainder, remainder_dot)
    if drift is not None:
        landed_dot = _tree.subtract(landed_dot, space.pseudo_inverse(drift))
    return (landed, info), (landed_dot, no_tangent(info))
