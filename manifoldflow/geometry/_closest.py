"""The closest point of a manifold."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.linalg import tangent_solve
from manifoldflow.manifolds import AbstractManifold

_MAX_STEPS = 100


@checked
def closest_point(
    manifold: AbstractManifold, point: Point, *, throw: bool = True, max_steps: int = _MAX_STEPS
) -> Point:
    """The closest point y of the manifold: point − y is normal to it, near `manifold.project`.

    By Newton's method along the manifold, from where `project` lands. A local minimum of
    the distance if the point is nearer than the radius of curvature. Derivatives in the
    point are those of the closest point, (1 − S_n)⁻¹P with the shape operator of
    n = point − y; those in data that move the manifold are not known.

    Args:
        manifold: the manifold.
        point: any point near it.
        throw: raise if none is found; with `throw=False` the coordinates are NaN.
        max_steps: of Newton's method, and of each way back to the manifold.

    Returns:
        A point of the manifold.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> ellipse = mf.models.Ellipsoid([2.0, 1.0]).manifold
        >>> print(mf.closest_point(ellipse, jnp.array([0.0, 2.0])).round(3))
        [0. 1.]
    """
    landed, info = closest_point_with_info(manifold, point, max_steps=max_steps)
    return delivered(landed, info.result, throw)


@checked
def closest_point_with_info(
    manifold: AbstractManifold, point: Point, *, max_steps: int = _MAX_STEPS
) -> tuple[Point, Info]:
    """The closest point as by `closest_point`, with the `Info` of the search.

    Args:
        manifold: the manifold.
        point: any point near it.
        max_steps: of Newton's method, and of each way back to the manifold.

    Returns:
        The point, with NaN coordinates where the search failed, and the `Info`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> y, info = mf.geometry.closest_point_with_info(circle, jnp.array([0.0, 2.0]))
        >>> print(y.round(3), info.is_successful)
        [0. 1.] True
    """
    return _closest(manifold, point, checked_count("max_steps", max_steps))


@eqx.filter_jit
def _closest(manifold: AbstractManifold, point: Point, max_steps: int) -> tuple[Point, Info]:
    coordinates, remainder = manifold.split(point)
    # The search has no derivative of its own: the last step below brings that of its result.
    fixed = jax.lax.stop_gradient(coordinates)
    landed, first = manifold.project_with_info(_tree.join(fixed, remainder), max_steps=max_steps)
    floor = 4 * _tree.eps_of(coordinates) * _tree.norm(fixed)

    def going(state: tuple) -> Array:
        _, info, size, shrinks, count = state
        return info.is_successful & shrinks & (size > floor) & (count < max_steps)

    def step(state: tuple) -> tuple:
        y, _, before, _, count = state
        towards = _step(manifold, y, fixed, remainder)
        moved, info = manifold.retract_with_info(
            _tree.join(y, remainder), towards, max_steps=max_steps
        )
        size = _tree.norm(towards)
        return manifold.split(moved)[0], info, size, size < before, count + 1

    infinite = jnp.asarray(jnp.inf, _tree.dtype_of(fixed))
    start = manifold.split(landed)[0], first, infinite, jnp.asarray(True), jnp.asarray(0)
    y, info, _, _, count = jax.lax.while_loop(going, step, start)
    left = _tree.norm(_step(manifold, y, fixed, remainder))
    bound = 1e3 * _tree.eps_of(fixed) ** (2 / 3) * _tree.norm(fixed)
    result = _tree.where(
        info.is_successful & ~(left <= bound), RESULTS.max_steps_reached, info.result
    )
    info = Info(result, info.defect, count, first.num_factorizations + 2 * count)
    y = jax.lax.stop_gradient(y)
    # Nothing is left to go; the derivative of this step is that of the closest point.
    final = _tree.add(y, _step(manifold, y, coordinates, remainder))
    return _tree.join(or_nan(final, info.is_successful), remainder), info


def _step(
    manifold: AbstractManifold, y: Coordinates, target: Coordinates, remainder: Point
) -> Tangent:
    """The Newton step for ½|target − y|² along the manifold: (P − S_n)w = P(target − y)."""
    space = manifold.normal_space(_tree.join(y, remainder))
    local = manifold.local(_tree.join(y, remainder), space=space)
    gap = _tree.subtract(target, y)
    # They multiply w, which is 0 at the end: their derivative is not worth computing.
    multipliers = jax.lax.stop_gradient(space.multipliers(gap))

    def mv(w: Tangent) -> Tangent:
        tangent = space.tangent(w)
        turned = space.tangent(local.turn(multipliers, tangent))
        return _tree.add(w, turned)

    max_steps = 10 * min(100, _tree.size(y))
    rtol = _tree.eps_of(y) ** 0.9
    return space.tangent(tangent_solve(mv, space.tangent(gap), rtol=rtol, max_steps=max_steps))
