"""The check that a function is convex along the geodesics through a point."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_positive, shapes_of
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.geometry import (
    covariant_hessian,
    geodesic_with_velocity,
    riemannian_gradient,
)
from manifoldflow.manifolds import AbstractManifold


class ConvexityCheck(eqx.Module):
    """The second derivatives of a function along geodesics of unit speed; true where it is convex.

    Attributes:
        least: the least second derivative of F that was met.
        largest: the largest.
        direction: the number of the geodesic with the least one, counted from 0.
        time: its place on that geodesic, as a length from the point, negative backwards.
        steepest: the largest norm of the gradient of F along the manifold that was met.
        tolerance: the bound on −`least`, relative to the largest second derivative in size.
        holds: True where F is convex at all places that were looked at.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> check = diagnostics.ConvexityCheck(0.5, 2.0, 3, -0.1, 1.0, 1e-6, True)
        >>> print(bool(check), str(check)[-12:])
        True convex there
    """

    least: float
    largest: float
    direction: int
    time: float
    steepest: float
    tolerance: float
    holds: bool

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        verdict = "convex there" if self.holds else "NOT convex"
        return (
            f"second derivatives along geodesics: {self.least:.4g} … {self.largest:.4g}, the least "
            f"of geodesic {self.direction} at {self.time:.3g}: {verdict}"
        )


@checked_concrete
def check_geodesic_convexity(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    key: Key | None = None,
    *,
    length: Any,
    directions: Tangent | None = None,
    num_directions: int = 8,
    num_times: int = 2,
    tolerance: float | None = None,
) -> ConvexityCheck:
    """The check that F is convex along geodesics through a point: d²F(γ(t))/dt² ≥ 0.

    γ has unit speed; the second derivative is taken at the point and at `num_times` places on
    either side of it. At one point the least of all directions is the smallest eigenvalue of
    `covariant_hessian` (`linalg.smallest_eigenvalues`); along geodesics one can only try
    directions. [Gatmiry2024] has F = ½tr∇²L convex where its gradient is small: `steepest` is the
    largest that was met.

    Args:
        manifold: the manifold.
        fn: F, point → scalar, twice differentiable.
        point: a point of the manifold.
        key: draws random directions, if none are given.
        length: of the geodesics to either side, > 0.
        directions: tangents with a leading axis of their number; their tangent parts count.
        num_directions: the number of random ones.
        num_times: the number of places on either side, the ends among them.
        tolerance: relative; None for 1e-6 in float64 and 1e-3 in float32.

    Returns:
        A `ConvexityCheck`: true or false, and printable.

    Raises:
        ValueError: neither a key nor directions; a direction without a tangent part; geodesics that
            cannot be followed so far; a call inside jit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, top = mf.LevelSet(lambda x: x @ x - 1), jnp.array([0.0, 1.0])
        >>> check = mf.diagnostics.check_geodesic_convexity(
        ...     circle, lambda x: -x[1], top, jax.random.key(0), length=1.0, num_directions=1
        ... )
        >>> print(bool(check), round(check.least, 3), round(check.largest, 3))  # cos 1 and 1
        True 0.54 1.0

    References:
        [Gatmiry2024, Lemmas 4 and 19].
    """
    coordinates, _ = manifold.split(point)
    if tolerance is None:
        tolerance = 1e-6 if _precision.is_double(_tree.dtype_of(coordinates)) else 1e-3
    tolerance = float(checked_positive("check_geodesic_convexity: tolerance", tolerance))
    reach = float(checked_positive("check_geodesic_convexity: length", length))
    vectors = _unit_directions(manifold, point, directions, key, num_directions)
    times = np.linspace(0, reach, num_times + 1)
    there = jnp.asarray(times, _tree.dtype_of(coordinates))
    # A geodesic backwards is one along minus its direction.
    both = jax.tree.map(lambda leaf: jnp.concatenate([leaf, -leaf]), vectors)
    found = _along(manifold, _tree.as_pytree_callable(fn), point, both, there)
    bends, slopes = (np.asarray(values, np.float64) for values in found)
    if not (np.all(np.isfinite(bends)) and np.all(np.isfinite(slopes))):
        raise ValueError(
            f"check_geodesic_convexity: got a length of {reach:.6g}, expected one over which the "
            "geodesics can be followed and fn has two derivatives; ask for a shorter one."
        )
    row, place = np.unravel_index(np.argmin(bends), bends.shape)
    backwards, direction = divmod(int(row), len(bends) // 2)
    least, largest = float(np.min(bends)), float(np.max(bends))
    return ConvexityCheck(
        least,
        largest,
        direction,
        float(times[place]) * (-1 if backwards else 1),
        float(np.max(slopes)),
        tolerance,
        bool(least >= -tolerance * np.max(np.abs(bends))),
    )


def _unit_directions(
    manifold: AbstractManifold,
    point: Point,
    directions: Tangent | None,
    key: Key | None,
    num_directions: int,
) -> Tangent:
    """Tangents of length 1, along a leading axis."""
    if directions is None:
        if key is None:
            raise ValueError(
                "check_geodesic_convexity: got neither directions nor a key, expected one of "
                "them; key=jax.random.key(0) draws random directions."
            )
        directions = _drawn(manifold, point, jr.split(key, num_directions))
    _check_axes(manifold.split(point)[0], directions)
    before, sizes, units = _tangent_parts(manifold, point, directions)
    if not np.all(np.asarray(sizes) > 10 * _tree.eps_of(directions) * np.asarray(before)):
        raise ValueError(
            f"check_geodesic_convexity: got directions with tangent parts of lengths {sizes}, "
            "expected all above 0; draw them by manifold.random_tangent."
        )
    return units


@eqx.filter_jit
def _drawn(manifold: AbstractManifold, point: Point, keys: Array) -> Tangent:
    return jax.vmap(lambda key: manifold.random_tangent(point, key))(keys)


@eqx.filter_jit
def _tangent_parts(
    manifold: AbstractManifold, point: Point, directions: Tangent
) -> tuple[Array, Array, Tangent]:
    """The lengths before and after projection, and the parts scaled to length 1."""
    before = jax.vmap(_tree.norm)(directions)
    parts = jax.vmap(lambda vector: manifold.tangent_projection(point, vector))(directions)
    sizes = jax.vmap(_tree.norm)(parts)
    return before, sizes, jax.vmap(lambda size, part: _tree.scale(1 / size, part))(sizes, parts)


def _check_axes(coordinates: Any, directions: Any) -> None:
    """One leading axis before the axes of each coordinate."""
    wanted, given = jax.tree.flatten(coordinates), jax.tree.flatten(directions)
    shapes = [np.shape(leaf) for leaf in given[0]]
    counts = {shape[:1] for shape in shapes}
    fits = given[1] == wanted[1] and len(counts) == 1 and counts != {(0,)}
    if not (fits and all(a[1:] == b.shape and a for a, b in zip(shapes, wanted[0]))):
        raise ValueError(
            f"check_geodesic_convexity: got directions of shapes {shapes_of(directions)}, expected "
            f"a leading axis of their number before {shapes_of(coordinates)}; stack tangents."
        )


@eqx.filter_jit
def _along(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    vectors: Tangent,
    times: Float[Array, " times"],
) -> tuple[Float[Array, "directions times"], Float[Array, "directions times"]]:
    """⟨∇²F γ′, γ′⟩ and the norm of the gradient, for each direction and time."""
    remainder = manifold.split(point)[1]

    def seen(position: Tangent, moving: Tangent) -> tuple[Scalar, Scalar]:
        here = _tree.join(position, remainder)
        bend = _tree.inner(moving, covariant_hessian(manifold, fn, here).mv(moving))
        return bend, _tree.norm(riemannian_gradient(manifold, fn, here, throw=False))

    def along(vector: Tangent) -> tuple[Array, Array]:
        path, moving = geodesic_with_velocity(manifold, point, vector, times, throw=False)
        return jax.vmap(seen)(manifold.split(path)[0], moving)

    return jax.vmap(along)(vectors)
