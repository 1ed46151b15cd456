"""Numerical checks of derivatives and of maps on a manifold, by the rate at which errors fall."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_positive
from manifoldflow._types import Key, Point, Tangent
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

_NUM_SIZES, _WINDOW, _FEW = 41, 9, 3
_MOST_BENT = 2.0


class SlopeCheck(eqx.Module):
    """The rate at which an error falls with the size t of a step, error ~ t^slope.

    Attributes:
        name: of the check.
        slope: at vanishing t, from the window of sizes where it is steadiest; NaN if the error is
            at rounding everywhere.
        expected: the slope by theory.
        window: (smallest, largest) t of that window.
        sizes: all t.
        errors: the error at each of them.
        holds: True where the slope is at least `expected` − 0.1, or all errors are at rounding.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import diagnostics
        >>> sizes = np.logspace(-3, 0, 4)
        >>> check = diagnostics.SlopeCheck("gradient", 2.0, 2.0, (1e-3, 1.0), sizes, sizes**2, True)
        >>> print(bool(check), check)
        True gradient: slope 2.000 over t = 1.0e-03 … 1.0e+00, expected 2: holds
    """

    name: str
    slope: float
    expected: float
    window: tuple[float, float]
    sizes: Float[np.ndarray, " sizes"]
    errors: Float[np.ndarray, " sizes"]
    holds: bool

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        low, high = self.window
        return (
            f"{self.name}: slope {self.slope:.3f} over t = {low:.1e} … {high:.1e}, "
            f"expected {self.expected:g}: {verdict}"
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
    errors = values(_sizes(point)) - start - _sizes(point) * float(_tree.inner(gradient, vector))
    return _check("gradient", errors, 2, point, start)


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

    R is a retraction of second order, so that this holds at any point, stationary or not.

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
    sizes = _sizes(point)
    errors = values(sizes) - start - sizes * slope - sizes**2 * bend / 2
    return _check("Hessian", errors, 3, point, start)


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
    errors = np.array([gap(size) for size in _sizes(point)])
    return _check("retraction", errors, retraction.order + 1, point, _scale(manifold, point))


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


def _sizes(point: Point) -> np.ndarray:
    """Steps from 1 down to where differences of second order drown in rounding."""
    eps = _tree.eps_of(_tree.split(point, None)[0])
    # An error of order t² drowns in rounding at t = √eps; one of order t³ before that.
    return np.logspace(0, np.log10(eps) / 2, _NUM_SIZES)


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


def _check(
    name: str, errors: np.ndarray, expected: float, point: Point, scale: float
) -> SlopeCheck:
    """The slope in log-log scale over the window where it is steadiest, above rounding.

    It is that at vanishing steps: log error = offset + slope · log t + bend · t, since errors
    of the next order bend the line where single precision leaves large steps only.
    """
    sizes, errors = _sizes(point), np.abs(errors)
    # Errors are differences of numbers of size `scale`, wrong by some eps of it.
    floor = 50 * _tree.eps_of(_tree.split(point, None)[0]) * max(1.0, abs(scale))
    usable = np.isfinite(errors) & (errors > floor)
    best: tuple[float, float, tuple[float, float]] = (np.inf, np.nan, (np.nan, np.nan))
    for start in range(_NUM_SIZES - _WINDOW + 1):
        part = slice(start, start + _WINDOW)
        if not usable[part].all():
            continue
        slope, bend, misfit = _slope(sizes[part], errors[part])
        # Errors of higher orders alone, as where the sum of all changes its sign.
        if abs(bend) * sizes[part][0] > _MOST_BENT:
            continue
        # Among windows that are straight, the one of smaller steps says more.
        if misfit < 0.8 * best[0] or (misfit < 0.01 and best[0] < 0.01):
            best = misfit, float(slope), (float(sizes[part][-1]), float(sizes[part][0]))
    if np.isinf(best[0]) and np.sum(usable) >= _FEW:
        # No window: too few errors are above rounding, since they fall so fast.
        few = sizes[usable]
        slope = float(np.polyfit(np.log(few), np.log(errors[usable]), 1)[0])
        best = 0.0, slope, (float(few[-1]), float(few[0]))
    slope = best[1]
    is_zero = bool(np.all(errors[np.isfinite(errors)] <= floor)) and bool(np.isfinite(errors).any())
    holds = is_zero if np.isnan(slope) else slope >= expected - 0.1
    return SlopeCheck(name, slope, expected, best[2], sizes, errors, bool(holds))


def _slope(sizes: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """The slope at vanishing steps, the bend, and how far the errors are from such a curve."""
    terms = np.stack([np.log(sizes), np.ones_like(sizes), sizes], axis=1)
    found, *_ = np.linalg.lstsq(terms, np.log(errors), rcond=None)
    return (
        float(found[0]),
        float(found[2]),
        float(np.sqrt(np.mean((np.log(errors) - terms @ found) ** 2))),
    )
