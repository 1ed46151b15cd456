"""Tori whose geometry is known in closed form: the torus of revolution, and flat ones.

They carry the metric of the Euclidean space around them. The mean curvature is tr II, not
divided by the dimension, and the formulas hold for tangents at points of the manifold.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
from manifoldflow._types import Key, Scalar
from manifoldflow.manifolds import LevelSet
from manifoldflow.models._surfaces import lengths, Vector


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
        self.major = lengths("Torus: major", major, 0)
        self.minor = lengths("Torus: minor", minor, 0)
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
        self.radii = lengths("FlatTorus: radii", radii, 1)

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
        # An arccos would lose half of the digits where its argument is near ±1.
        angles = 2 * jnp.arctan2(norms(point - other), norms(point + other))
        return _tree.norm(self.radii * angles)


class _Tube(eqx.Module):
    major: Scalar
    minor: Scalar

    def __call__(self, point: Float[Array, "3"]) -> Scalar:
        major, minor = self.major.astype(point.dtype), self.minor.astype(point.dtype)
        # The norm has no derivative on the axis, which is R − r or more away from the torus.
        return (jnp.linalg.norm(point[:2]) - major) ** 2 + point[2] ** 2 - minor**2


class _Circles(eqx.Module):
    radii: Float[Array, " k"]

    def __call__(self, point: Vector) -> Float[Array, " k"]:
        squares = jnp.sum(point.reshape(-1, 2) ** 2, axis=1)
        return squares / self.radii.astype(point.dtype) ** 2 - 1
