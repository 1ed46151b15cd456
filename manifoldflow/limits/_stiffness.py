"""The stiff part of gradient flow at one point: an approximation A of ∇²L.

Implicit Euler steps need (I + hA)⁻¹ for a few h. A Cholesky factor for each of seven takes a third
of the time of one eigendecomposition, which would give them all.
"""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.linalg import eigh
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss


class AbstractStiffness(eqx.Module):
    """A positive semidefinite A ≈ ∇²L, the stiff part of gradient flow."""

    @abc.abstractmethod
    def resolvent(self, step: Scalar) -> Callable[[Tangent], Tangent]:
        """The map v ↦ (I + step·A)⁻¹v, made ready for many v."""

    @abc.abstractmethod
    def remaining(self, gradient: Tangent) -> Scalar:
        """The length ‖A†∇L‖, about as far as gradient flow still has to go."""

    @abc.abstractmethod
    def size(self) -> Scalar:
        """The size of A, or of the Hessian that it is a part of: at least the top eigenvalue."""


class GaussNewtonStiffness(AbstractStiffness):
    """The Gauss-Newton matrix A = RᵀR for R with n ≤ D rows, by Woodbury in n dimensions."""

    root: linalg.AbstractJacobian
    gram: Float[Array, "n n"]

    def _solver(self, step: Scalar) -> Callable[[Array], Array]:
        """The solve with I + step·K."""
        # Woodbury: (I + hRᵀR)⁻¹ = I − hRᵀ(I + hK)⁻¹R with K = RRᵀ, n×n in place of D×D.
        one = jnp.eye(len(self.gram), dtype=self.gram.dtype)
        return linalg.positive_solver(one + step * self.gram)

    def resolvent(self, step: Scalar) -> Callable[[Tangent], Tangent]:
        solve = self._solver(step)

        def apply(vector: Tangent) -> Tangent:
            weights = step * solve(self.root.mv(vector))
            return _tree.subtract(vector, self.root.transpose_mv(weights))

        return apply

    def remaining(self, gradient: Tangent) -> Scalar:
        # Rᵀ(K + μ)⁻²R∇L, with the smallest μ that Cholesky can tell from rounding of K: what has
        # less slope than that does not move.
        eps = _precision.eps_of_dtype(self.gram)
        size = self.size()
        step = 1 / ((8 + math.sqrt(len(self.gram))) * eps * _tree.where(size > 0, size, 1))
        solve = self._solver(step)
        weights = step * solve(step * solve(self.root.mv(gradient)))
        return _tree.norm(self.root.transpose_mv(weights))

    def size(self) -> Scalar:
        return _tree.norm(self.gram)


class HessianStiffness(AbstractStiffness):
    """The positive part A of a dense Hessian; directions that curve downwards stay explicit."""

    signed: Float[Array, " D"]
    vectors: Float[Array, "D D"]
    coordinates: Coordinates

    @property
    def values(self) -> Float[Array, " D"]:
        return jnp.maximum(self.signed, 0)

    def _rotated(self, vector: Tangent) -> Array:
        return _precision.matmul(self.vectors.T, _tree.ravel(vector)[0])

    def resolvent(self, step: Scalar) -> Callable[[Tangent], Tangent]:
        def apply(vector: Tangent) -> Tangent:
            # Negative eigenvalues count as 0 here: 1 + hλ could vanish.
            weights = self._rotated(vector) / (1 + step * self.values)
            flat = _precision.matmul(self.vectors, weights)
            return _tree.ravel(self.coordinates)[1](flat)

        return apply

    def remaining(self, gradient: Tangent) -> Scalar:
        # Where the loss curves downwards the flow has not arrived, though it may be slow.
        sizes = jnp.abs(self.signed)
        kept = sizes > _tree.relative_rank_cutoff(sizes.dtype) * jnp.max(sizes)
        inverse = _tree.where(kept, 1 / _tree.where(kept, sizes, 1), 0)
        return _tree.norm(inverse * self._rotated(gradient))

    def size(self) -> Scalar:
        return jnp.max(jnp.abs(self.signed))


def stiffness(loss: AbstractLoss, point: Point) -> AbstractStiffness:
    """The Gauss-Newton matrix of a residual loss, the full Hessian of any other."""
    coordinates, remainder = loss.split(point)
    if isinstance(loss, AbstractResidualLoss):
        root = loss.gauss_newton_root(point)
        return GaussNewtonStiffness(root, root.gram())
    flat, unravel = _tree.ravel(coordinates)

    def flat_loss(x: Array) -> Array:
        return loss(_tree.join(unravel(x), remainder))

    values, vectors = eigh(jax.hessian(flat_loss)(flat))
    return HessianStiffness(values, vectors, coordinates)
