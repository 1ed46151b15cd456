"""∂Φ and ∂²Φ, the derivatives of the limit map of gradient flow on its manifold.

On Γ the first is the tangent projection P [LiWangArora2022, Lemma 4.3]. The second,
contracted with a symmetric Σ, has three parts [Lemma 4.5]:

    ∂²Φ[Σ] = − H†∂²(∇L)[PΣP] − 2P∂²(∇L)[H†Σ⊥∥] − P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)],   Σ⊥∥ = P⊥ΣP.

Where L is a function of residuals r with Jacobian J and Gram matrix K, all of it happens in
n dimensions. With A = J†ᵀΣJ† (n×n) and KT + TK = A the parts are

    −J†q, qᵢ = ⟨∇²rᵢ, PΣP⟩;    −2P Σᵢ ∇²rᵢ (PΣJ†)ᵢ;    −2P Σᵢ ∇²rᵢ (JᵀTK)ᵢ,

whatever the scale of L and its third derivatives in r: under P they drop out.
"""

import abc
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._level_set import LevelSet, ZeroLossManifold
from manifoldflow.manifolds._minimizer import MinimizerManifold
from manifoldflow.manifolds._normal_space import GramNormalSpace


class Covariance(eqx.Module):
    """Σ as an operator on tangents."""

    operator: lx.AbstractLinearOperator


class Factor(eqx.Module):
    """Σ = F Fᵀ."""

    operator: lx.AbstractLinearOperator


class NormalFactor(eqx.Module):
    """Σ = F Fᵀ with F = JᵀG: noise that acts through the residuals; this is G."""

    operator: lx.AbstractLinearOperator


Sigma: TypeAlias = Covariance | Factor | NormalFactor


class AbstractSecondDerivative(eqx.Module):
    """∂²Φ[Σ] at a point of a manifold, in parts."""

    @abc.abstractmethod
    def tangent_part(self) -> Tangent:
        """−H†∂²(∇L)[PΣP], the trace of the second fundamental form against PΣP."""

    @abc.abstractmethod
    def mixed_part(self) -> Tangent:
        """−2P∂²(∇L)[H†Σ⊥∥]."""

    @abc.abstractmethod
    def normal_part(self) -> Tangent:
        """−P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)]."""

    def total(self) -> Tangent:
        """∂²Φ[Σ]."""
        along = _tree.add(self.mixed_part(), self.normal_part())
        return _tree.add(self.tangent_part(), along)


def second_derivative_of(
    manifold: AbstractManifold, point: Point, sigma: Sigma
) -> AbstractSecondDerivative:
    """The parts of ∂²Φ[Σ], each computed when it is asked for."""
    if isinstance(manifold, LevelSet | ZeroLossManifold):
        return _residual_second_derivative(manifold, point, sigma)
    assert not isinstance(sigma, NormalFactor), "this manifold has no residuals"
    return _hessian_second_derivative(manifold, point, sigma)


class ResidualSecondDerivative(AbstractSecondDerivative):
    """∂²Φ[Σ] on the zero set of residuals, in n dimensions."""

    loss: AbstractResidualLoss
    coordinates: Coordinates
    remainder: Point
    space: GramNormalSpace
    gram: Float[Array, "n n"]
    # Rank-aware: where J loses rank, the inverse of K + μI would blow up the rounding errors
    # along a combination of residuals that has no slope, but still has curvature.
    inverse: Float[Array, "n n"]
    sigma: Sigma

    def tangent_part(self) -> Tangent:
        """−J†q with qᵢ = ⟨∇²rᵢ, PΣP⟩: it depends on the manifold only, not on the loss."""
        if isinstance(self.sigma, NormalFactor):
            return _tree.zeros_like(self.coordinates)
        tangent = self._operator(self.space.tangent, is_symmetric=True)
        if isinstance(self.sigma, Factor):
            left = right = tangent @ self.sigma.operator
        else:
            left = lx.IdentityLinearOperator(self._tangents)
            right = tangent @ self.sigma.operator @ tangent
        q = linalg.second_derivative_sum(self._residual, self.coordinates, left, right)
        return _tree.scale(-1, self.space.pseudo_inverse(q))

    def mixed_part(self) -> Tangent:
        """−2P Σᵢ ∇²rᵢ (PΣJ†)ᵢ, independent of the loss."""
        if isinstance(self.sigma, NormalFactor):
            return _tree.zeros_like(self.coordinates)
        tangent = self._operator(self.space.tangent, is_symmetric=True)
        multiplier = self._operator(self._transposed_pseudo_inverse)
        if isinstance(self.sigma, Factor):
            multipliers = multiplier @ self.sigma.operator
            tangents = tangent @ self.sigma.operator
        else:
            multipliers = lx.IdentityLinearOperator(multiplier.out_structure())
            tangents = tangent @ self.sigma.operator @ multiplier.T
        turned = linalg.hessian_product_sum(self._residual, self.coordinates, multipliers, tangents)
        return _tree.scale(-2, self.space.tangent(turned))

    def normal_part(self) -> Tangent:
        """−2P Σᵢ ∇²rᵢ (JᵀTK)ᵢ with KT + TK = J†ᵀΣJ†."""
        solution = linalg.lyapunov_solve(self.gram, self._normal_covariance())
        coefficients = _matmul(solution, self.gram)
        turned = linalg.contract_hessians(self._jacobian, self.coordinates, coefficients)
        return _tree.scale(-2, self.space.tangent(turned))

    def _normal_covariance(self) -> Float[Array, "n n"]:
        """J†ᵀΣJ†, whose rows and columns outside the range of K do not count."""
        if isinstance(self.sigma, NormalFactor):
            root = linalg.columns(self.sigma.operator)
            return _matmul(root, root.T)
        multiplier = self._operator(self._transposed_pseudo_inverse)
        if isinstance(self.sigma, Factor):
            root = linalg.columns(multiplier @ self.sigma.operator)
            return _matmul(root, root.T)
        return linalg.columns(multiplier @ self.sigma.operator @ multiplier.T)

    def _transposed_pseudo_inverse(self, vector: Tangent) -> Float[Array, " n"]:
        """J†ᵀv = K†Jv, refined once: the multipliers of the normal part of v."""
        found = _matmul(self.inverse, self.space.mv(vector))
        left = _tree.subtract(vector, self.space.jacobian.transpose_mv(found))
        return found + _matmul(self.inverse, self.space.mv(left))

    def _operator(self, fn: Any, *, is_symmetric: bool = False) -> lx.AbstractLinearOperator:
        tags = lx.symmetric_tag if is_symmetric else ()
        return lx.FunctionLinearOperator(fn, self._tangents, tags)

    @property
    def _tangents(self) -> PyTree[jax.ShapeDtypeStruct]:
        return _tree.structure_of(self.coordinates)

    def _residual(self, x: Coordinates) -> Float[Array, " n"]:
        return self.loss.residual(_tree.join(x, self.remainder))

    def _jacobian(self, x: Coordinates) -> linalg.AbstractJacobian:
        return self.loss.jacobian(_tree.join(x, self.remainder))


def _residual_second_derivative(
    manifold: LevelSet | ZeroLossManifold, point: Point, sigma: Sigma
) -> ResidualSecondDerivative:
    coordinates, remainder = manifold.split(point)
    space = manifold.normal_space(point)
    gram = space.jacobian.gram()
    return ResidualSecondDerivative(
        manifold.loss, coordinates, remainder, space, gram, linalg.pseudo_inverse(gram), sigma
    )


class HessianSecondDerivative(AbstractSecondDerivative):
    """∂²Φ[Σ] on the minimisers of any loss, by D×D matrices."""

    loss: AbstractLoss
    coordinates: Coordinates
    remainder: Point
    hessian: Float[Array, "D D"]
    covariance: Float[Array, "D D"]
    rank_rule: int | float = eqx.field(static=True)

    def tangent_part(self) -> Tangent:
        inside = _matmul(_matmul(self._tangent, self.covariance), self._tangent)
        return self._unravel(-_matmul(self._inverse, self._third(inside)))

    def mixed_part(self) -> Tangent:
        # The contraction is symmetric in its two slots, so M needs no symmetrising here.
        across = _matmul(_matmul(self._inverse, self.covariance), self._tangent)
        return self._unravel(-2 * _matmul(self._tangent, self._third(across)))

    def normal_part(self) -> Tangent:
        solution = linalg.lyapunov_solve(self.hessian, self.covariance, self.rank_rule)
        return self._unravel(-_matmul(self._tangent, self._third(solution)))

    @property
    def _inverse(self) -> Float[Array, "D D"]:
        return linalg.pseudo_inverse(self.hessian, self.rank_rule)

    @property
    def _tangent(self) -> Float[Array, "D D"]:
        normal = linalg.range_projection(self.hessian, self.rank_rule)
        return jnp.eye(len(normal), dtype=normal.dtype) - normal

    def _third(self, matrix: Float[Array, "D D"]) -> Float[Array, " D"]:
        """∂²(∇L)[M] = Σⱼ D²(∇L)[eⱼ, Meⱼ]."""
        flat, unravel = _tree.ravel(self.coordinates)

        def gradient(x: Array) -> Array:
            return jax.grad(lambda x: self.loss(_tree.join(unravel(x), self.remainder)))(x)

        identity = lx.IdentityLinearOperator(_tree.structure_of(flat))
        return linalg.second_derivative_sum(
            gradient, flat, identity, lx.MatrixLinearOperator(matrix)
        )

    def _unravel(self, vector: Float[Array, " D"]) -> Tangent:
        return _tree.ravel(self.coordinates)[1](vector)


def _hessian_second_derivative(
    manifold: AbstractManifold, point: Point, sigma: Covariance | Factor
) -> HessianSecondDerivative:
    coordinates, remainder = manifold.split(point)
    if isinstance(manifold, MinimizerManifold):
        rank = manifold.rank_rule
    else:
        rank = manifold.codimension(point)
    flat, unravel = _tree.ravel(coordinates)
    loss = manifold.loss
    hessian = jax.hessian(lambda x: loss(_tree.join(unravel(x), remainder)))(flat)
    ravel = lx.FunctionLinearOperator(lambda v: _tree.ravel(v)[0], _tree.structure_of(coordinates))
    matrix = linalg.columns(ravel @ sigma.operator)
    covariance = _matmul(matrix, matrix.T) if isinstance(sigma, Factor) else matrix
    return HessianSecondDerivative(loss, coordinates, remainder, hessian, covariance, rank)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
