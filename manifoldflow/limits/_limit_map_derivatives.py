"""The first and second derivative of the limit map Φ on its manifold."""

import equinox as eqx
import lineax as lx
from jaxtyping import Array, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._types import Point, Tangent
from manifoldflow.manifolds import AbstractLocalGeometry, AbstractManifold


@checked
def limit_map_derivative(manifold: AbstractManifold, point: Point, vector: Tangent) -> Tangent:
    """The derivative ∂Φ(point)[v] = P v of the limit map, on the manifold.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold. Off it, differentiate `limit_map`.
        vector: with the structure of the point's coordinates.

    Returns:
        A tangent at the point.

    References:
        [LiWangArora2022, Lemma 4.3].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> print(mf.limit_map_derivative(circle, jnp.array([1.0, 0.0]), jnp.ones(2)).round(3))
        [0. 1.]
    """
    return manifold.tangent_projection(point, vector)


@checked
@eqx.filter_jit
def limit_map_second_derivative(
    manifold: AbstractManifold,
    point: Point,
    covariance: lx.AbstractLinearOperator | PyTree[Array],
    *,
    is_factor: bool | None = None,
) -> Tangent:
    """The second derivative ∂²Φ(point)[Σ] = Σⱼₖ ∂ⱼ∂ₖΦ·Σⱼₖ of the limit map, on the manifold.

    Half of it is the drift of the limiting diffusion of SGD whose gradient noise has the
    covariance Σ.

    Costs, for a manifold of n residuals: a factor with r columns takes r Hessian-vector
    products and r second directional derivatives of the residuals over all data; a
    covariance takes n and D of them. `MinimizerManifold` takes D×D matrices.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold; off it, the formula is evaluated there.
        covariance: Σ as a lineax operator on tangents, whose symmetric part counts;
            or a factor F with Σ = F Fᵀ: an operator from another space to tangents, or a
            PyTree like the point whose arrays have a trailing axis of noise columns.
        is_factor: True if an operator is F; by default, it is if it does not act on
            tangents. An operator on tangents can be either, and counts as Σ.

    Returns:
        A tangent vector of the space of points, with parts along and across the manifold.

    Raises:
        ValueError: `covariance` is neither.

    Assumes:
        The Hessian has constant rank on the manifold, as `manifold.rank` measures it.

    References:
        [LiWangArora2022, Lemma 4.5].

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> sigma = lx.MatrixLinearOperator(jnp.eye(2))  # Σ = 1: the Laplacian of Φ(x) = x/|x|
        >>> print((mf.limit_map_second_derivative(circle, x, sigma) + 0.0).round(3))
        [-1.  0.]
    """
    parts = limit_map_second_derivative_parts(manifold, point, covariance, is_factor=is_factor)
    return parts.total()


class SecondDerivative(eqx.Module):
    """The second derivative ∂²Φ[Σ] at a point of a manifold, in parts, computed on demand.

    `limit_map_second_derivative_parts` makes one.

    Args:
        local: the geometry of the manifold at the point.
        sigma: Σ.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> sigma = lx.MatrixLinearOperator(jnp.eye(2))
        >>> parts = mf.limits.limit_map_second_derivative_parts(circle, x, sigma)
        >>> print(jnp.abs(parts.mixed_part()).round(3))
        [0. 0.]
    """

    local: AbstractLocalGeometry
    sigma: linalg.AbstractSigma

    def tangent_part(self) -> Tangent:
        """The first part −H†∂²(∇L)[PΣP], the trace of the second fundamental form against PΣP."""
        return self.local.tangent_part(self.sigma)

    def mixed_part(self) -> Tangent:
        """The second part −2P∂²(∇L)[H†Σ⊥∥]."""
        return self.local.mixed_part(self.sigma)

    def normal_part(self) -> Tangent:
        """The third part −P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)]."""
        return self.local.normal_part(self.sigma)

    def total(self) -> Tangent:
        """The whole ∂²Φ[Σ]."""
        along = _tree.add(self.mixed_part(), self.normal_part())
        return _tree.add(self.tangent_part(), along)


@checked
def limit_map_second_derivative_parts(
    manifold: AbstractManifold,
    point: Point,
    covariance: lx.AbstractLinearOperator | PyTree[Array],
    *,
    is_factor: bool | None = None,
) -> SecondDerivative:
    """The parts of `limit_map_second_derivative`, each computed when it is asked for.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold.
        covariance: Σ or a factor of it, as for `limit_map_second_derivative`.
        is_factor: True if an operator is a factor; by default, if it does not act on tangents.

    Returns:
        A `SecondDerivative`.

    Raises:
        ValueError: `covariance` is neither.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> import manifoldflow as mf
        >>> circle, x = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> sigma = lx.MatrixLinearOperator(jnp.eye(2))
        >>> parts = mf.limits.limit_map_second_derivative_parts(circle, x, sigma)
        >>> print((parts.tangent_part() + 0.0).round(3), jnp.abs(parts.normal_part()).round(3))
        [-1.  0.] [0. 0.]
    """
    sigma = linalg.as_sigma(manifold.split(point)[0], covariance, is_factor)
    return SecondDerivative(manifold.local(point).prepared(), sigma)


@checked
def normal_second_derivative_parts(
    manifold: AbstractManifold, point: Point, residual_factor: lx.AbstractLinearOperator
) -> SecondDerivative:
    """The parts of ∂²Φ[F Fᵀ] for F = JᵀG, noise that acts through the manifold's residuals.

    All but the normal part vanish, and that needs nothing but n×n matrices.

    Args:
        manifold: the zero set of residuals with the Jacobian J.
        point: a point of the manifold.
        residual_factor: G, from any space to Rⁿ.

    Returns:
        A `SecondDerivative`.

    Raises:
        ValueError: the manifold is not the zero set of residuals.

    Examples:
        >>> import jax.numpy as jnp
        >>> import lineax as lx
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: w[0] * w[1] * x
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=predict)
        >>> manifold, fit = mf.ZeroLossManifold(loss), jnp.array([2.0, 0.5])
        >>> root = lx.MatrixLinearOperator(jnp.eye(1))  # Σ = JᵀJ = ∇²L
        >>> parts = mf.limits.normal_second_derivative_parts(manifold, fit, root)
        >>> print(parts.normal_part().round(3))  # −½P∇tr∇²L
        [-1.765  0.441]
    """
    if manifold.residual_loss is None:
        raise ValueError(
            "normal_second_derivative_parts needs the zero set of residuals, such as a "
            f"ZeroLossManifold; got a {type(manifold).__name__}. Use "
            "limit_map_second_derivative_parts with the factor of the covariance."
        )
    # Not `prepared`: the normal part alone needs no matrix that others share.
    return SecondDerivative(manifold.local(point), linalg.NormalFactor(residual_factor))
