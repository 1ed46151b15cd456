"""Searches for a point of a manifold: `land` from anywhere, `retreat` after a step.

Both are loops that cannot be differentiated through; each has a derivative rule that
follows from what its result satisfies, so that forward and reverse mode both work.
"""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._solution import Info, or_nan, RESULTS
from manifoldflow._types import Coordinates, Flag, Point, Scalar, Tangent
from manifoldflow.manifolds._normal_space import AbstractNormalSpace, Constraint
from manifoldflow.manifolds._tangent_solve import tangent_solve

MAX_STEPS = 100


@runtime_checkable
class Constrained(Protocol):
    """All that a search needs of a manifold."""

    def constraint(self, point: Point) -> Constraint: ...

    def normal_space(self, point: Point) -> AbstractNormalSpace: ...


def tolerance(coordinates: Coordinates) -> float:
    """The relative defect below which a point counts as on the manifold."""
    return _tree.eps_of(coordinates) ** (2 / 3)


def _roundings(coordinates: Coordinates, number: float) -> Scalar:
    """So many roundings of the point itself, as a distance."""
    return number * _tree.eps_of(coordinates) * jnp.maximum(1, _tree.norm(coordinates))


def _is_rounding(
    space: AbstractNormalSpace, constraint: Constraint, coordinates: Coordinates
) -> Flag:
    """Is the constraint about what independent roundings of D coordinates make of it?

    They change f by eps·‖θ‖·‖J‖_F/√D.
    """
    size = jnp.sqrt(space.largest_eigenvalue_bound() / _tree.size(coordinates))
    return _tree.norm(constraint) <= _roundings(coordinates, 1) * size


def reaches(
    space: AbstractNormalSpace,
    constraint: Constraint,
    defect: Scalar,
    coordinates: Coordinates,
    tol: Any = None,
) -> Flag:
    """Is this point on the manifold: a short way to go, and no constraint out of reach?

    A constraint outside the range of J (an empty set, contradictory data) has J†f = 0
    without being zero; it must be small against ‖J‖ as well.
    """
    tol = tolerance(coordinates) if tol is None else tol
    reach = tol * jnp.maximum(1, _tree.norm(coordinates))
    size = jnp.sqrt(space.largest_eigenvalue_bound())
    return (defect <= reach) & (_tree.norm(constraint) <= reach * size)


def _is_stalled(
    space: AbstractNormalSpace, constraint: Constraint, defect: Scalar, coordinates: Coordinates
) -> Flag:
    """May a search that makes no more progress end here?

    Where J nearly loses rank, J†f magnifies what is left of f, the manifold itself is as
    blurred, and Newton's method creeps. So a constraint near its rounding errors is
    enough, and so is a defect below √eps.
    """
    root = _tree.eps_of(coordinates) ** 0.5
    size = jnp.sqrt(space.largest_eigenvalue_bound())
    is_small = _tree.norm(constraint) <= _roundings(coordinates, 16) * size
    is_near = defect <= root * jnp.maximum(1, _tree.norm(coordinates))
    reach = tolerance(coordinates) * jnp.maximum(1, _tree.norm(coordinates))
    return is_small | (is_near & (_tree.norm(constraint) <= reach * size))


class _Progress(eqx.Module):
    """Where a search stands, and what was found there."""

    coordinates: Coordinates
    damping: Scalar  # relative to tr(JJᵀ)
    defect: Scalar
    result: RESULTS  # what it will be if the search ends here
    is_done: Flag
    num_steps: Int[Array, ""]


def _start(coordinates: Coordinates) -> _Progress:
    dtype = _tree.dtype_of(coordinates)
    return _Progress(
        coordinates,
        jnp.asarray(1, dtype),
        jnp.asarray(jnp.inf, dtype),
        RESULTS.successful,
        jnp.asarray(False),
        jnp.asarray(0),
    )


def _search(body: Any, start: Coordinates) -> tuple[Coordinates, Info]:
    def is_going(state: _Progress) -> Flag:
        return ~state.is_done & (state.num_steps < MAX_STEPS)

    end = jax.lax.while_loop(is_going, body, _start(start))
    result = RESULTS.where(end.is_done, end.result, RESULTS.max_steps_reached)
    return end.coordinates, Info(result, end.defect, end.num_steps, end.num_steps)


def _verdict(
    space: AbstractNormalSpace, constraint: Constraint, defect: Scalar, coordinates: Coordinates
) -> RESULTS:
    is_on = reaches(space, constraint, defect, coordinates)
    is_on |= _is_stalled(space, constraint, defect, coordinates)
    result = RESULTS.where(is_on, RESULTS.successful, RESULTS.not_on_manifold)
    result = RESULTS.where(is_on & ~space.is_minimum(), RESULTS.not_a_minimum, result)
    has_normals = space.largest_eigenvalue_bound() > 0
    result = RESULTS.where(has_normals, result, RESULTS.rank_zero)
    finite = _tree.all_finite(coordinates) & jnp.isfinite(defect)
    return RESULTS.where(finite, result, RESULTS.nonfinite)


@eqx.filter_custom_jvp
def land(
    manifold: Constrained, coordinates: Coordinates, remainder: Point, *, is_near: bool = False
) -> tuple[Coordinates, Info]:
    """Damped Gauss-Newton: full steps where the constraint is nearly linear, else damped.

    Undamped steps from a random network wander ten times further than the manifold is
    away; damped ones stay near the path of gradient flow. With `is_near` steps are full
    as long as they shorten the way at all: half the program, and enough for solvers.
    """

    def normal_space(x: Coordinates) -> AbstractNormalSpace:
        return manifold.normal_space(_tree.join(x, remainder))

    def constraint(x: Coordinates) -> Constraint:
        return manifold.constraint(_tree.join(x, remainder))

    def body(state: _Progress) -> _Progress:
        space, value = normal_space(state.coordinates), constraint(state.coordinates)
        newton, left, defect, is_linear = _chord_steps(
            space, constraint, state.coordinates, value, 0.97 if is_near else 0.25
        )
        # At the target, or at a floor of rounding that is as good as the manifold.
        is_there = (defect <= _roundings(newton, 2)) | _is_rounding(space, left, newton)
        is_there |= ~is_linear & _is_stalled(space, left, defect, newton)

        def full() -> tuple[Coordinates, Scalar, Flag]:
            return newton, state.damping, is_linear

        def damped() -> tuple[Coordinates, Scalar, Flag]:
            return _damped_step(space, constraint, state.coordinates, value, state.damping)

        if is_near:
            moved, damping, is_moving = full()
        else:
            moved, damping, is_moving = jax.lax.cond(is_linear | is_there, full, damped)
        return _Progress(
            moved,
            damping,
            defect,
            _verdict(space, left, defect, newton),
            is_there | ~is_moving,
            state.num_steps + 1,
        )

    landed, info = _search(body, coordinates)
    if is_near:
        return landed, info
    is_double = _is_double_zero(normal_space(landed), constraint, landed, info.defect)
    result = RESULTS.where(info.is_successful & is_double, RESULTS.rank_zero, info.result)
    return landed, eqx.tree_at(lambda i: i.result, info, result)


def _is_double_zero(
    space: AbstractNormalSpace, constraint: Any, coordinates: Coordinates, defect: Scalar
) -> Flag:
    """Does the constraint vanish with its slope, as f² does: J ≈ 0 within what is left to go?

    A distance d from such a set the slope along a normal is d times the second derivative,
    and J†f = d/2; elsewhere the two are unrelated, and the slope far larger.
    """
    normal = space.normal(_tree.random_normal_like(jax.random.key(0), coordinates))
    slope = _tree.norm(space.mv(normal))

    def along(x: Coordinates) -> Constraint:
        return jax.jvp(constraint, (x,), (normal,))[1]

    bend = _tree.norm(jax.jvp(along, (coordinates,), (normal,))[1])
    reach = 3 * jnp.maximum(defect, _roundings(coordinates, 16))
    return slope * _tree.norm(normal) <= reach * bend


def _chord_steps(
    space: AbstractNormalSpace,
    constraint: Any,
    start: Coordinates,
    value: Constraint,
    ratio: float,
) -> tuple[Coordinates, Constraint, Scalar, Flag]:
    """Newton steps with one factorisation, while each shortens the way by a ratio.

    Near the manifold, where rounding sets the pace, any shortening will do. Returns the
    last point, the constraint and the defect there, and whether any step was worth taking.
    """
    target = _roundings(start, 2)
    near = tolerance(start) * jnp.maximum(1, _tree.norm(start))

    def going(state: tuple) -> Flag:
        *_, defect, shrinks, count = state
        return shrinks & (defect > target) & (count < 6)

    def step(state: tuple) -> tuple:
        x, value, lift, defect, _, count = state
        moved = _tree.subtract(x, lift)
        value_moved = constraint(moved)
        lift_moved = space.pseudo_inverse(value_moved)
        defect_moved = _tree.norm(lift_moved)
        shrinks = defect_moved <= jnp.where(defect <= near, 0.9, ratio) * defect
        new, old = (moved, value_moved, lift_moved, defect_moved), (x, value, lift, defect)
        return *_tree.where(shrinks, new, old), shrinks, count + shrinks

    lift = space.pseudo_inverse(value)
    first = (start, value, lift, _tree.norm(lift), jnp.asarray(True), jnp.asarray(0))
    x, value, _, defect, _, count = jax.lax.while_loop(going, step, first)
    return x, value, defect, count > 0


def _damped_step(
    space: AbstractNormalSpace,
    constraint: Any,
    start: Coordinates,
    value: Constraint,
    damping: Scalar,
) -> tuple[Coordinates, Scalar, Flag]:
    """A Levenberg-Marquardt step, shortened until the linear model describes it."""
    size = space.largest_eigenvalue_bound()
    before = _tree.norm(value)

    def attempt(damping: Scalar) -> tuple[Coordinates, Flag]:
        lift = space.damped_pseudo_inverse(value, damping * size)
        moved = _tree.subtract(start, lift)
        foreseen = space.mv(lift)
        after = constraint(moved)
        surprise = _tree.norm(_tree.subtract(_tree.subtract(value, foreseen), after))
        good = (surprise <= 0.25 * _tree.norm(foreseen)) & (_tree.norm(after) < before)
        return moved, good

    def failed(state: tuple[Scalar, Coordinates, Flag]) -> Flag:
        return ~state[2] & (state[0] < 1e6)

    def again(state: tuple[Scalar, Coordinates, Flag]) -> tuple[Scalar, Coordinates, Flag]:
        return 4 * state[0], *attempt(4 * state[0])

    damping, moved, good = jax.lax.while_loop(failed, again, (damping, *attempt(damping)))
    return _tree.where(good, moved, start), damping / 8, good


@land.def_jvp
def _land_jvp(primals: tuple, tangents: tuple, *, is_near: bool = False) -> tuple:
    # To first order the search moves along the normal space only: the derivative is P at
    # the result, and data that move the manifold move the result along J†.
    manifold, _, remainder = primals
    manifold_dot, coordinates_dot, remainder_dot = tangents
    landed, info = land(*primals, is_near=is_near)
    space = manifold.normal_space(_tree.join(landed, remainder))
    landed_dot = _tree.zeros_like(landed)
    if jax.tree.leaves(coordinates_dot):
        landed_dot = space.tangent(filled(coordinates_dot, landed))
    drift = constraint_dot(manifold, manifold_dot, landed, remainder, remainder_dot)
    if drift is not None:
        landed_dot = _tree.subtract(landed_dot, space.pseudo_inverse(drift))
    return (landed, info), (landed_dot, no_tangent(info))


@eqx.filter_custom_jvp
def retreat(
    manifold: Constrained, coordinates: Coordinates, vector: Tangent, remainder: Point
) -> tuple[Coordinates, Info]:
    """From x + P v back along the normal space at x (the orthographic retraction).

    Each step is a Gauss-Newton step projected on the normal space at x; it shortens the
    way by the squared sine of the angle between the normal spaces here and there.
    """
    base = manifold.normal_space(_tree.join(coordinates, remainder))
    target = _roundings(coordinates, 2)

    def body(state: _Progress) -> _Progress:
        point = _tree.join(state.coordinates, remainder)
        space, value = manifold.normal_space(point), manifold.constraint(point)
        lift = space.pseudo_inverse(value)
        defect = _tree.norm(lift)
        moved = _tree.subtract(state.coordinates, base.normal(lift))
        # At the floor of rounding, or on the way out: keep what is there.
        is_done = (defect <= target) | ~(defect <= 0.9 * state.defect)
        return _Progress(
            _tree.where(is_done, state.coordinates, moved),
            state.damping,
            defect,
            _verdict(space, value, defect, state.coordinates),
            is_done,
            state.num_steps + 1,
        )

    return _search(body, _tree.add(coordinates, base.tangent(vector)))


@retreat.def_jvp
def _retreat_jvp(primals: tuple, tangents: tuple) -> tuple:
    # The result y lies on the manifold and has P_x(y − x − v) = 0. Its derivative is
    # tangent at y (but for data that move the manifold) with
    # P_x dy = P_x(dx + dv) − dP_x(y − x − v).
    manifold, coordinates, vector, remainder = primals
    manifold_dot, coordinates_dot, vector_dot, remainder_dot = tangents
    landed, info = retreat(*primals)
    here = manifold.normal_space(_tree.join(coordinates, remainder))
    there = manifold.normal_space(_tree.join(landed, remainder))
    gap = _tree.subtract(_tree.subtract(landed, coordinates), vector)

    def projected_gap(manifold: Constrained, x: Coordinates, remainder: Point) -> Tangent:
        return manifold.normal_space(_tree.join(x, remainder)).tangent(gap)

    _, turned = eqx.filter_jvp(
        projected_gap,
        (manifold, coordinates, remainder),
        (manifold_dot, coordinates_dot, remainder_dot),
    )
    moved = _tree.add(filled(coordinates_dot, landed), filled(vector_dot, landed))
    wanted = _tree.subtract(here.tangent(moved), filled(turned, landed))
    normal_dot = _tree.zeros_like(landed)
    drift = constraint_dot(manifold, manifold_dot, landed, remainder, remainder_dot)
    if drift is not None:
        normal_dot = _tree.scale(-1, there.pseudo_inverse(drift))
        wanted = _tree.subtract(wanted, here.tangent(normal_dot))
    # In reverse mode conjugate gradients make 0 of NaN: on the way back it passes here after them.
    tangent_dot = _oblique_lift(here, there, or_nan(wanted, info.is_successful))
    return (landed, info), (_tree.add(tangent_dot, normal_dot), no_tangent(info))


def _oblique_lift(
    here: AbstractNormalSpace, there: AbstractNormalSpace, wanted: Tangent
) -> Tangent:
    """The tangent w there whose projection here is the wanted one."""

    def mv(w: Tangent) -> Tangent:
        tangent = there.tangent(w)
        return _tree.add(there.tangent(here.tangent(tangent)), _tree.subtract(w, tangent))

    tol = _tree.eps_of(wanted) ** 0.9
    return there.tangent(tangent_solve(mv, there.tangent(wanted), tol))


def constraint_dot(
    manifold: Constrained,
    manifold_dot: PyTree[Any],
    coordinates: Coordinates,
    remainder: Point,
    remainder_dot: PyTree[Any],
) -> Constraint | None:
    """How the constraint changes at a fixed point when data (or frozen leaves) do."""
    if not jax.tree.leaves((manifold_dot, remainder_dot)):
        return None

    def value(manifold: Constrained, remainder: Point) -> Constraint:
        return manifold.constraint(_tree.join(coordinates, remainder))

    return eqx.filter_jvp(value, (manifold, remainder), (manifold_dot, remainder_dot))[1]


def filled(tangent: PyTree[Any], like: Coordinates) -> Tangent:
    """Zeros where a tangent is symbolically zero (None)."""
    return jax.tree.map(
        lambda x, dx: jnp.zeros_like(x) if dx is None and x is not None else dx,
        like,
        tangent,
        is_leaf=lambda leaf: leaf is None,
    )


def no_tangent(tree: PyTree[Any]) -> PyTree[None]:
    return jax.tree.map(lambda _: None, tree)
