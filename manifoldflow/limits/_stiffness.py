"""The stiff part of gradient flow at one point: a factorised approximation A of ∇²L.

Implicit steps need (I + hA)⁻¹ for many h; one eigendecomposition gives them all.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.linalg import eigh
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss


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
        """The largest eigenvalue of A, or in size of what A is the positive part of."""


class GaussNewtonStiffness(AbstractStiffness):
    """A = RᵀR for R with n ≤ D rows, by Woodbury's identity in n dimensions."""

    root: linalg.AbstractJacobian
    values: Float[Array, " n"]
    vectors: Float[Array, "n n"]

    def _rotated(self, vector: Tangent) -> Array:
        return _precision.matmul(self.vectors.T, self.root.mv(vector))

    def resolvent(self, step: Scalar, vector: Tangent) -> Tangent:
        weights = step / (1 + step * self.values) * self._rotated(vector)
        back = _precision.matmul(self.vectors, weights)
        return _tree.subtract(vector, self.root.transpose_mv(back))

    def remaining(self, gradient: Tangent) -> Scalar:
        eps = _precision.eps_of_dtype(self.values)
        kept = self.values > len(self.values) * eps * self.values[-1]
        inverse = _tree.where(kept, 1 / _tree.where(kept, self.values, 1), 0)
        return _tree.norm(inverse**1.5 * self._rotated(gradient))

    def largest(self) -> Scalar:
        return self.values[-1]


class HessianStiffness(AbstractStiffness):
    """A = the positive part of a dense Hessian; what curves downwards stays explicit."""

    signed: Float[Array, " D"]
    vectors: Float[Array, "D D"]
    coordinates: Coordinates

    @property
    def values(self) -> Float[Array, " D"]:
        return jnp.maximum(self.signed, 0)

    def _rotated(self, vector: Tangent) -> Array:
        return _precision.matmul(self.vectors.T, _tree.ravel(vector)[0])

    def resolvent(self, step: Scalar, vector: Tangent) -> Tangent:
        weights = self._rotated(vector) / (1 + step * self.values)
        flat = _precision.matmul(self.vectors, weights)
        return _tree.ravel(self.coordinates)[1](flat)

    def remaining(self, gradient: Tangent) -> Scalar:
        # Where the loss curves downwards the flow has not arrived, though it may be slow.
        sizes = jnp.abs(self.signed)
        kept = sizes > _tree.relative_rank_cutoff(sizes.dtype) * jnp.max(sizes)
        inverse = _tree.where(kept, 1 / _tree.where(kept, sizes, 1), 0)
        return _tree.norm(inverse * self._rotated(gradient))

    def largest(self) -> Scalar:
        return jnp.max(jnp.abs(self.signed))


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
    return HessianStiffness(values, vectors, coordinates)
