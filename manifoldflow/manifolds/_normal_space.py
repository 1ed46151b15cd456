"""The normal space of a manifold at one point: the one solve that all geometry needs."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._solution import RESULTS
from manifoldflow._types import Coordinates, Flag, Scalar, Tangent

Constraint = PyTree[Array]


class AbstractNormalSpace(eqx.Module):
    """What the derivative J of a constraint f says at one point."""

    @abc.abstractmethod
    def normal(self, vector: Tangent) -> Tangent:
        """P⊥v, the part of a vector in the range of Jᵀ."""

    @abc.abstractmethod
    def mv(self, vector: Tangent) -> Constraint:
        """J v."""

    @abc.abstractmethod
    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        """J†f, the shortest v with J v = f."""

    @abc.abstractmethod
    def multipliers(self, vector: Tangent) -> Constraint:
        """J†ᵀv: the λ for which Jᵀλ is the normal part of v, Lagrange's multipliers."""

    @abc.abstractmethod
    def damped_pseudo_inverse(self, constraint: Constraint, damping: Scalar) -> Tangent:
        """Jᵀ(J Jᵀ + damping·I)⁻¹ f."""

    @abc.abstractmethod
    def eigenvalues(self) -> Float[Array, " n"]:
        """The spectrum of J Jᵀ, ascending."""

    @abc.abstractmethod
    def largest_eigenvalue_bound(self) -> Scalar:
        """tr(J Jᵀ), the scale against which damping is measured."""

    @abc.abstractmethod
    def is_minimum(self) -> Flag:
        """Whether the loss behind the constraint curves upwards on the normal space."""

    @abc.abstractmethod
    def curvature(self, tol: Any = None) -> RESULTS:
        """`successful` where the loss behind the constraint has a minimum, if it is stationary.

        Asks all of its eigenvalues: those beside the normal space must vanish, up to `tol` of
        the largest, or √eps if that is more. For a point of the manifold, not on the way there.
        """

    def tangent(self, vector: Tangent) -> Tangent:
        """P v = v − P⊥v."""
        return _tree.subtract(vector, self.normal(vector))

    def existence(self) -> RESULTS:
        """`rank_zero` where J vanishes, so that P would be the identity."""
        vanishes = self.largest_eigenvalue_bound() == 0
        return RESULTS.where(vanishes, RESULTS.rank_zero, RESULTS.successful)

    def rank(self) -> Int[Array, ""]:
        """The numerical rank of J."""
        return linalg.numerical_rank(self.eigenvalues())


class GramNormalSpace(AbstractNormalSpace):
    """Normal space of {f = 0} for f with n ≤ D values, through the n×n Gram matrix."""

    jacobian: linalg.AbstractJacobian
    gram: linalg.AbstractGramSolve

    def normal(self, vector: Tangent) -> Tangent:
        return linalg.normal_component(self.jacobian, self.gram, vector)

    def mv(self, vector: Tangent) -> Constraint:
        return self.jacobian.mv(vector)

    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        return linalg.pseudo_inverse_mv(self.jacobian, self.gram, constraint)

    def multipliers(self, vector: Tangent) -> Constraint:
        found = self.gram.solve(self.jacobian.mv(vector))
        left = _tree.subtract(vector, self.jacobian.transpose_mv(found))
        return found + self.gram.solve(self.jacobian.mv(left))

    def damped_pseudo_inverse(self, constraint: Constraint, damping: Scalar) -> Tangent:
        return self.jacobian.transpose_mv(self.gram.damped_solve(constraint, damping))

    def eigenvalues(self) -> Float[Array, " n"]:
        return self.gram.eigenvalues()

    def largest_eigenvalue_bound(self) -> Scalar:
        return jnp.sum(self.jacobian.row_norms_squared())

    def is_minimum(self) -> Flag:
        return jnp.asarray(True)

    def curvature(self, tol: Any = None) -> RESULTS:
        del tol
        return RESULTS.successful


class HessianNormalSpace(AbstractNormalSpace):
    """Range of a dense Hessian H = ∂(∇L) whose null space is the tangent space."""

    hessian: Float[Array, "D D"]
    rank_rule: int | float = eqx.field(static=True)
    coordinates: Coordinates

    def _flat(self, vector: Tangent) -> Array:
        return _tree.ravel(vector)[0]

    def _tangent(self, vector: Array) -> Tangent:
        return _tree.ravel(self.coordinates)[1](vector)

    def normal(self, vector: Tangent) -> Tangent:
        projector = linalg.range_projection(self.hessian, self.rank_rule)
        return self._tangent(_matmul(projector, self._flat(vector)))

    def mv(self, vector: Tangent) -> Constraint:
        return self._tangent(_matmul(self.hessian, self._flat(vector)))

    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        inverse = linalg.pseudo_inverse(self.hessian, self.rank_rule)
        return self._tangent(_matmul(inverse, self._flat(constraint)))

    def multipliers(self, vector: Tangent) -> Constraint:
        return self.pseudo_inverse(vector)  # the Hessian is symmetric

    def damped_pseudo_inverse(self, constraint: Constraint, damping: Scalar) -> Tangent:
        values, vectors, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # Steps follow −∇L also where the Hessian still curves downwards.
        weights = jnp.where(inside, jnp.abs(values) / (values**2 + damping), 0)
        rotated = _matmul(vectors.T, self._flat(constraint))
        return self._tangent(_matmul(vectors, weights * rotated))

    def eigenvalues(self) -> Float[Array, " n"]:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # Of a number that was promised, those beyond it are told as well.
        counted = inside | isinstance(self.rank_rule, int)
        return jnp.sort(jnp.where(counted, values**2, 0))

    def largest_eigenvalue_bound(self) -> Scalar:
        return jnp.sum(self.hessian**2)

    def is_minimum(self) -> Flag:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        return jnp.all(jnp.where(inside, values > 0, True))

    def curvature(self, tol: Any = None) -> RESULTS:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # As much as the third derivative makes of what the point is off by.
        cutoff = float(jnp.finfo(values.dtype).eps) ** 0.5
        noise = (cutoff if tol is None else jnp.maximum(tol, cutoff)) * jnp.max(jnp.abs(values))
        if isinstance(self.rank_rule, int):
            has_more = jnp.any(~inside & (values > noise))
        else:
            noise = jnp.minimum(noise, self.rank_rule * jnp.max(jnp.abs(values)))
            has_more = jnp.asarray(False)
        is_upwards = jnp.all(jnp.where(inside, values > 0, values >= -noise))
        result = RESULTS.where(has_more, RESULTS.rank_too_small, RESULTS.successful)
        return RESULTS.where(is_upwards, result, RESULTS.not_a_minimum)


def relative_rank_cutoff(dtype: Any) -> float:
    """Below this part of λ_max a Hessian's eigenvalue near a minimum counts as zero."""
    return float(jnp.finfo(dtype).eps) ** (1 / 3)


def _matmul(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)
