"""The stiff part of gradient flow at one point: a factorised approximation A of ∇²L.

Implicit steps need (I + hA)⁻¹ for many h; one eigendecomposition gives them all.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _tree, linalg
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.linalg._lapack import eigh
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss

HIGHEST = jax.lax.Precision.HIGHEST


class AbstractStiffness(eqx.Module):
    """A positive semidefinite A with its eigenvalues at hand."""

    @abc.abstractmethod
    def resolvent(self, step: Scalar, vector: Tangent) -> Tangent:
        """(I + step·A)⁻¹ v."""

    @abc.abstractmethod
    def remaining(self, gradient: Tangent) -> Scalar:
        """‖A†∇L‖, about how far gradient flow still has to go."""

    @abc.abstractmethod
    def largest(self) -> Scalar:
        """The largest eigenvalue of A."""


class GaussNewtonStiffness(AbstractStiffness):
    """A = RᵀR for R with n ≤ D rows, by Woodbury's identity in n dimensions."""

    root: linalg.AbstractJacobian
    values: Float[Array, " n"]
    vectors: Float[Array, "n n"]

    def _rotated(self, vector: Tangent) -> Array:
        return jnp.matmul(self.vectors.T, self.root.mv(vector), precision=HIGHEST)

    def resolvent(self, step: Scalar, vector: Tangent) -> Tangent:
        weights = step / (1 + step * self.values) * self._rotated(vector)
        back = jnp.matmul(self.vectors, weights, precision=HIGHEST)
        return _tree.subtract(vector, self.root.transpose_mv(back))

    def remaining(self, gradient: Tangent) -> Scalar:
        eps = jnp.finfo(self.values.dtype).eps
        kept = self.values > len(self.values) * eps * self.values[-1]
        inverse = jnp.where(kept, 1 / jnp.where(kept, self.values, 1), 0)
        return _tree.norm(inverse**1.5 * self._rotated(gradient))

    def largest(self) -> Scalar:
        return self.values[-1]


class HessianStiffness(AbstractStiffness):
    """A = the positive part of a dense Hessian; what curves downwards stays explicit."""

    values: Float[Array, " D"]
    vectors: Float[Array, "D D"]
    coordinates: Coordinates

    def _rotated(self, vector: Tangent) -> Array:
        return jnp.matmul(self.vectors.T, _tree.ravel(vector)[0], precision=HIGHEST)

    def resolvent(self, step: Scalar, vector: Tangent) -> Tangent:
        weights = self._rotated(vector) / (1 + step * self.values)
        flat = jnp.matmul(self.vectors, weights, precision=HIGHEST)
        return _tree.ravel(self.coordinates)[1](flat)

    def remaining(self, gradient: Tangent) -> Scalar:
        kept = self.values > relative_rank_cutoff(self.values.dtype) * self.values[-1]
        inverse = jnp.where(kept, 1 / jnp.where(kept, self.values, 1), 0)
        return _tree.norm(inverse * self._rotated(gradient))

    def largest(self) -> Scalar:
        return self.values[-1]


def relative_rank_cutoff(dtype: jnp.dtype) -> float:
    """Below this part of λ_max a Hessian's eigenvalue near a minimum counts as zero."""
    return float(jnp.finfo(dtype).eps) ** (1 / 3)


def stiffness(loss: AbstractLoss, point: Point) -> AbstractStiffness:
    """The Gauss-Newton matrix of a residual loss, the full Hessian of any other."""
    coordinates, remainder = loss.split(point)
    if isinstance(loss, AbstractResidualLoss):
        root = loss.gauss_newton_root(point)
        values, vectors = eigh(root.gram())
        return GaussNewtonStiffness(root, jnp.maximum(values, 0), vectors)
    flat, unravel = _tree.ravel(coordinates)

    def flat_loss(x: Array) -> Array:
        return loss(_tree.join(unravel(x), remainder))

    values, vectors = eigh(jax.hessian(flat_loss)(flat))
    return HessianStiffness(jnp.maximum(values, 0), vectors, coordinates)
