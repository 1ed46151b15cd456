"""Ways from a point along a tangent back to the manifold, as values, and their inverses."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._results import delivered, Info, or_nan, RESULTS, without_step_limit
from manifoldflow._types import Coordinates, Flag, Point, Tangent
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._normal_space import AbstractNormalSpace

_MAX_STEPS = 100


class AbstractRetraction(eqx.Module):
    """A map R_x(v) from tangents to points of a manifold, with R_x(0) = x and ∂R_x(0) = 1.

    Its `order` is 2 if it agrees with the exponential map up to an error of third order in v,
    and 1 if up to an error of second order. A subclass defines `order`, `with_info` and
    `inverse_with_info`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> retraction = mf.NewtonRetraction()
        >>> isinstance(retraction, mf.AbstractRetraction), retraction.order
        (True, 2)
        >>> print(retraction(circle, x, jnp.array([0.0, 0.6])).round(3))
        [0.8 0.6]
    """

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """The order, 1 or 2, to which it agrees with the exponential map."""

    @abc.abstractmethod
    def with_info(
        self,
        manifold: AbstractManifold,
        point: Point,
        vector: Tangent,
        *,
        space: AbstractNormalSpace | None = None,
    ) -> tuple[Point, Info]:
        """The point R_x(v), NaN where the search failed, and the `Info` of the search.

        `space` is the normal space at the point, where that is known and the vector tangent.
        """

    @abc.abstractmethod
    def inverse_with_info(
        self, manifold: AbstractManifold, point: Point, other: Point
    ) -> tuple[Tangent, Info]:
        """The tangent v at `point` with R(v) = other, and the `Info` of the search."""

    def __call__(
        self, manifold: AbstractManifold, point: Point, vector: Tangent, *, throw: bool = True
    ) -> Point:
        """R_x(v); its tangent part counts. Raises if the search fails and `throw` is set."""
        landed, info = self.with_info(manifold, point, vector)
        return delivered(landed, without_step_limit(info.result), throw)


class NewtonRetraction(AbstractRetraction):
    """The retraction `manifold.retract`, which returns along the normal space at the start.

    Its inverse is P_x(y − x).

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> y = mf.NewtonRetraction()(circle, x, jnp.array([0.0, 0.6]))
        >>> print(y.round(3))  # above x + v
        [0.8 0.6]
    """

    @property
    def order(self) -> int:
        return 2

    def with_info(
        self,
        manifold: AbstractManifold,
        point: Point,
        vector: Tangent,
        *,
        space: AbstractNormalSpace | None = None,
    ) -> tuple[Point, Info]:
        return manifold.retract_with_info(point, vector, space=space)

    def inverse_with_info(
        self, manifold: AbstractManifold, point: Point, other: Point
    ) -> tuple[Tangent, Info]:
        vector = _towards(manifold, point, other)
        landed, info = self.with_info(manifold, point, vector)
        return vector, _judged(manifold, landed, other, info)


class AbstractLandingRetraction(AbstractRetraction):
    """A retraction that brings x + Pv back to the manifold by a map that does not depend on x.

    A subclass defines that map, `land`. `ProjectionRetraction` and `LimitMapRetraction` are such.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> class Projecting(mf.manifolds.AbstractLandingRetraction):
        ...     def land(self, manifold, point):
        ...         return manifold.project_with_info(point)
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> print(Projecting()(circle, x, jnp.array([0.0, 0.75])).round(3))
        [0.8 0.6]
    """

    @abc.abstractmethod
    def land(self, manifold: AbstractManifold, point: Point) -> tuple[Point, Info]:
        """The point of the manifold for a point near it, NaN where the search failed."""

    @property
    def order(self) -> int:
        return 2

    def with_info(
        self,
        manifold: AbstractManifold,
        point: Point,
        vector: Tangent,
        *,
        space: AbstractNormalSpace | None = None,
    ) -> tuple[Point, Info]:
        coordinates, remainder = manifold.split(point)
        tangent = _tree.as_tangent(coordinates, vector)
        if space is None:
            tangent = manifold.normal_space(point).tangent(tangent)
        return self.land(manifold, _tree.join(_tree.add(coordinates, tangent), remainder))

    def inverse_with_info(
        self, manifold: AbstractManifold, point: Point, other: Point
    ) -> tuple[Tangent, Info]:
        return _inverse(self, manifold, point, other)


@checked
def inverse_retract(
    retraction: AbstractRetraction,
    manifold: AbstractManifold,
    point: Point,
    other: Point,
    *,
    throw: bool = True,
) -> Tangent:
    """The tangent v at `point` whose retraction is `other`, a point nearby.

    With `NewtonRetraction` it has derivatives. The other retractions search, and it has none in
    forward or reverse mode.

    Args:
        retraction: the retraction R.
        manifold: the manifold.
        point: a point of the manifold.
        other: another one, nearer than the radius of curvature.
        throw: raise if there is none to be found; with `throw=False` the result is NaN.

    Returns:
        v, with the structure of the coordinates.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.0, 1.0])
        >>> y = jnp.array([0.6, 0.8])
        >>> print(mf.inverse_retract(mf.NewtonRetraction(), circle, x, y).round(3) + 0.0)
        [0.6 0. ]
    """
    vector, info = retraction.inverse_with_info(manifold, point, other)
    result = without_step_limit(info.result)
    return delivered(or_nan(vector, info.is_successful), result, throw)


def _towards(manifold: AbstractManifold, point: Point, other: Point) -> Tangent:
    """P_x(y − x)."""
    chord = _tree.subtract(manifold.split(other)[0], manifold.split(point)[0])
    return manifold.normal_space(point).tangent(chord)


@eqx.filter_jit
def _inverse(
    retraction: AbstractRetraction, manifold: AbstractManifold, point: Point, other: Point
) -> tuple[Tangent, Info]:
    """The fixed point of v ← v + P_x(y − R_x(v)).

    For a retraction of second order the error falls each time by a factor of the order of the
    distance over the radius of curvature.
    """
    start = _towards(manifold, point, other)
    target, _ = manifold.split(other)
    floor = 4 * _tree.eps_of(target) * _tree.norm(target)

    def going(state: tuple) -> Flag:
        _, size, is_shrinking, count = state
        # At the level of rounding the error no longer falls: without this test the loop would go
        # on.
        return is_shrinking & (size > floor) & (count < _MAX_STEPS)

    def step(state: tuple) -> tuple:
        vector, before, _, count = state
        landed, _ = retraction.with_info(manifold, point, vector)
        gap = _tree.subtract(target, manifold.split(landed)[0])
        correction = manifold.normal_space(point).tangent(gap)
        size = _tree.norm(correction)
        return _tree.add(vector, correction), size, size < before, count + 1

    infinite = jnp.asarray(jnp.inf, _tree.dtype_of(target))
    state = start, infinite, jnp.asarray(True), jnp.asarray(0)
    vector, *_ = jax.lax.while_loop(going, step, state)
    landed, info = retraction.with_info(manifold, point, vector)
    return vector, _judged(manifold, landed, other, info)


def _judged(manifold: AbstractManifold, landed: Point, other: Point, info: Info) -> Info:
    """The `Info` of a retraction, which fails where it did not return to the other point."""
    found: Coordinates = manifold.split(landed)[0]
    target, _ = manifold.split(other)
    miss = _tree.norm(_tree.subtract(found, target))
    tol = 100 * _tree.eps_of(target) ** (2 / 3) * _tree.norm(target)
    # Not `miss > tol`, which is False where the miss is NaN.
    missed = info.is_successful & ~(miss <= tol)
    result = _tree.where(missed, RESULTS.not_retracted, info.result)
    return eqx.tree_at(lambda i: (i.result, i.defect), info, (result, miss))
