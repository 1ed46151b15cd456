"""Where SGD goes after the loss is zero, in the limit of small learning rates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.geometry import gradient_of_rows
from manifoldflow.limits import limit_map_second_derivative_parts, normal_second_derivative_parts
from manifoldflow.manifolds import (
    AbstractManifold,
    AbstractNormalSpace,
    AbstractSecondDerivative,
    bending_along,
    LevelSet,
    MinimizerManifold,
    ZeroLossManifold,
)
from manifoldflow.noise import AbstractDataNoise, AbstractNoise, IsotropicNoise


class LimitDiffusion(AbstractDiffusion):
    """The limit of SGD on the manifold of minimisers as the learning rate η → 0.

    For gradient noise of covariance Σ, in the sense of Itô,

        dY = PF(Y) dW + ½ ∂²Φ(Y)[Σ(Y)] dt,   Σ = F Fᵀ,

    with P the tangent projection and Φ the limit map of gradient flow. The drift has three
    parts: `tangent_noise_compensation`, `mixed_regularisation` and `normal_regularisation`.
    Time is the limit clock: t = kη² after k steps, Σₖ ηₖ² for schedules.

    Some noises have short forms. Where Σ = c∇²L on a zero-loss manifold the limit is an
    ordinary differential equation, and `is_stochastic` is False:

        Y' = −(c/4) P∇tr∇²L(Y).

    That is so for `LabelNoise` on `LeastSquares` and for `ResampledLabels` on a likelihood;
    it depends on the types alone. For `IsotropicNoise` Y is a Brownian motion on the
    manifold of speed std² with the drift −(std²/4) P∇ln|∇²L|₊, |·|₊ being the product of
    the non-zero eigenvalues.

    Args:
        manifold: the minimisers of a loss: `ZeroLossManifold` or, with dense D×D matrices,
            `MinimizerManifold`.
        noise: any noise.

    Raises:
        ValueError: a bare level set has no loss that noise could perturb; a noise of data
            on a loss without examples, or with larger batches than there are examples.

    Assumes:
        The Hessian has constant rank along the path. Where the Jacobian of the residuals
        loses rank the drift is continued as far as it extends; `manifold.rank(point)`
        measures it.

    References:
        [LiWangArora2022, Theorem 4.6, Corollaries 5.1 and 5.2; Katzenberger1991]; the
        mixed part has the factor 1 and label noise ¼, not ½ and 1 as on the poster.
    """

    manifold: AbstractManifold
    noise: AbstractNoise

    @checked_but("manifold")
    def __init__(self, manifold: AbstractManifold, noise: AbstractNoise):
        if not isinstance(manifold, AbstractManifold) or isinstance(manifold, LevelSet):
            raise ValueError(
                "LimitDiffusion needs the manifold of minimisers of a loss, as "
                f"ZeroLossManifold(loss); got {type(manifold).__name__}, which does not say "
                "what the noise perturbs. For a flow on it use RiemannianGradientFlow."
            )
        if isinstance(noise, AbstractDataNoise):
            noise.checked(manifold.loss)  # raises if the noise does not fit the loss
            noise.hessian_multiple(manifold.loss)
        self.manifold = manifold
        self.noise = noise

    @property
    def is_stochastic(self) -> bool:
        """Whether the limit is a stochastic differential equation: by types, never by values."""
        return self._hessian_multiple is None

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return self.manifold.split(point)

    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        """½ ∂²Φ[Σ], the drift in the sense of Itô: the sum of the three parts."""
        if not self.is_stochastic:
            return self.normal_regularisation(point)
        if isinstance(self.noise, IsotropicNoise):
            return _tree.add(*self._isotropic_parts(point))
        return _tree.scale(0.5, self._second_derivative(point).total())

    def diffusion(self, point: Point) -> lx.AbstractLinearOperator:
        """PF, from the space of the noise to tangents; zero where the noise is normal.

        `.in_structure()` is the structure of the Brownian motion that drives the limit.
        """
        tangents = _tree.structure_of(self.split(point)[0])
        project = self.manifold.normal_space(point).tangent
        projection = lx.FunctionLinearOperator(project, tangents, lx.symmetric_tag)
        return projection @ self.noise.factor(self.manifold.loss, point)

    @eqx.filter_jit
    def tangent_noise_compensation(self, point: Point) -> Tangent:
        """−½ H†∂²(∇L)[PΣP], what keeps tangent noise on a curved manifold.

        It is ½ tr II against the tangent noise and lies in the normal space. Isotropic
        noise takes D second directional derivatives of all residuals for it.
        """
        if not self.is_stochastic:
            return _tree.zeros_like(self.split(point)[0])
        if isinstance(self.noise, IsotropicNoise):
            return self._isotropic_parts(point)[0]
        return _tree.scale(0.5, self._second_derivative(point).tangent_part())

    @eqx.filter_jit
    def mixed_regularisation(self, point: Point) -> Tangent:
        """−P∂²(∇L)[H†P⊥ΣP], what correlations of normal and tangent noise cause."""
        if not self.is_stochastic or isinstance(self.noise, IsotropicNoise):
            return _tree.zeros_like(self.split(point)[0])
        return _tree.scale(0.5, self._second_derivative(point).mixed_part())

    @eqx.filter_jit
    def normal_regularisation(self, point: Point) -> Tangent:
        """−½P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)], what normal noise causes: all of it for label noise."""
        multiple = self._hessian_multiple
        if multiple is not None:
            manifold = self.manifold
            assert isinstance(manifold, ZeroLossManifold)
            norms = lambda jacobian: jnp.sum(jacobian.row_norms_squared())
            gradient, space = gradient_of_rows(manifold, norms, point)
            return _tree.scale(-multiple * manifold.loss.scale / 4, space.tangent(gradient))
        if isinstance(self.noise, IsotropicNoise):
            return self._isotropic_parts(point)[1]
        return _tree.scale(0.5, self._second_derivative(point).normal_part())

    @property
    def _hessian_multiple(self) -> Scalar | None:
        """The c of Σ = c∇²L on the manifold, or None."""
        if not isinstance(self.manifold, ZeroLossManifold):
            return None
        if not isinstance(self.noise, AbstractDataNoise):
            return None
        return self.noise.hessian_multiple(self.manifold.loss)

    def _isotropic_parts(self, point: Point) -> tuple[Tangent, Tangent]:
        """½ tr II and −¼ P∇ln|∇²L|₊, times the variance: from one normal space."""
        assert isinstance(self.noise, IsotropicNoise)
        factor = self.noise.factor(self.manifold.loss, point)
        gradient, space = _log_determinant_gradient(self.manifold, point)
        bent = bending_along(self.manifold, point, space).trace(factor)
        regularised = _tree.scale(-(self.noise.std**2) / 4, space.tangent(gradient))
        return _tree.scale(0.5, bent), regularised

    def _second_derivative(self, point: Point) -> AbstractSecondDerivative:
        factor = self.noise.factor(self.manifold.loss, point)
        through_residuals = isinstance(factor, linalg.ResidualFactor)
        if through_residuals and isinstance(self.manifold, ZeroLossManifold):
            return normal_second_derivative_parts(self.manifold, point, factor.small)
        return limit_map_second_derivative_parts(self.manifold, point, factor, is_factor=True)


def _log_determinant_gradient(
    manifold: AbstractManifold, point: Point
) -> tuple[Tangent, AbstractNormalSpace]:
    """∇ln|∇²L|₊ on a manifold of minimisers, and the normal space."""
    if isinstance(manifold, ZeroLossManifold):
        volume = lambda jacobian: linalg.log_pseudo_determinant(jacobian.gram())
        return gradient_of_rows(manifold, volume, point)
    rank = manifold.rank_rule if isinstance(manifold, MinimizerManifold) else None

    coordinates, remainder = manifold.split(point)
    unravel = _tree.ravel(coordinates)[1]

    def log_determinant(x: Array) -> Scalar:
        loss = lambda x: manifold.loss(_tree.join(unravel(x), remainder))
        rule = manifold.codimension(point) if rank is None else rank
        return linalg.log_pseudo_determinant(jax.hessian(loss)(x), rule)

    gradient = unravel(jax.grad(log_determinant)(_tree.ravel(coordinates)[0]))
    return gradient, manifold.normal_space(point)
