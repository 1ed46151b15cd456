"""The way from one point of a manifold to another: the inverse of the exponential map."""

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
from manifoldflow._solution import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Point, Scalar, Tangent
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._geodesics import Walk, walk_along

_MAX_SHOTS = 64


@checked
def logarithm_map(
    manifold: AbstractManifold, point: Point, other: Point, *, throw: bool = True
) -> Tangent:
    """v with exp_point(v) = other, by shooting.

    Finds one geodesic between the points: the shortest if they are near to each other, some
    other, or none, if they are not. Each shot solves D variations of a geodesic: for
    points of up to some hundred coordinates. First derivatives only, in reverse mode.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        other: another.
        throw: raise if no geodesic is found; with `throw=False` the result is NaN.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.
        NotImplementedError: a second derivative is asked for.
    """
    return logarithm_map_with_info(manifold, point, other, throw=throw)[0]


@checked
def distance(
    manifold: AbstractManifold, point: Point, other: Point, *, throw: bool = True
) -> Scalar:
    """The length of the geodesic that `logarithm_map` finds between two points.

    First derivatives only, in reverse mode; zero where the points are the same.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        other: another.
        throw: as for `logarithm_map`.
    """
    return _tree.norm(logarithm_map(manifold, point, other, throw=throw))


@checked
def logarithm_map_with_info(
    manifold: AbstractManifold, point: Point, other: Point, *, throw: bool = False
) -> tuple[Tangent, Info]:
    """As `logarithm_map`, with the `Info` of the search; its defect is the miss at `other`."""
    vector, info = _logarithm(manifold, point, other)
    return delivered(vector, info.result, throw), info


@eqx.filter_jit
def _logarithm(manifold: AbstractManifold, point: Point, other: Point) -> tuple[Tangent, Info]:
    coordinates, remainder = manifold.split(point)
    target, _ = manifold.split(other)
    dynamic = (manifold, coordinates, target)
    fixed = jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, dynamic
    )
    flat, unravel = _tree.ravel(coordinates)

    def miss(v: Array, at: tuple, adjoint: dfx.AbstractAdjoint) -> Array:
        """exp(Pv) − other, and beside it P⊥v: as many equations as unknowns and more."""
        manifold, coordinates, target = at
        start = _tree.join(coordinates, remainder)
        vector = unravel(v)
        walk = Walk(adjoint=adjoint)
        ended, _, _ = walk_along(manifold, start, (vector,), jnp.ones(1, v.dtype), walk)
        end = jax.tree.map(lambda leaf: leaf[-1], manifold.split(ended)[0])
        gap = _tree.ravel(_tree.subtract(end, target))[0]
        return jnp.concatenate([gap, _tree.ravel(manifold.normal_space(start).normal(vector))[0]])

    # In units of the coordinates, which the tolerances of the search know nothing of.
    _, unit = _tree.in_own_units((fixed[1], fixed[2]))
    unit = unit.astype(flat.dtype)
    # Optimistix keeps step sizes in JAX's default precision, and wants the rest in it too.
    default = jnp.promote_types(flat.dtype, jnp.result_type(float))

    def shot(v: Array, args: None) -> Array:
        del args
        gap = miss(unit * v.astype(flat.dtype), fixed, dfx.ForwardMode())
        return (gap / unit).astype(v.dtype)

    chord = (
        fixed[0]
        .normal_space(_tree.join(fixed[1], remainder))
        .tangent(_tree.subtract(fixed[2], fixed[1]))
    )
    length = _tree.norm(_tree.subtract(fixed[2], fixed[1]))
    reach = _tree.norm(chord)
    first = _tree.scale(length / jnp.where(reach > 0, reach, 1), chord)
    eps = _tree.eps_of(coordinates)
    solver = optx.LevenbergMarquardt(rtol=eps**0.6, atol=eps**0.6)
    search = optx.least_squares(
        shot, solver, (_tree.ravel(first)[0] / unit).astype(default), max_steps=_MAX_SHOTS,
        throw=False,
        options={"jac": "fwd"},
    )  # fmt: skip
    found = jax.lax.stop_gradient(search.value.astype(flat.dtype))

    # One more Gauss-Newton step: it sharpens the result, and its first derivative is that of
    # the implicit function.
    slopes = jax.lax.stop_gradient(jax.vmap(
        lambda e: jax.jvp(lambda v: shot(v, None), (found,), (e,))[1], out_axes=1
    )(jnp.eye(flat.size, dtype=flat.dtype)))  # fmt: skip
    gap = miss(unit * found, dynamic, dfx.RecursiveCheckpointAdjoint())
    refined = unravel(unit * found - _lifted(slopes, gap, _tree.ravel((coordinates, target))[0]))
    info = _info(fixed, gap, flat.size, search.stats["num_steps"])
    return or_nan(refined, info.is_successful), info


@jax.custom_jvp
def _lifted(slopes: Array, gap: Array, of: Array) -> Array:
    """The least-squares solution of slopes·v = gap; slopes that depend on `of` as well."""
    del of
    operator = lx.MatrixLinearOperator(slopes)
    return lx.linear_solve(operator, gap, lx.AutoLinearSolver(well_posed=None), throw=False).value


@_lifted.defjvp
def _lifted_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    slopes, gap, of = primals
    # The derivative of the slopes is not known: it matters to second order.
    return _lifted(*primals), _lifted(slopes + 0 * jnp.sum(_once(of)), tangents[1], of)


@jax.custom_jvp
def _once(of: Array) -> Array:
    return of


@_once.defjvp
def _once_jvp(primals: tuple, tangents: tuple) -> Any:
    raise NotImplementedError("logarithm_map and distance have first derivatives only.")


def _info(at: tuple, gap: Array, size: int, num_steps: Array) -> Info:
    _, coordinates, target = at
    miss = jax.lax.stop_gradient(jnp.linalg.norm(gap[:size]))
    tol = 100 * _tree.eps_of(coordinates) ** 0.6 * _tree.norm(target)
    result = RESULTS.where(miss <= tol, RESULTS.successful, RESULTS.no_geodesic)
    result = RESULTS.where(jnp.isfinite(miss), result, RESULTS.nonfinite)
    return Info(result, miss, num_steps, jnp.zeros_like(num_steps))
