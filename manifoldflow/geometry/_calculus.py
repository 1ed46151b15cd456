"""Derivatives of functions and vector fields along a manifold; the manifold comes first."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Constraint, Coordinates, Key, Point, Scalar, Tangent
from manifoldflow.geometry._local import checked_local, sum_over_tangents, tangent_of
from manifoldflow.manifolds import (
    AbstractLocalGeometry,
    AbstractManifold,
)


@checked
def riemannian_gradient(
    manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point, *, throw: bool = True
) -> Tangent:
    """The gradient P∇fn(point) of a function along the manifold.

    Args:
        manifold: the manifold.
        fn: point → scalar.
        point: a point of the manifold; off it, the projection there is used.
        throw: as for `manifold.tangent_projection`.

    Returns:
        A tangent at the point, with the structure of the coordinates; NaN if there is none.

    Raises:
        EquinoxRuntimeError: the constraint's derivative vanishes at the point.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.6, 0.8])
        >>> print(mf.riemannian_gradient(circle, lambda x: x[1], x).round(2))
        [-0.48  0.36]
    """
    gradient = _gradient(manifold, _tree.as_pytree_callable(fn), point)
    return manifold.tangent_projection(point, gradient, throw=throw)


@jit_part
def _gradient(manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point) -> Tangent:
    coordinates, remainder = manifold.split(point)
    return jax.grad(lambda x: fn(_tree.join(x, remainder)))(coordinates)


@checked
def gradient_along(manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point) -> Tangent:
    """The Riemannian gradient P∇fn, without an error where there is no normal space.

    It is for the inside of loops, which may pass where rank is lost.

    Args:
        manifold: the manifold.
        fn: point → scalar.
        point: a point of the manifold; off it, the projection there is used.

    Returns:
        A tangent at the point.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.6, 0.8])
        >>> print(mf.geometry.gradient_along(circle, lambda x: x[1], x).round(2))
        [-0.48  0.36]
    """
    coordinates, remainder = manifold.split(point)
    gradient = jax.grad(lambda x: fn(_tree.join(x, remainder)))(coordinates)
    return manifold.normal_space(point).tangent(gradient)


@checked
@jit_part
def potential_gradient(
    manifold: AbstractManifold, potential: Callable[[AbstractLocalGeometry], Scalar], point: Point
) -> tuple[Tangent, AbstractLocalGeometry]:
    """The gradient of a function of the local geometry, and that geometry, made once for both.

    Args:
        manifold: the manifold.
        potential: a number from a local geometry, such as `lambda local: local.hessian_trace()`.
        point: a point of the manifold.

    Returns:
        The gradient in the space of points, normal part included, and `manifold.local(point)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> trace = lambda local: local.hessian_trace()  # 4|x|²
        >>> gradient, local = mf.geometry.potential_gradient(circle, trace, x)
        >>> print(gradient, local.hessian_trace())
        [8. 0.] 4.0
    """
    coordinates, remainder = manifold.split(point)

    def value(x: Coordinates) -> tuple[Scalar, AbstractLocalGeometry]:
        local = manifold.local(_tree.join(x, remainder))
        return potential(local), local

    return eqx.filter_grad(value, has_aux=True)(coordinates)


class CovariantHessian(eqx.Module):
    """The map v ↦ P(∇²F − Σλᵢ∇²fᵢ)Pv with λ = J†ᵀ∇F, the Lagrange multipliers of F."""

    fn: Callable[..., Any]
    local: AbstractLocalGeometry
    multipliers: Constraint

    @eqx.filter_jit
    def __call__(self, vector: Tangent) -> Tangent:
        local = self.local
        tangent = tangent_of(local, vector)
        gradient = jax.grad(lambda x: self.fn(_tree.join(x, local.remainder)))
        along = jax.jvp(gradient, (local.coordinates,), (tangent,))[1]
        return local.space.tangent(_tree.subtract(along, local.turn(self.multipliers, tangent)))


@checked
def covariant_hessian(
    manifold: AbstractManifold, fn: Callable[[Point], Any], point: Point
) -> lx.AbstractLinearOperator:
    """The Hessian of a function along the manifold, a self-adjoint operator on tangents.

    Its quadratic form is the second derivative of the function along geodesics. A product
    costs two Hessian-vector products, of fn and of the constraint; normal parts of vectors
    do not count, so that the operator is PHP on the whole space.

    Args:
        manifold: the manifold.
        fn: point → scalar, twice differentiable on and near the manifold.
        point: a point of the manifold.

    Returns:
        A symmetric lineax operator on tangents.

    Raises:
        EquinoxRuntimeError: the constraint's derivative vanishes at the point, or is not
            finite.

    References:
        [Gatmiry2024, Lemma 8].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([0.0, 1.0])
        >>> hessian = mf.covariant_hessian(circle, lambda x: x[1], x)  # at the top, cos has −1
        >>> print(hessian.mv(jnp.array([1.0, 0.0])).round(3) + 0.0)
        [-1.  0.]
    """
    fn = _tree.as_pytree_callable(fn)
    product = _covariant_hessian(manifold, fn, point)
    structure = _tree.structure_of(manifold.split(point)[0])
    return lx.FunctionLinearOperator(product, structure, lx.symmetric_tag)


@eqx.filter_jit
def _covariant_hessian(
    manifold: AbstractManifold, fn: Callable[..., Any], point: Point
) -> CovariantHessian:
    # A tangent derivative means nothing where there is no normal space: an error, not NaN.
    local = checked_local(manifold, point)
    gradient = jax.grad(lambda x: fn(_tree.join(x, local.remainder)))(local.coordinates)
    # Hess F = P(∇²F − Σλᵢ∇²fᵢ)P: the multipliers carry the normal slope of F along the bends of Γ.
    return CovariantHessian(fn, local, local.space.multipliers(gradient))


@checked
def covariant_derivative(
    manifold: AbstractManifold,
    field: Callable[[Point], PyTree[Any]],
    point: Point,
    vector: Tangent,
) -> Tangent:
    """The derivative ∇_V W = P DW[V] of a tangent vector field along the manifold.

    Args:
        manifold: the manifold.
        field: W, point → tangent, defined near the manifold.
        point: a point of the manifold.
        vector: V; its tangent part counts.

    Returns:
        A tangent at the point.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2).manifold, jnp.array([0.6, 0.0, 0.8])
        >>> turn = lambda x: jnp.stack([-x[1], x[0], 0 * x[2]])  # about the third axis
        >>> found = mf.covariant_derivative(sphere, turn, x, turn(x))
        >>> print((found + 0.0).round(3))  # away from the equator: its circles bend to the pole
        [-0.384  0.     0.288]
    """
    local = checked_local(manifold, point)
    vector, space = tangent_of(local, vector), local.space
    return space.tangent(_along(manifold, field, point, vector))


@checked
def divergence(
    manifold: AbstractManifold,
    field: Callable[[Point], PyTree[Any]],
    point: Point,
    *,
    key: Key | None = None,
    num_samples: int = 64,
) -> Scalar | linalg.Estimate:
    """The divergence tr(V ↦ ∇_V W) of a tangent vector field along the manifold.

    Args:
        manifold: the manifold.
        field: W, point → tangent, defined near the manifold.
        point: a point of the manifold.
        key: estimate the trace from `num_samples` random tangents; else D derivatives.
        num_samples: random tangents, if a key is given.

    Returns:
        A number, or with a key an `Estimate` with its standard error.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2).manifold, jnp.array([0.6, 0.0, 0.8])
        >>> field = lambda x: jnp.array([0.0, 0.0, 1.0]) - x[2] * x  # the gradient of the height
        >>> print(f"{mf.divergence(sphere, field, x):.3f}")  # −2x₂
        -1.600
    """
    local = checked_local(manifold, point)

    def term(vector: Tangent) -> Scalar:
        return _tree.inner(vector, _along(manifold, field, point, vector))

    return sum_over_tangents(local, term, key, num_samples)


@checked
def laplace_beltrami(
    manifold: AbstractManifold,
    fn: Callable[[Point], Any],
    point: Point,
    *,
    key: Key | None = None,
    num_samples: int = 64,
) -> Scalar | linalg.Estimate:
    """The Laplacian Δ_Γ fn of a function along the manifold: the trace of its covariant Hessian.

    Args:
        manifold: the manifold.
        fn: point → scalar, twice differentiable on and near the manifold.
        point: a point of the manifold.
        key: estimate the trace from `num_samples` random tangents; else D products.
        num_samples: random tangents, if a key is given.

    Returns:
        A number, or with a key an `Estimate` with its standard error.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> sphere, x = mf.models.Sphere(2).manifold, jnp.array([0.6, 0.0, 0.8])
        >>> print(f"{mf.laplace_beltrami(sphere, lambda x: x[2], x):.3f}")  # −2x₂
        -1.600
    """
    product = _covariant_hessian(manifold, _tree.as_pytree_callable(fn), point)
    term = lambda vector: _tree.inner(vector, product(vector))
    local = product.local
    return sum_over_tangents(local, term, key, num_samples)


def _along(
    manifold: AbstractManifold, field: Callable[[Point], Any], point: Point, vector: Tangent
) -> Tangent:
    """The directional derivative DW[v]."""
    coordinates, remainder = manifold.split(point)

    def of_coordinates(x: Coordinates) -> Tangent:
        return _tree.as_tangent(coordinates, field(_tree.join(x, remainder)), "The field's value")

    return jax.jvp(of_coordinates, (coordinates,), (vector,))[1]
