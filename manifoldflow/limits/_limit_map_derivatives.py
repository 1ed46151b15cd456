"""What Φ, the limit map of gradient flow, does to second order around its manifold."""

import equinox as eqx
import lineax as lx
from jaxtyping import Array, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._types import Point, Tangent
from manifoldflow.manifolds import AbstractLocalGeometry, AbstractManifold


@checked
def limit_map_derivative(manifold: AbstractManifold, point: Point, vector: Tangent) -> Tangent:
    """∂Φ(point)[v] = P v on the manifold.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold. Off it, differentiate `limit_map`.
        vector: with the structure of the point's coordinates.

    References:
        [LiWangArora2022, Lemma 4.3].
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
    """∂²Φ(point)[Σ] = Σⱼₖ ∂ⱼ∂ₖΦ·Σⱼₖ on the manifold.

    Half of it is the drift of the limiting diffusion of SGD whose gradient noise has the
    covariance Σ.

    Costs, for a manifold of n residuals: a factor with r columns takes r Hessian-vector
    products and r second directional derivatives of the residuals over all data; a
    covariance takes n and D of them. `MinimizerManifold` takes D×D matrices.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold; off it, the formula is evaluated where it stands.
        covariance: Σ as a lineax operator on tangents, of which the symmetric part counts;
            or a factor F with Σ = F Fᵀ: an operator from another space to tangents, or a
            PyTree like the point whose arrays have a trailing axis of noise columns.
        is_factor: whether an operator is F; by default, it is if it does not act on
            tangents. An operator on tangents can be either, and counts as Σ.

    Returns:
        A tangent vector of the space of points, with parts along and across the manifold.

    Raises:
        ValueError: `covariance` is neither.

    Assumes:
        The Hessian has constant rank on the manifold, as `manifold.rank` measures it.

    References:
        [LiWangArora2022, Lemma 4.5].
    """
    parts = limit_map_second_derivative_parts(manifold, point, covariance, is_factor=is_factor)
    return parts.total()


class SecondDerivative(eqx.Module):
    """∂²Φ[Σ] at a point of a manifold, in parts, each computed when it is asked for."""

    local: AbstractLocalGeometry
    sigma: linalg.AbstractSigma

    def tangent_part(self) -> Tangent:
        """−H†∂²(∇L)[PΣP], the trace of the second fundamental form against PΣP."""
        return self.local.tangent_part(self.sigma)

    def mixed_part(self) -> Tangent:
        """−2P∂²(∇L)[H†Σ⊥∥]."""
        return self.local.mixed_part(self.sigma)

    def normal_part(self) -> Tangent:
        """−P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)]."""
        return self.local.normal_part(self.sigma)

    def total(self) -> Tangent:
        """∂²Φ[Σ]."""
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
    """The parts of `limit_map_second_derivative`, each computed when it is asked for."""
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

    Raises:
        ValueError: the manifold is not the zero set of residuals.
    """
    if manifold.residual_loss is None:
        raise ValueError(
            "normal_second_derivative_parts needs the zero set of residuals, such as a "
            f"ZeroLossManifold; got a {type(manifold).__name__}. Use "
            "limit_map_second_derivative_parts with the factor of the covariance."
        )
    return SecondDerivative(manifold.local(point), linalg.NormalFactor(residual_factor))
