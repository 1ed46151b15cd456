"""The inverse of the exponential map: the way from one point of a manifold to another."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.geometry._geodesics import GeodesicOptions, walk_along
from manifoldflow.manifolds import (
    AbstractManifold,
)

_MAX_SHOTS = 64


@checked
def logarithm_map(
    manifold: AbstractManifold,
    point: Point,
    other: Point,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Tangent:
    """The tangent v with exp_point(v) = other, by shooting.

    Finds one geodesic between the points: the shortest if they are near to each other, some
    other, or none, if they are not. Each shot solves D variations of a geodesic: for
    points of up to some hundred coordinates. First derivatives only, in reverse mode.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        other: another.
        walk: the options for solving for the geodesics, but for `adjoint`: this function
            chooses its own.
        throw: raise if no geodesic is found; with `throw=False` the result is NaN.

    Returns:
        A tangent at `point`, whose length is that of the geodesic.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.
        NotImplementedError: a second derivative is asked for.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.0, 1.0])
        >>> y = jnp.array([0.5, 0.75**0.5])
        >>> print(jnp.abs(mf.logarithm_map(circle, x, y)).round(3))  # π/6 along the circle
        [0.524 0.   ]
    """
    return logarithm_map_with_info(manifold, point, other, walk=walk, throw=throw)[0]


@checked
def distance(
    manifold: AbstractManifold,
    point: Point,
    other: Point,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Scalar:
    """The length of the geodesic that `logarithm_map` finds between two points.

    First derivatives only, in reverse mode; zero where the points are the same.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        other: another.
        walk: as for `logarithm_map`.
        throw: as for `logarithm_map`.

    Returns:
        A length ≥ 0, in units of the coordinates.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> print(f"{mf.distance(circle, x, jnp.array([0.0, 1.0])):.4f}")  # π/2
        1.5708
    """
    return _tree.norm(logarithm_map(manifold, point, other, walk=walk, throw=throw))


@checked
def logarithm_map_with_info(
    manifold: AbstractManifold,
    point: Point,
    other: Point,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = False,
) -> tuple[Tangent, Info]:
    """The tangent of `logarithm_map`, with the `Info` of the search.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        other: another.
        walk: as for `logarithm_map`.
        throw: raise if no geodesic is found; by default the result is then NaN.

    Returns:
        The tangent, and the `Info`; its defect is the miss at `other`.

    Raises:
        EquinoxRuntimeError: with `throw=True`, with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> v, info = mf.geometry.logarithm_map_with_info(circle, x, jnp.array([0.0, 1.0]))
        >>> print(info.is_successful, info.defect < 1e-3)
        True True
    """
    vector, info = _logarithm(manifold, point, other, walk or GeodesicOptions())
    return delivered(vector, info.result, throw), info


class _Shots(eqx.Module):
    """The ends of geodesics from a point, compared with another point."""

    manifold: AbstractManifold
    coordinates: Coordinates
    target: Coordinates
    walk: GeodesicOptions

    def miss(self, v: Array, remainder: Point, adjoint: dfx.AbstractAdjoint) -> Array:
        """The miss exp(Pv) − other, and beside it P⊥v: as many equations as unknowns and more."""
        start = _tree.join(self.coordinates, remainder)
        vector = _tree.ravel(self.coordinates)[1](v)
        walk = dataclasses.replace(self.walk, adjoint=adjoint)
        ended, _, _ = walk_along(self.manifold, start, (vector,), jnp.ones(1, v.dtype), walk)
        end = jax.tree.map(lambda leaf: leaf[-1], self.manifold.split(ended)[0])
        gap = _tree.ravel(_tree.subtract(end, self.target))[0]
        normal = self.manifold.normal_space(start).normal(vector)
        return jnp.concatenate([gap, _tree.ravel(normal)[0]])

    def chord(self, remainder: Point) -> Array:
        """The tangent part of the way to the other point, as long as the whole way."""
        way = _tree.subtract(self.target, self.coordinates)
        space = self.manifold.normal_space(_tree.join(self.coordinates, remainder))
        chord = space.tangent(way)
        reach = _tree.norm(chord)
        return _tree.ravel(_tree.scale(_tree.norm(way) / jnp.where(reach > 0, reach, 1), chord))[0]


@eqx.filter_jit
def _variations(v: Array, shots: _Shots, remainder: Point, unit: Scalar) -> tuple[Array, Array]:
    """The miss along v times the unit, and a row for each of its derivatives in v."""
    along = lambda v: shots.miss(unit * v, remainder, dfx.ForwardMode())
    push = lambda e: jax.jvp(along, (v,), (e,))
    misses, rows = jax.vmap(push)(jnp.eye(v.size, dtype=v.dtype))
    return misses[0], rows


@eqx.filter_custom_jvp
def _shot(v: Array, args: tuple[_Shots, Point, Scalar]) -> tuple[Array, Array]:
    """The miss in units of the coordinates and as it is.

    With its Jacobian as a matrix: as a function, Optimistix would have it in several places of
    its program, with all variations of the geodesic in each.
    """
    return _as_shot(v, args)[0]


@_shot.def_jvp
def _shot_jvp(primals: Any, tangents: Any) -> Any:
    shot, slopes = _as_shot(*primals)
    along = tangents[0] @ slopes
    return shot, (along, (along * primals[1][2]).astype(shot[1].dtype))


def _as_shot(v: Array, args: tuple[_Shots, Point, Scalar]) -> tuple[tuple[Array, Array], Array]:
    shots, remainder, unit = args
    gap, rows = _variations(v.astype(unit.dtype), shots, remainder, unit)
    return ((gap / unit).astype(v.dtype), gap), (rows / unit).astype(v.dtype)


@eqx.filter_jit
def _logarithm(
    manifold: AbstractManifold, point: Point, other: Point, walk: GeodesicOptions
) -> tuple[Tangent, Info]:
    coordinates, remainder = manifold.split(point)
    shots = _Shots(manifold, coordinates, manifold.split(other)[0], walk)
    fixed = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, shots
    )
    flat, unravel = _tree.ravel(fixed.coordinates)
    # In units of the coordinates, which the tolerances of the search know nothing of.
    unit = _tree.size_of((fixed.coordinates, fixed.target)).astype(flat.dtype)
    # Optimistix keeps step sizes in JAX's default precision, and wants the rest in it too.
    default = jnp.promote_types(flat.dtype, jnp.result_type(float))
    eps = _tree.eps_of(coordinates)
    # Least squares, not a root: the miss and P⊥v are 2D equations for D unknowns.
    search = optx.least_squares(
        _shot,
        optx.LevenbergMarquardt(rtol=eps**0.6, atol=eps**0.6),
        (fixed.chord(remainder) / unit).astype(default),
        args=(fixed, remainder, unit),
        has_aux=True,
        max_steps=_MAX_SHOTS,
        throw=False,
        options={"jac": "fwd"},
    )
    info = _info(fixed, search.aux, flat.size, search.stats["num_steps"])
    found = _with_derivative(shots, unit * search.value.astype(flat.dtype), remainder)
    return or_nan(unravel(found), info.is_successful, of=(manifold, point, other)), info


@eqx.filter_custom_vjp
def _with_derivative(shots: _Shots, found: Array, remainder: Point) -> Array:
    """The solution found, with the derivative of the implicit function in all of `shots`."""
    del shots, remainder
    return found


@_with_derivative.def_fwd
def _with_derivative_fwd(perturbed: Any, shots: _Shots, found: Array, remainder: Point) -> Any:
    del perturbed, shots, remainder
    return found, None


@_with_derivative.def_bwd
def _with_derivative_bwd(
    residuals: None,
    cotangent: Array,
    perturbed: Any,
    shots: _Shots,
    found: Array,
    remainder: Point,
) -> Any:
    del residuals, perturbed
    # How the slopes change is not known: it matters to second order.
    found = _once(found, eqx.filter(shots, eqx.is_inexact_array))
    # The rows of the transposed Jacobian of the miss, as `linear_solve` wants them.
    slopes = _variations(found, shots, remainder, jnp.ones_like(found[0]))[1]
    solver = lx.AutoLinearSolver(well_posed=None)
    weights = lx.linear_solve(lx.MatrixLinearOperator(slopes), cotangent, solver, throw=False).value
    through = lambda s: s.miss(found, remainder, dfx.RecursiveCheckpointAdjoint())
    (pulled,) = eqx.filter_vjp(through, shots)[1](-weights)
    return pulled


@jax.custom_jvp
def _once(found: Array, of: Any) -> Array:
    del of
    return found


@_once.defjvp
def _once_jvp(primals: tuple, tangents: tuple) -> Any:
    raise NotImplementedError("logarithm_map and distance have first derivatives only.")


def _info(shots: _Shots, gap: Array, size: int, num_steps: Array) -> Info:
    miss = jax.lax.stop_gradient(jnp.linalg.norm(gap[:size]))
    tol = 100 * _tree.eps_of(shots.coordinates) ** 0.6 * _tree.norm(shots.target)
    result = _tree.where(miss <= tol, RESULTS.successful, RESULTS.no_geodesic)
    result = _tree.where(jnp.isfinite(miss), result, RESULTS.nonfinite)
    return Info(result, miss, num_steps, jnp.zeros_like(num_steps))
