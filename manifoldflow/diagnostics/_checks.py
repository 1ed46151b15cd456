"""Numerical checks of derivatives and of maps on a manifold, by the rate at which errors fall."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_positive
from manifoldflow._types import Key, Point, Tangent
from manifoldflow.diagnostics._slopes import slope_check, SlopeCheck, step_sizes
from manifoldflow.geometry import (
    covariant_hessian,
    exponential_map,
    riemannian_gradient,
    transport_along_geodesic,
    Walk,
)
from manifoldflow.manifolds import (
    AbstractManifold,
    AbstractRetraction,
    NewtonRetraction,
)


@checked_concrete
def check_gradient(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    key: Key,
    *,
    gradient: Tangent | None = None,
) -> SlopeCheck:
    """The check of a Riemannian gradient: F(R(tv)) − F − t⟨∇F, v⟩ must fall like t².

    Args:
        manifold: the manifold.
        fn: F, point → scalar.
        point: a point of the manifold.
        key: draws the random unit tangent v.
        gradient: the gradient to check; None for `riemannian_gradient`. Its tangent part is
            checked.

    Returns:
        A `SlopeCheck`: true or false, and printable.

    Raises:
        ValueError: a manifold of dimension 0; a point that is not finite; a call inside jit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, point = mf.LevelSet(lambda x: x @ x - 1), jnp.array([0.6, 0.8])
        >>> wrong = jnp.array([0.8, -0.6])  # the gradient of x₀ is 0.8 times that
        >>> check = mf.diagnostics.check_gradient(
        ...     circle, lambda x: x[0], point, jax.random.key(0), gradient=wrong
        ... )
        >>> print(bool(check))
        False
    """
    if gradient is None:
        gradient = riemannian_gradient(manifold, fn, point)
    gradient = _tree.as_tangent(manifold.split(point)[0], gradient, "gradient")
    vector = _unit_tangent(manifold, point, key)
    values, start = _values(manifold, fn, point, vector)
    errors = (
        values(step_sizes(point)) - start - step_sizes(point) * float(_tree.inner(gradient, vector))
    )
    return slope_check("gradient", errors, 2, point, start)


@checked_concrete
def check_hessian(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    key: Key,
    *,
    hessian: lx.AbstractLinearOperator | None = None,
) -> SlopeCheck:
    """The check of a Riemannian Hessian: F(R(tv)) − F − t⟨∇F, v⟩ − ½t²⟨v, Hv⟩ must fall like t³.

    R is a retraction of second order, so that this holds at any point, stationary or not. One
    direction is tried. In float32 errors of order t² drown soon: a Hessian that is wrong by a few
    percent can pass. Try several keys, or float64.

    Args:
        manifold: the manifold.
        fn: F, point → scalar.
        point: a point of the manifold.
        key: draws the random unit tangent v.
        hessian: the operator to check; None for `covariant_hessian`.

    Returns:
        A `SlopeCheck`: true or false, and printable.

    Raises:
        ValueError: a manifold of dimension 0; a point that is not finite; a call inside jit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, point = mf.LevelSet(lambda x: x @ x - 1), jnp.array([0.6, 0.8])
        >>> print(
        ...     bool(mf.diagnostics.check_hessian(circle, lambda x: x[0], point, jax.random.key(0)))
        ... )
        True
    """
    if hessian is None:
        hessian = covariant_hessian(manifold, fn, point)
    vector = _unit_tangent(manifold, point, key)
    values, start = _values(manifold, fn, point, vector)
    slope = float(_tree.inner(riemannian_gradient(manifold, fn, point), vector))
    bend = float(_tree.inner(vector, hessian.mv(vector)))
    sizes = step_sizes(point)
    errors = values(sizes) - start - sizes * slope - sizes**2 * bend / 2
    return slope_check("Hessian", errors, 3, point, start)


@checked_concrete
def check_retraction(
    manifold: AbstractManifold,
    retraction: AbstractRetraction,
    point: Point,
    key: Key,
) -> SlopeCheck:
    """The check of a retraction's order: ‖R(tv) − exp(tv)‖ must fall like t^(order + 1).

    Args:
        manifold: the manifold.
        retraction: a value such as `NewtonRetraction()`.
        point: a point of the manifold.
        key: draws the random unit tangent v.

    Returns:
        A `SlopeCheck`: true or false, and printable.

    Raises:
        ValueError: a manifold of dimension 0; a point that is not finite; a call inside jit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, point = mf.LevelSet(lambda x: x @ x - 1), jnp.array([0.6, 0.8])
        >>> newton = mf.NewtonRetraction()
        >>> check = mf.diagnostics.check_retraction(circle, newton, point, jax.random.key(0))
        >>> print(check.expected, bool(check))
        3 True
    """
    vector = _unit_tangent(manifold, point, key)
    gap = lambda size: float(_gap(manifold, retraction, point, vector, size))
    errors = np.array([gap(size) for size in step_sizes(point)])
    return slope_check("retraction", errors, retraction.order + 1, point, _scale(manifold, point))


class GeodesicCheck(eqx.Module):
    """The verdict on a curve that claims to be a geodesic, from `check_geodesic`; true or false.

    Attributes:
        speed_error: the largest change of the speed, relative to it.
        transport_error: ‖transported γ′(0) − γ′(t)‖ relative to the speed, by differences.
        defect: the largest distance from the manifold.
        tolerance: the bound on all three.
        holds: True where all three are at most the tolerance.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> check = diagnostics.GeodesicCheck(1e-9, 1e-8, 0.0, 1e-6, True)
        >>> print(bool(check))
        True
    """

    speed_error: float
    transport_error: float
    defect: float
    tolerance: float
    holds: bool

    def __bool__(self) -> bool:
        return self.holds


@checked_concrete
def check_geodesic(
    manifold: AbstractManifold,
    point: Point,
    velocity: Tangent,
    *,
    time: float = 1.0,
    path: Callable[[Any], Point] | None = None,
    tolerance: float | None = None,
) -> GeodesicCheck:
    """The check that a curve has constant speed and that its velocity is parallel along it.

    Args:
        manifold: the manifold.
        point: the start of the curve.
        velocity: its first velocity.
        time: the end of the curve, > 0.
        path: the curve, time → point, differentiable in forward mode; None for the geodesic that
            the library finds.
        tolerance: of the relative errors; None for 1e-6 in float64 and 1e-3 in float32.

    Returns:
        A `GeodesicCheck`: true or false.

    Raises:
        ValueError: a velocity without a part along the manifold; a call inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda x: x @ x - 1)
        >>> start, velocity = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> wave = lambda t: jnp.array([jnp.cos(t + t**2), jnp.sin(t + t**2)])  # accelerates
        >>> print(bool(mf.diagnostics.check_geodesic(circle, start, velocity, path=wave)))
        False
    """
    coordinates, remainder = manifold.split(point)
    if tolerance is None:
        tolerance = 1e-6 if _precision.is_double(_tree.dtype_of(coordinates)) else 1e-3
    tolerance = float(checked_positive("check_geodesic: tolerance", tolerance))
    velocity = manifold.tangent_projection(point, velocity)
    if path is None:
        walk = Walk(adjoint=dfx.ForwardMode())
        # Forward mode, since the check differentiates the curve by time, through the solver.
        path = lambda t: exponential_map(manifold, point, _tree.scale(t, velocity), walk=walk)
    of_time = path
    speed = float(_tree.norm(velocity))
    if not speed > 0:
        raise ValueError(f"check_geodesic needs a velocity along the manifold; got speed {speed}.")
    speeds, errors, defects = [], [], []
    for t in np.linspace(0, time, 5)[1:]:
        t = jnp.asarray(t, _tree.dtype_of(coordinates))
        position, moving = jax.jvp(
            lambda t: manifold.split(of_time(t))[0], (t,), (jnp.ones_like(t),)
        )
        carried = transport_along_geodesic(manifold, point, velocity, velocity, t)
        speeds.append(float(_tree.norm(moving)))
        errors.append(float(_tree.norm(_tree.subtract(carried, moving))))
        defects.append(float(manifold.defect(_tree.join(position, remainder))))
    speed_error = float(np.max(np.abs(np.array(speeds) - speed))) / speed
    transport_error, defect = max(errors) / speed, max(defects)
    worst = max(speed_error, transport_error, defect)
    return GeodesicCheck(speed_error, transport_error, defect, tolerance, bool(worst <= tolerance))


def _unit_tangent(manifold: AbstractManifold, point: Point, key: Key) -> Tangent:
    vector = manifold.random_tangent(point, key)
    size = _tree.norm(vector)
    # Where there is no direction, what is left is rounding of a standard normal vector.
    if not float(size) > 10 * _tree.eps_of(vector) * _tree.size(vector) ** 0.5:
        raise ValueError(
            f"There is no direction along the manifold: a random tangent has length {size}. Is its "
            "dimension 0, or the point not finite?"
        )
    return _tree.scale(1 / size, vector)


def _values(
    manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point, vector: Tangent
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    fn = _tree.as_pytree_callable(fn)
    value = lambda size: float(_value(manifold, fn, point, vector, size))
    # A float of Python would be a constant of a second program.
    return lambda sizes: np.array([value(t) for t in sizes]), value(np.float64(0))


@eqx.filter_jit
def _value(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    vector: Tangent,
    size: Any,
) -> Any:
    there = NewtonRetraction()(manifold, point, _tree.scale(size, vector), throw=False)
    return fn(there)


@eqx.filter_jit
def _gap(
    manifold: AbstractManifold,
    retraction: AbstractRetraction,
    point: Point,
    vector: Tangent,
    size: Any,
) -> Any:
    step = _tree.scale(size, vector)
    there = retraction(manifold, point, step, throw=False)
    ended = exponential_map(manifold, point, step, throw=False)
    return _tree.norm(_tree.subtract(manifold.split(there)[0], manifold.split(ended)[0]))


def _scale(manifold: AbstractManifold, point: Point) -> float:
    return max(1.0, float(_tree.norm(manifold.split(point)[0])))
