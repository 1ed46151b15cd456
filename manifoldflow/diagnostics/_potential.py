"""The check that a flow follows the gradient of a function."""

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
from manifoldflow._errors import checked_count, checked_positive
from manifoldflow._types import Coordinates, Key, Point, Tangent
from manifoldflow.diagnostics._loops import Circulation, circulation_of, closed_curve, jittered
from manifoldflow.flows import AbstractFlow
from manifoldflow.manifolds import AbstractManifold

_MAX_DIMENSION = 64  # up to which a whole basis is taken
_NUM_TANGENTS = 16
_NUM_PLACES = 8  # of a loop, at which it must be on the manifold


class GradientFlowCheck(eqx.Module):
    """The verdict on a flow's drift as a gradient, at a point and round a loop; true or false.

    Attributes:
        antisymmetric: ‖(A − Aᵀ)/2‖ for the covariant derivative A of the drift, Frobenius.
        symmetric: ‖(A + Aᵀ)/2‖; for a gradient (A + Aᵀ)/2 is the Hessian of its potential.
        size: ‖Db‖, along the manifold and across, to which both are compared.
        num_tangents: the number of tangents from which the norms were taken.
        is_estimate: True where they are random, False where they are an orthonormal basis.
        circulation: ∮⟨b, dγ⟩ round the loop; None where there is none.
        path_integral: ∮‖b‖‖dγ‖, to which the circulation is compared.
        tolerance: of both, relative.
        holds: True where both are below it.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> check = diagnostics.GradientFlowCheck(0.0, 1.0, 1.0, 2, False, None, None, 1e-6, True)
        >>> print(bool(check), str(check)[:10])
        True a gradient
    """

    antisymmetric: float
    symmetric: float
    size: float
    num_tangents: int
    is_estimate: bool
    circulation: float | None
    path_integral: float | None
    tolerance: float
    holds: bool

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        verdict = "a gradient" if self.holds else "NO gradient"
        words = (
            f"{verdict}: antisymmetric part {self.antisymmetric:.2e}, symmetric part "
            f"{self.symmetric:.2e} of a derivative of size {self.size:.2e}"
        )
        if self.circulation is not None:
            words += f"; circulation {self.circulation:.3g} of {self.path_integral:.3g}"
        return f"{words}; relative tolerance {self.tolerance:.0e}"


@checked_concrete
def is_gradient_flow(
    flow: AbstractFlow,
    point: Point,
    *,
    metric: Callable[[Point, Tangent], Any] | None = None,
    loop: Callable[[Any], Point] | None = None,
    num_tangents: Any = None,
    tolerance: Any = None,
    key: Key | None = None,
) -> GradientFlowCheck:
    """The check that a flow follows the gradient of some function along its manifold.

    Near the point it does if and only if the covariant derivative of its drift b is symmetric, ⟨∇_u
    b, w⟩ = ⟨u, ∇_w b⟩ for all tangents. On a curve every field is a gradient at each point; there
    the circulation ∮⟨b, dγ⟩ round the closed curve must vanish as well, as round any loop. A
    manifold of dimension 1 is followed until it closes, if it does; on others a loop is looked at
    if one is given. Label noise has the potential (c/4)tr∇²L, the k-phase motor has none, and Adam
    has one in a metric of its own.

    Args:
        flow: of a stochastic flow the tangent part of the Itô drift counts; it is a gradient where
            the flow is reversible, if the noise is the same in all directions.
        point: the place of the check, a point of the manifold.
        metric: (point, tangent) ↦ Mv, the metric of the gradient, symmetric and positive: b must
            then be −M⁻¹ times a gradient. None for that of the space of points. Adam's is
            Diag(∇²L)^½v.
        loop: a closed curve on the manifold, from [0, 1] to points with loop(0) = loop(1),
            differentiable in forward mode and smooth all round.
        num_tangents: the number of random tangents, at least 2, from which the norms are estimated,
            by one derivative of the drift for each and all pairs of them. None for an orthonormal
            basis; in more than 64 dimensions for 16 random ones.
        tolerance: relative; None for 1e-6 in float64 and 1e-3 in float32.
        key: draws the random tangents; None for the same ones each time.

    Returns:
        A `GradientFlowCheck`, true if all that was measured vanishes.

    Raises:
        ValueError: a point or a loop that is not on the manifold; a loop that is not closed, or too
            rough to be integrated; a metric that is not symmetric and positive at the point; a
            manifold of dimension 0; a call inside jit.

    Assumes:
        The drift is differentiable in forward mode, as those of all flows here are.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere = mf.LevelSet(lambda x: x @ x - 1)
        >>> downhill = mf.RiemannianGradientFlow(sphere, lambda x: x[2])
        >>> print(bool(mf.diagnostics.is_gradient_flow(downhill, jnp.array([0.6, 0.0, 0.8]))))
        True

    References:
        [LiWangArora2022, Appendix C.4].
    """
    manifold = flow.manifold
    coordinates, remainder = flow.split(point)
    if tolerance is None:
        tolerance = 1e-6 if _precision.is_double(_tree.dtype_of(coordinates)) else 1e-3
    tolerance = float(checked_positive("is_gradient_flow: tolerance", tolerance))
    dimension = _tree.size(coordinates) if manifold is None else manifold.dimension(point)
    if dimension < 1:
        raise ValueError("is_gradient_flow needs a manifold of dimension 1 or more; got 0.")
    if manifold is not None:
        _check_on_manifold(manifold, point, loop, tolerance)
    key = jr.key(0) if key is None else key
    field = _Form(flow, remainder, metric)
    is_estimate = num_tangents is not None or dimension > _MAX_DIMENSION
    count = dimension
    if is_estimate:
        count = _NUM_TANGENTS if num_tangents is None else num_tangents
        count = checked_count("is_gradient_flow: num_tangents", count)
        if count < 2:
            raise ValueError("is_gradient_flow: num_tangents must be at least 2; got 1.")
    tangents = np.asarray(_random_tangents(field, coordinates, key, count))
    if not is_estimate:
        tangents = np.linalg.qr(tangents.T)[0].T
    _check_metric(field, coordinates, tangents)
    here, near = (
        np.asarray(_derivatives(field, x, jnp.asarray(tangents)))
        for x in (coordinates, jittered(coordinates))
    )
    anti, symmetric, size = _norms(tangents, here, is_estimate)
    rounding = _norms(tangents, here - near, is_estimate)[0]
    turn = _turn(field, point, dimension, loop, tolerance, key)
    is_symmetric = anti <= tolerance * size + 10 * rounding
    is_still = turn is None or turn.is_still(tolerance)
    return GradientFlowCheck(
        antisymmetric=anti,
        symmetric=symmetric,
        size=size,
        num_tangents=count,
        is_estimate=is_estimate,
        circulation=None if turn is None else turn.value,
        path_integral=None if turn is None else turn.path_integral,
        tolerance=tolerance,
        holds=bool(is_symmetric and is_still),
    )


def _check_on_manifold(
    manifold: AbstractManifold,
    point: Point,
    loop: Callable[[Any], Point] | None,
    tolerance: float,
) -> None:
    """Refuse a place off the manifold: a limit flow says nothing there."""
    if not bool(manifold.is_on(point, tol=tolerance)):
        raise ValueError(
            "is_gradient_flow: point must lie on the manifold of the flow; got one at a distance "
            f"of {float(manifold.defect(point)):.3g}. Project it: manifold.project(point)."
        )
    if loop is None:
        return
    times = np.linspace(0, 1, _NUM_PLACES, endpoint=False)
    is_on = jax.jit(
        lambda times: jax.lax.map(lambda t: manifold.is_on(loop(t), tol=tolerance), times)
    )
    wrong = times[~np.asarray(is_on(jnp.asarray(times, _tree.dtype_of(manifold.split(point)[0]))))]
    if wrong.size:
        raise ValueError(
            "is_gradient_flow: loop must lie on the manifold of the flow; got one that leaves it "
            f"at t = {wrong[0]:g}. Project its points: lambda t: manifold.project(loop(t))."
        )


class _Form(eqx.Module):
    """The tangent PMPb that stands for the one-form ⟨Mb, ·⟩ along the manifold."""

    flow: AbstractFlow
    remainder: Point
    metric: Callable[..., Any] | None

    def project(self, x: Coordinates, vector: Tangent) -> Tangent:
        manifold = self.flow.manifold
        if manifold is None:
            return vector
        return manifold.normal_space(_tree.join(x, self.remainder)).tangent(vector)

    def __call__(self, x: Coordinates) -> Tangent:
        point = _tree.join(x, self.remainder)
        along = self.project(x, self.flow.drift(point))
        if self.metric is None:
            return along
        return self.project(x, self.lowered(x, along))

    def lowered(self, x: Coordinates, vector: Tangent) -> Tangent:
        assert self.metric is not None
        value = self.metric(_tree.join(x, self.remainder), vector)
        return _tree.as_tangent(x, value, "The metric's value")


def _check_metric(field: _Form, coordinates: Coordinates, tangents: np.ndarray) -> None:
    """Refuses a metric that vanishes or has both signs: any drift would be a gradient in it."""
    if field.metric is None:
        return
    unravel = _tree.ravel(coordinates)[1]
    lower = lambda vector: _tree.ravel(field.lowered(coordinates, unravel(vector)))[0]
    products = tangents @ np.asarray(jax.lax.map(lower, jnp.asarray(tangents))).T
    values = np.linalg.eigvalsh((products + products.T) / 2)
    size, small = np.max(np.abs(products)), _precision.eps_of_dtype(tangents) ** 0.5
    if not np.max(np.abs(products - products.T)) <= small * size or not values[0] > 0:
        raise ValueError(
            "is_gradient_flow: metric must be symmetric and positive on tangents; got one whose "
            f"least value is {values[0]:.3g} and whose largest entry is {size:.3g}. Give "
            "metric(point, v) = Mv."
        )


@eqx.filter_jit
def _random_tangents(
    field: _Form, coordinates: Coordinates, key: Key, count: int
) -> Float[Array, "count D"]:
    def draw(key: Key) -> Array:
        drawn = _tree.random_normal_like(key, coordinates)
        return _tree.ravel(field.project(coordinates, drawn))[0]

    return jax.lax.map(draw, jr.split(key, count))


@eqx.filter_jit
def _derivatives(
    field: _Form, coordinates: Coordinates, tangents: Float[Array, "count D"]
) -> Float[Array, "count D"]:
    """The derivative Db[v] for each of the tangents."""
    unravel = _tree.ravel(coordinates)[1]

    def along(vector: Array) -> Array:
        return _tree.ravel(jax.jvp(field, (coordinates,), (unravel(vector),))[1])[0]

    return jax.lax.map(along, tangents)


def _norms(
    tangents: np.ndarray, derivatives: np.ndarray, is_estimate: bool
) -> tuple[float, float, float]:
    """The norms of both parts of ⟨v, Db[w]⟩ and of Db; from pairs where the tangents are random.

    For independent normal u and w, E⟨u, Aw⟩² = ‖A‖².
    """
    # ⟨v, Db[w]⟩ of tangents is that of the covariant derivative: P drops out.
    table = tangents @ derivatives.T
    squares = ((table - table.T) / 2) ** 2, ((table + table.T) / 2) ** 2, derivatives**2
    if not is_estimate:
        anti, symmetric, size = (float(np.sqrt(np.sum(x))) for x in squares)
        return anti, symmetric, size
    count = len(tangents)
    # Not ⟨u, Au⟩, whose mean square has tr A and twice the symmetric part in it.
    pairs = ~np.eye(count, dtype=bool)
    anti, symmetric = (float(np.sqrt(np.mean(x[pairs]))) for x in squares[:2])
    return anti, symmetric, float(np.sqrt(np.sum(squares[2]) / count))


def _turn(
    field: _Form,
    point: Point,
    dimension: int,
    loop: Callable[[Any], Point] | None,
    tolerance: float,
    key: Key,
) -> Circulation | None:
    manifold = field.flow.manifold
    if loop is not None:
        return circulation_of(field, field.flow.split, loop, tolerance)
    if dimension > 1 or manifold is None:
        return None
    return closed_curve(field, manifold, point, tolerance, key)
