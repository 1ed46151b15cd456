"""Geodesics and parallel transport: differential equations on the tangent bundle.

γ″ = II(γ′, γ′) and V′ = II(γ′, V). Every step of the solver ends on the manifold, with the
vectors projected on its tangent space there; since the field is tangent to the bundle, the
order of the solver is kept.
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked, checked_fields
from manifoldflow._errors import checked_positive, is_traced, real_numbers
from manifoldflow._jit import jit_part
from manifoldflow._results import (
    delivered,
    from_diffrax,
    Info,
    or_nan,
    RESULTS,
    without_step_limit,
)
from manifoldflow._run import AdaptiveSteps, EqualSteps, next_step, over_legs
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.manifolds import (
    AbstractManifold,
    Projected,
)

MAX_STEPS = 16**4
# Of the whole time: Diffrax would evaluate the field twice to choose one.
FIRST_STEP = 0.01

Bundle = tuple[Coordinates, tuple[Tangent, ...]]
"""A point and some tangents there; the first is the velocity."""


class GeodesicOptions(eqx.Module):
    """The options for solving for geodesics and transport.

    Args:
        solver: any Diffrax solver of ordinary differential equations; `diffrax.Dopri8()` by
            default.
        step_size: equal steps; adaptive ones by default.
        rtol: relative tolerance of adaptive steps; 1e-9 in float64 and 1e-5 in float32.
        atol: absolute tolerance; 1e-10 and 1e-6 times the largest coordinate at the start.
        adjoint: the way in which Diffrax differentiates; reverse mode by default,
            `diffrax.ForwardMode()` for forward mode.

    Raises:
        ValueError: a step size or tolerance that is not positive.

    Examples:
        >>> import diffrax as dfx
        >>> import manifoldflow as mf
        >>> walk = mf.GeodesicOptions(adjoint=dfx.ForwardMode(), rtol=1e-6)  # for jax.jvp
        >>> print(walk.rtol, type(walk.solver).__name__)
        1e-06 Dopri8
    """

    solver: dfx.AbstractSolver = dfx.Dopri8()
    step_size: Scalar | float | None = None
    rtol: float | None = None
    atol: float | None = None
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()

    def __check_init__(self):
        checked_fields(self)
        for name in ("step_size", "rtol", "atol"):
            if getattr(self, name) is not None:
                checked_positive(f"GeodesicOptions: {name}", getattr(self, name))

    def controller(
        self, size: Scalar, first: Scalar, unit: Scalar | float = 1.0
    ) -> dfx.AbstractStepSizeController:
        """The step size controller for numbers of this size, in units of `unit`.

        Adaptive steps begin with `first`.
        """
        if self.step_size is not None:
            return EqualSteps(self.step_size / jnp.abs(unit))
        is_double = _precision.is_double(size)
        rtol = self.rtol if self.rtol is not None else 1e-9 if is_double else 1e-5
        atol = self.atol if self.atol is not None else (1e-10 if is_double else 1e-6) * size
        # Where no step can be landed, none is short enough: do not try for ever.
        smallest = jnp.asarray(_precision.eps_of_dtype(size), size.dtype)
        controller = dfx.PIDController(rtol=rtol, atol=atol, dtmin=smallest, force_dtmin=False)
        # Diffrax would choose a first step from two more evaluations of the field.
        return AdaptiveSteps(controller, first)


# The old name.
Walk = GeodesicOptions


@checked
def geodesic(
    manifold: AbstractManifold,
    point: Point,
    velocity: Tangent,
    times: Float[Array, " times"] | Any,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Point:
    """The points γ(times) of the geodesic with γ(0) = point and γ′(0) = velocity.

    Args:
        manifold: the manifold.
        point: γ(0), on the manifold; rounding is mended.
        velocity: γ′(0), units of length per unit of time; its tangent part counts.
        times: (T,) in order, away from 0 on one side of it; may be traced.
        walk: the options for solving.
        throw: raise if the solve fails; with `throw=False` the coordinates are NaN.

    Returns:
        The points, with a leading axis of T at each coordinate.

    Raises:
        ValueError: times out of order.
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> path = mf.geodesic(circle, x, jnp.array([0.0, 1.0]), jnp.array([0.5]))
        >>> print(path.round(3))  # (cos t, sin t)
        [[0.878 0.479]]
    """
    path, _ = path_along(manifold, point, (velocity,), times, walk, throw)
    return path


@checked
def exponential_map(
    manifold: AbstractManifold,
    point: Point,
    vector: Tangent,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Point:
    """The point exp_p(v), which the geodesic from p along v reaches at time 1.

    Args:
        manifold: the manifold.
        point: p.
        vector: v; its tangent part counts.
        walk: the options for solving.
        throw: as for `geodesic`.

    Returns:
        A point of the manifold.

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> print(mf.exponential_map(circle, x, jnp.array([0.0, jnp.pi / 6])).round(3))
        [0.866 0.5  ]
    """
    path, _ = path_along(manifold, point, (vector,), jnp.ones(1), walk, throw)
    return _tree.join(last(manifold.split(path)[0]), manifold.split(point)[1])


@checked
def transport_along_geodesic(
    manifold: AbstractManifold,
    point: Point,
    velocity: Tangent,
    vector: Tangent,
    time: Scalar | float,
    *,
    walk: GeodesicOptions | None = None,
    throw: bool = True,
) -> Tangent:
    """The parallel transport of a tangent along the geodesic of `geodesic`, to `time`.

    Args:
        manifold: the manifold.
        point: the point at which the vector is a tangent.
        velocity: of the geodesic, at the point. Transported itself, it is γ′(time).
        vector: the tangent to be transported; its tangent part counts.
        time: the time of the geodesic to transport to; may be negative.
        walk: the options for solving.
        throw: as for `geodesic`.

    Returns:
        A tangent at γ(time).

    Raises:
        EquinoxRuntimeError: with the message of the `RESULTS` member.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> up = jnp.array([0.0, 1.0])
        >>> print(mf.transport_along_geodesic(circle, x, up, up, jnp.pi / 6).round(3))
        [-0.5    0.866]
    """
    _, vectors = path_along(manifold, point, (velocity, vector), jnp.reshape(time, 1), walk, throw)
    return last(vectors[1])


def last(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[-1], tree)


def path_along(
    manifold: AbstractManifold,
    point: Point,
    vectors: tuple[Tangent, ...],
    times: Any,
    walk: GeodesicOptions | None,
    throw: bool,
) -> tuple[Point, tuple[Tangent, ...]]:
    coordinates, _ = manifold.split(point)
    vectors = tuple(_tree.as_tangent(coordinates, vector) for vector in vectors)
    # In NumPy: inside jit JAX would make tracers even of constants.
    known = None if is_traced(times) else np.asarray(real_numbers("times", times))
    shape = jnp.shape(times) if known is None else known.shape
    if len(shape) != 1 or 0 in shape:
        raise ValueError(f"times must be a sequence of numbers; got shape {shape}.")
    if known is not None:
        away = np.diff(np.abs(known), prepend=0)
        if not np.all(np.isfinite(known)):
            raise ValueError(f"times must be finite; got {times}.")
        if not (np.all(away >= 0) and np.all(known * known[-1] >= 0)):
            raise ValueError(f"times must lead away from 0 on one side of it; got {times}.")
    times = jnp.asarray(times, _tree.dtype_of(coordinates))
    path, others, result = walk_along(manifold, point, vectors, times, walk or GeodesicOptions())
    return delivered((path, others), result, throw)


class _Field(eqx.Module):
    """The field x′ = v, v′ = II(v, v), V′ = II(v, V), times the unit of time."""

    manifold: AbstractManifold
    remainder: Point

    # Diffrax traces a step three times: jitted, all but the first find it done.
    @jit_part
    def __call__(self, t: Any, y: Bundle, args: Any) -> Bundle:
        del t
        x, vectors = y
        space = self.manifold.normal_space(_tree.join(x, self.remainder))
        local = self.manifold.local(_tree.join(x, self.remainder), space=space)
        # V′ = II(γ′, V) is normal: its tangent part, the covariant derivative of V, is zero.
        slopes = vectors[0], tuple(local.form(vectors[0], vector) for vector in vectors)
        return _tree.scale(args, slopes)


class _TangentBundle(eqx.Module):
    """The tangent bundle, on which `Projected` keeps a point and its tangents."""

    manifold: AbstractManifold
    remainder: Point

    def split(self, point: Bundle) -> tuple[Bundle, None]:
        return point, None

    @jit_part
    def newton_correct(self, point: Bundle) -> tuple[Bundle, Info]:
        x, vectors = point
        landed, info = self.manifold.newton_correct(_tree.join(x, self.remainder))
        space = self.manifold.normal_space(landed)
        return (self.manifold.split(landed)[0], tuple(map(space.tangent, vectors))), info


@eqx.filter_jit
def walk_along(
    manifold: AbstractManifold,
    point: Point,
    vectors: tuple[Tangent, ...],
    times: Float[Array, " times"],
    walk: GeodesicOptions,
) -> tuple[Point, tuple[Tangent, ...], RESULTS]:
    """The geodesic along the first vector, with all of them transported along it."""
    coordinates, remainder = manifold.split(point)
    landed, info = manifold.newton_correct(point)
    start = _tree.where(info.is_successful, manifold.split(landed)[0], coordinates)
    space = manifold.normal_space(_tree.join(start, remainder))
    # Tangents that are only carried along have units of their own: as long as the point is.
    size = _tree.size_of(jax.lax.stop_gradient(start))
    scales = [size / _tree.size_of(jax.lax.stop_gradient(v)) for v in vectors[1:]]
    scales = [jnp.ones_like(size), *scales]
    # The last time is the unit: so runs backwards are none, and derivatives in the times
    # exist at 0 as well, where a solver would take no step.
    unit = times[-1]
    stands = unit == 0
    safe = _tree.where(stands, 1, unit)
    fractions = _tree.where(stands, 1, times / safe)
    terms = dfx.ODETerm(_Field(manifold, remainder))
    solver = Projected(walk.solver, _TangentBundle(manifold, remainder))
    begin = start, tuple(space.tangent(_tree.scale(c, v)) for c, v in zip(scales, vectors))
    first = jnp.asarray(FIRST_STEP, times.dtype)

    def leg(here: _Here, end: Scalar) -> _Here:
        is_going = here.result == RESULTS.successful
        solution = dfx.diffeqsolve(
            terms,
            solver,
            here.time,
            _tree.where(is_going, end, here.time),
            None,
            here.bundle,
            args=unit,
            saveat=dfx.SaveAt(t1=True, controller_state=True),
            stepsize_controller=walk.controller(size, here.step, safe),
            adjoint=walk.adjoint,
            max_steps=MAX_STEPS,
            throw=False,
        )
        assert solution.ys is not None
        bundle = _tree.cast_like(last(solution.ys), here.bundle)
        result = _tree.where(is_going, ended(solution, bundle), here.result)
        step = next_step(solution) if walk.step_size is None else here.step
        return _Here(bundle, end, step, result)

    save = lambda here: (here, or_nan(here.bundle, here.result == RESULTS.successful))
    here = _Here(begin, jnp.zeros_like(unit), first, without_step_limit(info.result))
    here, (path, moved) = over_legs(leg, save, here, fractions)
    moved = tuple(_tree.scale(1 / c, v) for c, v in zip(scales, moved))
    given = manifold, point, vectors, times
    path, moved = or_nan((path, moved), here.result == RESULTS.successful, of=given)
    return _tree.join(path, remainder), moved, here.result


def ended(solution: dfx.Solution, reached: PyTree[Array]) -> RESULTS:
    return without_step_limit(from_diffrax(solution.result, reached))


class _Here(eqx.Module):
    """The state of a geodesic at a time."""

    bundle: Bundle
    time: Scalar
    step: Scalar
    result: RESULTS
