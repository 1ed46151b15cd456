"""Extrinsic and intrinsic curvature of a manifold.

The second fundamental form II(u, w) = −J†D²f[u, w] determines both; the Gauss equation gives
sectional, Ricci and scalar curvature from it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._types import Constraint, Key, Point, Scalar, Tangent
from manifoldflow.geometry._local import checked_local, sum_over_tangents, tangent_of
from manifoldflow.manifolds import (
    AbstractLocalGeometry,
    AbstractManifold,
)


@checked
@eqx.filter_jit
def second_fundamental_form(
    manifold: AbstractManifold, point: Point, u: Tangent, v: Tangent
) -> Tangent:
    """The second fundamental form II(u, v): the normal acceleration of curves on the manifold.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        u: a tangent; its normal part does not count.
        v: another.

    Returns:
        A normal vector with the structure of the coordinates.

    Raises:
        EquinoxRuntimeError: the constraint's derivative vanishes at the point, or is not
            finite. So for all functions of curvature.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1, 2.0).manifold, jnp.array([2.0, 0.0])
        >>> u = jnp.array([0.0, 1.0])
        >>> print(mf.second_fundamental_form(circle, x, u, u) + 0.0)  # 1/radius, inwards
        [-0.5  0. ]
    """
    local = checked_local(manifold, point)
    return local.form(tangent_of(local, u), tangent_of(local, v))


class ShapeOperator(eqx.Module):
    """The map u ↦ −P∇²(λ·f)Pu with λ = J†ᵀn."""

    local: AbstractLocalGeometry
    multipliers: Constraint

    @eqx.filter_jit
    def __call__(self, vector: Tangent) -> Tangent:
        turned = self.local.turn(self.multipliers, tangent_of(self.local, vector))
        return _tree.scale(-1, self.local.space.tangent(turned))


@checked
def shape_operator(
    manifold: AbstractManifold, point: Point, normal: Tangent
) -> lx.AbstractLinearOperator:
    """The shape operator S_n with ⟨S_n u, v⟩ = ⟨II(u, v), n⟩, a self-adjoint operator on tangents.

    Its eigenvalues on the tangent space are the principal curvatures in the direction n,
    for a unit normal: −1/radius for the outer normal of a sphere.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        normal: n; its tangent part does not count.

    Returns:
        A symmetric lineax operator on tangents.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1, 2.0).manifold, jnp.array([2.0, 0.0])
        >>> outward = mf.shape_operator(circle, x, jnp.array([1.0, 0.0]))
        >>> print(outward.mv(jnp.array([0.0, 1.0])) + 0.0)
        [ 0.  -0.5]
    """
    product = _shape_operator(manifold, point, normal)
    structure = _tree.structure_of(manifold.split(point)[0])
    return lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)


@eqx.filter_jit
def _shape_operator(manifold: AbstractManifold, point: Point, normal: Tangent) -> ShapeOperator:
    local = checked_local(manifold, point)
    normal = _tree.as_tangent(local.coordinates, normal, "normal")
    return ShapeOperator(local, local.space.multipliers(normal))


@checked
@eqx.filter_jit
def mean_curvature(
    manifold: AbstractManifold, point: Point, *, key: Key | None = None, num_samples: int = 64
) -> Tangent | linalg.Estimate:
    """The mean curvature vector tr II, not divided by the dimension.

    It is minus the gradient of volume; −d/radius times the outer normal of a d-sphere.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        key: estimate the trace from `num_samples` random tangents; else D second
            directional derivatives of the constraint.
        num_samples: random tangents, if a key is given.

    Returns:
        A normal vector, or with a key an `Estimate` of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2, 2.0).manifold, jnp.array([2.0, 0.0, 0.0])
        >>> print(mf.mean_curvature(sphere, x) + 0.0)
        [-1.  0.  0.]
    """
    local = checked_local(manifold, point)
    term = lambda vector: local.form(vector, vector)
    if key is not None:
        return sum_over_tangents(local, term, key, num_samples)
    return local.mean_curvature()


@checked
@eqx.filter_jit
def sectional_curvature(manifold: AbstractManifold, point: Point, u: Tangent, v: Tangent) -> Scalar:
    """The sectional curvature: Gauss curvature of the geodesics in the plane of two tangents.

    K(u, v) = (⟨II(u, u), II(v, v)⟩ − |II(u, v)|²)/(|u|²|v|² − ⟨u, v⟩²).

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        u: a tangent; its normal part does not count.
        v: another, independent of the first.

    Returns:
        A number, in units of one over a squared length.

    Raises:
        EquinoxRuntimeError: the tangent parts are parallel to working precision.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2, 2.0).manifold, jnp.array([2.0, 0.0, 0.0])
        >>> u, v = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 1.0])
        >>> print(f"{mf.sectional_curvature(sphere, x, u, v):.3f}")  # 1/radius²
        0.250
    """
    local = checked_local(manifold, point)
    # Their lengths do not matter, but may have squares beyond the floating range.
    u, v = (_of_size_one(_tangent_part(local, x)) for x in (u, v))
    # (|u|²|v|² − ⟨u, v⟩²) cancels for small angles: the area is taken from orthogonal vectors.
    # Gram-Schmidt before the products: nearly parallel pairs would cancel there.
    square = _tree.inner(u, u)
    safe = jnp.where(square > 0, square, 1)
    across = _tree.subtract(v, _tree.scale(_tree.inner(u, v) / safe, u))
    area = _tree.norm(u) * _tree.norm(across)
    is_flat = ~(_tree.norm(across) > 10 * _tree.eps_of(u) * _tree.norm(v)) | ~(square > 0)
    area = eqx.error_if(
        area, is_flat, "sectional_curvature needs two independent tangents; got parallel ones."
    )
    return _gauss(local, u, across) / area**2


@checked
@eqx.filter_jit
def ricci_curvature(
    manifold: AbstractManifold,
    point: Point,
    u: Tangent,
    *,
    key: Key | None = None,
    num_samples: int = 64,
) -> Scalar | linalg.Estimate:
    """The Ricci curvature Ric(u, u): |u|² times the sum of sectional curvatures of u's planes.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        u: a tangent; its normal part does not count.
        key: estimate the trace from `num_samples` random tangents; else it costs 2D second
            directional derivatives of the constraint.
        num_samples: random tangents, if a key is given.

    Returns:
        A number, or with a key an `Estimate` of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2, 2.0).manifold, jnp.array([2.0, 0.0, 0.0])
        >>> print(f"{mf.ricci_curvature(sphere, x, jnp.array([0.0, 1.0, 0.0])):.3f}")
        0.250
    """
    local = checked_local(manifold, point)
    u = tangent_of(local, u)
    return sum_over_tangents(local, lambda v: _gauss(local, u, v), key, num_samples)


@checked
@eqx.filter_jit
def scalar_curvature(
    manifold: AbstractManifold, point: Point, *, key: Key | None = None, num_samples: int = 64
) -> Scalar | linalg.Estimate:
    """The scalar curvature |tr II|² − |II|², the trace of Ricci: d(d − 1)/radius² for a d-sphere.

    Args:
        manifold: the manifold.
        point: a point of the manifold.
        key: estimate it from `num_samples` pairs of random tangents; else it costs D²
            second directional derivatives of the constraint.
        num_samples: pairs, if a key is given.

    Returns:
        A number, or with a key an `Estimate` of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2, 2.0).manifold, jnp.array([2.0, 0.0, 0.0])
        >>> print(f"{mf.scalar_curvature(sphere, x):.3f}")
        0.500
    """
    local = checked_local(manifold, point)
    # E over independent normal u, v of ⟨II(u,u), II(v,v)⟩ − |II(u,v)|² is |tr II|² − |II|².
    if key is not None:

        def sample(key: Key) -> Scalar:
            pair = [
                local.space.tangent(_tree.random_normal_like(k, local.coordinates))
                for k in jax.random.split(key)
            ]
            return _gauss(local, *pair)

        return linalg.estimate(sample, key, num_samples)

    def of_one(u: Tangent) -> Array:
        square = lambda v: _square(local.form(u, v))
        return sum_over_tangents(local, square, None, 0)

    squares = sum_over_tangents(local, of_one, None, 0)
    trace = sum_over_tangents(local, lambda u: local.form(u, u), None, 0)
    return _square(trace) - squares


def _gauss(local: AbstractLocalGeometry, u: Tangent, v: Tangent) -> Scalar:
    """The Gauss equation ⟨II(u, u), II(v, v)⟩ − |II(u, v)|²."""
    return _tree.inner(local.form(u, u), local.form(v, v)) - _square(local.form(u, v))


def _tangent_part(local: AbstractLocalGeometry, vector: Tangent) -> Tangent:
    """The projection P v up to a factor, and zero where that is only rounding of v."""
    vector = _of_size_one(_tree.as_tangent(local.coordinates, vector))
    tangent = tangent_of(local, vector)
    is_there = _tree.norm(tangent) > 10 * _tree.eps_of(vector) * _tree.norm(vector)
    return _tree.where(is_there, tangent, _tree.zeros_like(tangent))


def _of_size_one(vector: Tangent) -> Tangent:
    """The vector over its largest entry."""
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(vector)]))
    return _tree.scale(1 / jnp.where(size > 0, size, 1), vector)


def _square(vector: Any) -> Scalar:
    return _tree.inner(vector, vector)
