"""Quadrics whose geometry is known in closed form: spheres, ellipsoids, hyperboloids.

All carry the metric of the Euclidean space around them. The mean curvature is tr II, not
divided by the dimension, and the formulas hold for tangents at points of the manifold.
"""

import abc
from typing import Any

import equinox as eqx
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
        self.radius = lengths("Sphere: radius", radius, 0)

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
        # cos√s and sin√s/√s by their series for small s: √s has no derivative at 0.
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
        self.axes = lengths("Ellipsoid: axes", axes, 1)
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


class _Quadric(eqx.Module):
    weights: Vector

    def __call__(self, point: Vector) -> Scalar:
        return jnp.sum(self.weights.astype(point.dtype) * point**2) - 1


def _direction(key: Key, size: int) -> Vector:
    """A uniform random point of the unit sphere."""
    vector = jr.normal(key, (size,))
    return vector / jnp.linalg.norm(vector)


def lengths(name: str, values: Any, ndim: int) -> Array:
    """A number (ndim 0) or a list of numbers, positive and finite where they are known."""
    array = real_numbers(name, values)
    if array.ndim != ndim or array.size == 0:
        kind = "a list of numbers" if ndim else "a number"
        raise ValueError(f"{name} must be {kind}; got {values!r}.")
    if not is_traced(array) and not np.all((array > 0) & np.isfinite(array)):
        raise ValueError(f"{name} must be positive and finite; got {values!r}.")
    return jnp.asarray(array, jnp.result_type(float))
