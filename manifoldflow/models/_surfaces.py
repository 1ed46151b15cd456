"""Level sets whose geometry is known in closed form: spheres, ellipsoids, tori, hyperboloids.

All carry the metric of the Euclidean space around them. The mean curvature is tr II, not
divided by the dimension, and the formulas hold for tangents at points of the manifold.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, is_traced, real_numbers
from manifoldflow._types import Key, Scalar
from manifoldflow.manifolds import LevelSet

Vector = Float[Array, " D"]


class Sphere(eqx.Module):
    """The sphere {x ∈ R^{d+1} : |x| = r} of constant curvature 1/r².

    Args:
        dimension: d ≥ 1.
        radius: r > 0.

    Raises:
        ValueError: a dimension below 1, a radius that is not positive and finite.

    References:
        M. do Carmo, Riemannian Geometry, Birkhäuser 1992, chapters 3 and 6.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2, radius=2.0), jnp.array([2.0, 0.0, 0.0])
        >>> print(sphere.manifold.is_on(x), sphere.scalar_curvature(x))
        True 0.5
    """

    dimension: int = eqx.field(static=True)
    radius: Scalar

    @checked
    def __init__(self, dimension: int, radius: Any = 1.0):
        self.dimension = checked_count("Sphere: dimension", dimension)
        self.radius = _lengths("Sphere: radius", radius, 0)

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Quadric(jnp.broadcast_to(self.radius**-2, self.dimension + 1)))

    def point(self, key: Key) -> Vector:
        """A uniform random point of the sphere."""
        return self.radius * _direction(key, self.dimension + 1)

    def sectional_curvature(self, point: Vector, u: Vector, v: Vector) -> Scalar:
        """The sectional curvature 1/r²."""
        return self.radius**-2

    def ricci_curvature(self, point: Vector, u: Vector) -> Scalar:
        """The Ricci curvature Ric(u, u) = (d − 1)|u|²/r²."""
        return (self.dimension - 1) * jnp.sum(u**2) / self.radius**2

    def scalar_curvature(self, point: Vector) -> Scalar:
        """The scalar curvature d(d − 1)/r²."""
        return self.dimension * (self.dimension - 1) / self.radius**2

    def mean_curvature(self, point: Vector) -> Vector:
        """The mean curvature vector −d x/r²."""
        return -self.dimension * point / self.radius**2

    def exponential(self, point: Vector, vector: Vector) -> Vector:
        """The exponential map cos(|v|/r) x + r sin(|v|/r) v/|v|, a great circle."""
        square = jnp.sum(vector**2) / self.radius**2
        # Functions of |v|², smooth at 0, where the root is not.
        is_small = square < 1e-6
        angle = jnp.sqrt(jnp.where(is_small, 1, square))
        cosine = jnp.where(is_small, 1 - square / 2 + square**2 / 24, jnp.cos(angle))
        sinc = jnp.where(is_small, 1 - square / 6 + square**2 / 120, jnp.sin(angle) / angle)
        return cosine * point + sinc * vector

    def distance(self, point: Vector, other: Vector) -> Scalar:
        """The distance: r times the angle, also where its cosine is ±1 to rounding."""
        # 2·atan2(|x − y|, |x + y|): arccos loses half of the digits where the cosine is near ±1.
        apart, together = _tree.norm(point - other), _tree.norm(point + other)
        return 2 * self.radius * jnp.arctan2(apart, together)


class AbstractQuadric(eqx.Module):
    """A quadric {x ∈ Rⁿ : Σ wᵢxᵢ² = 1} with its curvatures.

    They are those of the level set of F with gradient g = Wx and Hessian W = diag(w): II(u, v) =
    −g ⟨u, Wv⟩/|g|², and the rest by the equation of Gauss.

    References:
        R. Goldman, Curvature formulas for implicit curves and surfaces, Computer Aided
        Geometric Design 22 (2005); J. Lee, Introduction to Riemannian Manifolds, chapter 8.
    """

    @property
    @abc.abstractmethod
    def weights(self) -> Vector:
        """The weights w."""

    @property
    def dimension(self) -> int:
        """The dimension n − 1."""
        return self.weights.size - 1

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Quadric(self.weights))

    def sectional_curvature(self, point: Vector, u: Vector, v: Vector) -> Scalar:
        """The sectional curvature (⟨u, Wu⟩⟨v, Wv⟩ − ⟨u, Wv⟩²)/(|g|²(|u|²|v|² − ⟨u, v⟩²))."""
        w = self.weights
        bends = jnp.sum(w * u**2) * jnp.sum(w * v**2) - jnp.sum(w * u * v) ** 2
        area = jnp.sum(u**2) * jnp.sum(v**2) - jnp.sum(u * v) ** 2
        return bends / (area * jnp.sum((w * point) ** 2))

    def ricci_curvature(self, point: Vector, u: Vector) -> Scalar:
        """The Ricci curvature Ric(u, u) = (⟨u, Wu⟩ tr PW − |PWu|²)/|g|², P = 1 − ggᵀ/|g|²."""
        w = self.weights
        gradient, turned = w * point, w * u
        square = jnp.sum(gradient**2)
        tangent = turned - gradient * jnp.sum(gradient * turned) / square
        return (jnp.sum(u * turned) * self._trace(point) - jnp.sum(tangent**2)) / square

    def scalar_curvature(self, point: Vector) -> Scalar:
        """The scalar curvature ((tr PW)² − tr PWPW)/|g|²."""
        w = self.weights
        square = jnp.sum((w * point) ** 2)
        one, two = (jnp.sum(w**k * (w * point) ** 2) / square for k in (1, 2))
        return (self._trace(point) ** 2 - (jnp.sum(w**2) - 2 * two + one**2)) / square

    def mean_curvature(self, point: Vector) -> Vector:
        """The mean curvature vector −g tr PW/|g|²."""
        gradient = self.weights * point
        return -gradient * self._trace(point) / jnp.sum(gradient**2)

    def joachimsthal(self, point: Vector, velocity: Vector) -> Scalar:
        """Joachimsthal's invariant |Wx|² ⟨v, Wv⟩, constant along geodesics.

        On ellipsoids (Σ xᵢ²/aᵢ⁴)(Σ vᵢ²/aᵢ²).

        References:
            F. Joachimsthal (1843); W. Klingenberg, Riemannian Geometry, section 3.5.
        """
        w = self.weights
        return jnp.sum((w * point) ** 2) * jnp.sum(w * velocity**2)

    def _trace(self, point: Vector) -> Scalar:
        """The trace tr PW."""
        w = self.weights
        return jnp.sum(w) - jnp.sum(w * (w * point) ** 2) / jnp.sum((w * point) ** 2)


class Ellipsoid(AbstractQuadric):
    """The ellipsoid {x ∈ Rⁿ : Σ xᵢ²/aᵢ² = 1}.

    Args:
        axes: the semi-axes a, at least two.

    Raises:
        ValueError: fewer than two axes, an axis that is not positive and finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> ellipse = mf.models.Ellipsoid([2.0, 1.0])
        >>> tip = jnp.array([2.0, 0.0])
        >>> print(ellipse.manifold.is_on(tip), ellipse.gauss_kronecker(tip))  # curvature a/b²
        True 2.0
    """

    axes: Vector

    @checked
    def __init__(self, axes: Any):
        self.axes = _lengths("Ellipsoid: axes", axes, 1)
        if self.axes.size < 2:
            raise ValueError(f"Ellipsoid needs at least two axes; got {axes!r}.")

    @property
    def weights(self) -> Vector:
        """The weights 1/aᵢ²."""
        return self.axes**-2

    def point(self, key: Key) -> Vector:
        """A random point aᵢuᵢ for u uniform on the unit sphere.

        Every orthant is as likely as any other, but the law is not uniform by area.
        """
        return self.axes * _direction(key, self.axes.size)

    def gauss_kronecker(self, point: Vector) -> Scalar:
        """The product hⁿ⁺¹/Πaᵢ² of the principal curvatures to the inner normal.

        h = (Σ xᵢ²/aᵢ⁴)^{−½} is the distance of the tangent plane from the centre.
        """
        height = jnp.sum(point**2 / self.axes**4) ** -0.5
        return height ** (self.axes.size + 1) / jnp.prod(self.axes**2)


class Hyperboloid(AbstractQuadric):
    """The sheet x₀ > 0 of the hyperboloid {x₀² − x₁² − … − x_d² = 1}.

    Its metric is induced from Euclidean space, under which it is convex and has positive
    curvature: it is not hyperbolic space, whose metric comes from Minkowski's.

    Args:
        dimension: d ≥ 1.

    Raises:
        ValueError: a dimension below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sheet, bottom = mf.models.Hyperboloid(2), jnp.array([1.0, 0.0, 0.0])
        >>> print(sheet.manifold.is_on(bottom), sheet.principal_curvatures(bottom))
        True [1. 1.]
    """

    num_flat: int = eqx.field(static=True)

    @checked
    def __init__(self, dimension: int):
        self.num_flat = checked_count("Hyperboloid: dimension", dimension)

    @property
    def weights(self) -> Vector:
        """The weights (1, −1, …, −1)."""
        return -jnp.ones(self.num_flat + 1).at[0].set(-1)

    def point(self, key: Key) -> Vector:
        """A random point, standard normal in x₁ … x_d."""
        flat = jr.normal(key, (self.num_flat,))
        return jnp.concatenate([jnp.sqrt(1 + jnp.sum(flat**2, keepdims=True)), flat])

    def principal_curvatures(self, point: Vector) -> Float[Array, " d"]:
        """The principal curvatures |x|⁻³ along the meridian and, d − 1 times, |x|⁻¹ across it.

        They are taken to the inner normal.
        """
        norm = jnp.linalg.norm(point)
        return jnp.full(self.num_flat, 1 / norm).at[0].set(norm**-3)


class Torus(eqx.Module):
    """The torus of revolution {(√(x² + y²) − R)² + z² = r²} in R³.

    Args:
        major: R, from the axis to the middle of the tube.
        minor: r < R, the radius of the tube.

    Raises:
        ValueError: a radius that is not positive and finite, or r ≥ R.

    References:
        M. do Carmo, Differential Geometry of Curves and Surfaces, sections 3.3 and 4.4.

    Examples:
        >>> import manifoldflow as mf
        >>> torus = mf.models.Torus(major=2.0, minor=1.0)
        >>> outside = torus.at(longitude=0.0, latitude=0.0)
        >>> print(outside, torus.gauss_curvature(outside).round(3))
        [3. 0. 0.] 0.333
    """

    major: Scalar
    minor: Scalar

    @checked
    def __init__(self, major: Any = 2.0, minor: Any = 1.0):
        self.major = _lengths("Torus: major", major, 0)
        self.minor = _lengths("Torus: minor", minor, 0)
        radii = self.major, self.minor
        if not is_traced(radii) and not self.minor < self.major:
            raise ValueError(f"Torus needs minor < major; got {minor} and {major}.")

    @property
    def dimension(self) -> int:
        return 2

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Tube(self.major, self.minor))

    def at(self, longitude: Any, latitude: Any) -> Float[Array, "3"]:
        """The point at an angle round the axis and an angle round the tube, 0 outside."""
        longitude, latitude = jnp.asarray(longitude), jnp.asarray(latitude)
        distance = self.major + self.minor * jnp.cos(latitude)
        height = self.minor * jnp.sin(latitude)
        return jnp.stack([distance * jnp.cos(longitude), distance * jnp.sin(longitude), height])

    def point(self, key: Key) -> Float[Array, "3"]:
        """A random point, uniform in both angles and not by area: denser inside."""
        return self.at(*jr.uniform(key, (2,), maxval=2 * jnp.pi))

    def gauss_curvature(self, point: Float[Array, "3"]) -> Scalar:
        """The Gauss curvature (ρ − R)/(r²ρ) at the distance ρ from the axis.

        It is positive outside and negative inside.
        """
        distance = jnp.linalg.norm(point[:2])
        return (distance - self.major) / (self.minor**2 * distance)

    def mean_curvature(self, point: Float[Array, "3"]) -> Float[Array, "3"]:
        """The mean curvature vector −(1/r + cos φ/ρ)n, φ the angle round the tube.

        n is the outer normal.
        """
        distance = jnp.linalg.norm(point[:2])
        cosine = (distance - self.major) / self.minor
        flat, height = cosine * point[:2] / distance, point[2:] / self.minor
        return -(1 / self.minor + cosine / distance) * jnp.concatenate([flat, height])

    def clairaut(self, point: Float[Array, "3"], velocity: Float[Array, "3"]) -> Scalar:
        """Clairaut's invariant x v_y − y v_x, constant along geodesics.

        It is ρ times the speed round the axis.

        References:
            do Carmo, section 4.4, Clairaut's relation.
        """
        return point[0] * velocity[1] - point[1] * velocity[0]


class FlatTorus(eqx.Module):
    """The flat torus: the product of k circles of radii r₁ … r_k in R^{2k}.

    Points are (x₁, …, x_k), each xⱼ ∈ R² with |xⱼ| = rⱼ, one after the other. Sectional, Ricci
    and scalar curvature vanish.

    Args:
        radii: at least one.

    Raises:
        ValueError: a radius that is not positive and finite.

    References:
        M. do Carmo, Riemannian Geometry, Birkhäuser 1992, chapter 6.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> torus, x = mf.models.FlatTorus([1.0, 2.0]), jnp.array([1.0, 0.0, 2.0, 0.0])
        >>> print(torus.mean_curvature(x))
        [-1.  -0.  -0.5 -0. ]
        >>> print(torus.distance(x, jnp.array([0.0, 1.0, 2.0, 0.0])).round(3))  # π/2
        1.571
    """

    radii: Float[Array, " k"]

    @checked
    def __init__(self, radii: Any):
        self.radii = _lengths("FlatTorus: radii", radii, 1)

    @property
    def dimension(self) -> int:
        """The dimension k."""
        return self.radii.size

    @property
    def manifold(self) -> LevelSet:
        return LevelSet(_Circles(self.radii))

    def point(self, key: Key) -> Vector:
        """A uniform random point."""
        angles = jr.uniform(key, self.radii.shape, maxval=2 * jnp.pi)
        circles = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return (self.radii[:, None] * circles).ravel()

    def mean_curvature(self, point: Vector) -> Vector:
        """The mean curvature vector, −xⱼ/rⱼ² on every circle."""
        return -point / jnp.repeat(self.radii, 2) ** 2

    def exponential(self, point: Vector, vector: Vector) -> Vector:
        """The exponential map: every xⱼ turned by ⟨Qxⱼ, vⱼ⟩/rⱼ², Q the quarter turn to the left."""
        x, y = point[::2], point[1::2]
        angles = (x * vector[1::2] - y * vector[::2]) / self.radii**2
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.stack([cos * x - sin * y, sin * x + cos * y], axis=1).ravel()

    def distance(self, point: Vector, other: Vector) -> Scalar:
        """The distance (Σ rⱼ²αⱼ²)^½ with the angles αⱼ between the points of each circle."""
        norms = lambda x: jax.vmap(_tree.norm)(x.reshape(-1, 2))
        angles = 2 * jnp.arctan2(norms(point - other), norms(point + other))
        return _tree.norm(self.radii * angles)


class _Quadric(eqx.Module):
    weights: Vector

    def __call__(self, point: Vector) -> Scalar:
        return jnp.sum(self.weights.astype(point.dtype) * point**2) - 1


class _Tube(eqx.Module):
    major: Scalar
    minor: Scalar

    def __call__(self, point: Float[Array, "3"]) -> Scalar:
        major, minor = self.major.astype(point.dtype), self.minor.astype(point.dtype)
        return (jnp.linalg.norm(point[:2]) - major) ** 2 + point[2] ** 2 - minor**2


class _Circles(eqx.Module):
    radii: Float[Array, " k"]

    def __call__(self, point: Vector) -> Float[Array, " k"]:
        squares = jnp.sum(point.reshape(-1, 2) ** 2, axis=1)
        return squares / self.radii.astype(point.dtype) ** 2 - 1


def _direction(key: Key, size: int) -> Vector:
    """A uniform random point of the unit sphere."""
    vector = jr.normal(key, (size,))
    return vector / jnp.linalg.norm(vector)


def _lengths(name: str, values: Any, ndim: int) -> Array:
    """A number (ndim 0) or a list of numbers, positive and finite where they are known."""
    array = real_numbers(name, values)
    if array.ndim != ndim or array.size == 0:
        kind = "a list of numbers" if ndim else "a number"
        raise ValueError(f"{name} must be {kind}; got {values!r}.")
    if not is_traced(array) and not np.all((array > 0) & np.isfinite(array)):
        raise ValueError(f"{name} must be positive and finite; got {values!r}.")
    return jnp.asarray(array, jnp.result_type(float))
