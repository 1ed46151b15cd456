"""The closest point of a manifold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._solution import delivered, Info, RESULTS, without_step_limit
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._bending import Bending

_MAX_STEPS = 50


@checked
def closest_point(manifold: AbstractManifold, point: Point, *, throw: bool = True) -> Point:
    """The point y of the manifold with point − y normal to it, near `manifold.project(point)`.

    By Newton's method along the manifold, from where `project` lands. A local minimum of
    the distance if the point is nearer than the radius of curvature. Derivatives in the
    point are those of the closest point, (1 − S_n)⁻¹P with the shape operator of
    n = point − y; those in data that move the manifold are not known.

    Args:
        manifold: the manifold.
        point: any point near it.
        throw: raise if none is found; with `throw=False` the coordinates are NaN.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.
    """
    landed, info = closest_point_with_info(manifold, point)
    coordinates, remainder = manifold.split(landed)
    return _tree.join(delivered(coordinates, info, throw), remainder)


@checked
@eqx.filter_jit
def closest_point_with_info(manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
    """As `closest_point`, with the `Info` of the search; failed ones have NaN coordinates."""
    coordinates, remainder = manifold.split(point)
    fixed = jax.lax.stop_gradient(coordinates)
    landed, first = manifold.project_with_info(_tree.join(fixed, remainder))
    floor = 4 * _tree.eps_of(coordinates) * jnp.maximum(1, _tree.norm(fixed))

    def going(state: tuple) -> Array:
        _, info, size, shrinks, count = state
        return info.is_successful & shrinks & (size > floor) & (count < _MAX_STEPS)

    def step(state: tuple) -> tuple:
        y, _, before, _, count = state
        towards = _step(manifold, y, fixed, remainder)
        moved, info = manifold.retract_with_info(_tree.join(y, remainder), towards)
        size = _tree.norm(towards)
        return manifold.split(moved)[0], info, size, size < before, count + 1

    infinite = jnp.asarray(jnp.inf, _tree.dtype_of(fixed))
    start = manifold.split(landed)[0], first, infinite, jnp.asarray(True), jnp.asarray(0)
    y, info, _, _, count = jax.lax.while_loop(going, step, start)
    left = _tree.norm(_step(manifold, y, fixed, remainder))
    bound = 1e3 * _tree.eps_of(fixed) ** (2 / 3) * jnp.maximum(1, _tree.norm(fixed))
    result = RESULTS.where(
        info.is_successful & ~(left <= bound), RESULTS.max_steps_reached, info.result
    )
    result = without_step_limit(result)
    info = Info(result, info.defect, count, first.num_factorizations + 2 * count)
    y = jax.lax.stop_gradient(y)
    # Nothing is left to go; the derivative of this step is that of the closest point.
    final = _tree.add(y, _step(manifold, y, coordinates, remainder))
    return _tree.join(delivered(final, info, False), remainder), info


def _step(
    manifold: AbstractManifold, y: Coordinates, target: Coordinates, remainder: Point
) -> Tangent:
    """Newton's step for ½|target − y|² along the manifold: (P − S_n)w = P(target − y)."""
    space = manifold.normal_space(_tree.join(y, remainder))
    bend = Bending(manifold, y, remainder, space)
    gap = _tree.subtract(target, y)
    multipliers = jax.lax.stop_gradient(space.multipliers(gap))

    def mv(w: Tangent) -> Tangent:
        tangent = space.tangent(w)
        turned = space.tangent(bend.turn(multipliers, tangent))
        return _tree.add(w, turned)

    operator = lx.FunctionLinearOperator(mv, _tree.structure_of(y), lx.positive_semidefinite_tag)
    tol = _tree.eps_of(y) ** 0.9
    solver = lx.CG(rtol=tol, atol=tol, max_steps=10 * min(100, _tree.size(y)))
    found = lx.linear_solve(operator, space.tangent(gap), solver, throw=False)
    return space.tangent(found.value)
