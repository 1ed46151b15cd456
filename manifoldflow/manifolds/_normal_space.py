"""The normal space of a manifold at one point: the linear solve that all geometry needs."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree, linalg
from manifoldflow._results import RESULTS
from manifoldflow._types import Constraint, Coordinates, Flag, Scalar, Tangent


class AbstractNormalSpace(eqx.Module):
    """The normal space at one point, from the derivative J of the constraint f.

    A subclass knows how to solve with J. `manifold.normal_space(point)` gives one.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> space = mf.LevelSet(lambda x: x @ x - 1).normal_space(jnp.array([1.0, 0.0]))
        >>> isinstance(space, mf.manifolds.AbstractNormalSpace)
        True
        >>> print(space.tangent(jnp.ones(2)).round(3), space.pseudo_inverse(jnp.array([2.0])))
        [0. 1.] [1. 0.]
    """

    @abc.abstractmethod
    def tangent(self, vector: Tangent) -> Tangent:
        """The tangent part P v = v − P⊥v."""

    @abc.abstractmethod
    def mv(self, vector: Tangent) -> Constraint:
        """The product J v."""

    @abc.abstractmethod
    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        """The vector J†f, the shortest v with J v = f."""

    @abc.abstractmethod
    def multipliers(self, vector: Tangent) -> Constraint:
        """Lagrange's multipliers J†ᵀv: the λ for which Jᵀλ is the normal part of v."""

    @abc.abstractmethod
    def damped(self, damping: Scalar) -> "AbstractNormalSpace":
        """The same space with damped steps: `damping` relative to the size of J, 0 for none."""

    @abc.abstractmethod
    def step(self, constraint: Constraint) -> tuple[Tangent, Constraint]:
        """The step v that lowers f, and the rest f − J v that it leaves where f is linear."""

    @abc.abstractmethod
    def eigenvalues(self) -> Float[Array, " n"]:
        """The spectrum of J Jᵀ, ascending."""

    @abc.abstractmethod
    def rank(self) -> Int[Array, ""]:
        """The numerical rank of J."""

    @abc.abstractmethod
    def largest_eigenvalue_bound(self) -> Scalar:
        """The trace tr(J Jᵀ), zero where there is no normal space."""

    @abc.abstractmethod
    def outward(self) -> Tangent:
        """A normal vector: the sum of the unit normals of all constraints, or another."""

    @abc.abstractmethod
    def shortfall(self, constraint: Constraint) -> Scalar:
        """A lower bound ‖f‖/‖J‖ of the distance to where f is lower by this value.

        Every row of J is measured in units of its own length.
        """

    @abc.abstractmethod
    def is_minimum(self) -> Flag:
        """True where the loss behind the constraint curves upwards on the normal space."""

    @abc.abstractmethod
    def curvature(self, tol: Any = None) -> RESULTS:
        """`RESULTS.successful` where the loss behind the constraint, if stationary, is minimal.

        All eigenvalues are looked at: those beside the normal space must vanish, up to `tol` of the
        largest, or √eps if that is more. For a point of the manifold, not on the way there.
        """

    def normal(self, vector: Tangent) -> Tangent:
        """The normal part P⊥v of a vector, in the range of Jᵀ."""
        return _tree.subtract(vector, self.tangent(vector))

    def existence(self) -> RESULTS:
        """`rank_zero` where J vanishes, so that P would be the identity; `nonfinite` for NaN."""
        size = self.largest_eigenvalue_bound()
        result = _tree.where(size == 0, RESULTS.rank_zero, RESULTS.successful)
        return _tree.where(jnp.isfinite(size), result, RESULTS.nonfinite)


class GramNormalSpace(AbstractNormalSpace):
    """The normal space of {f = 0} for f with n ≤ D values, through the n×n Gram matrix J Jᵀ.

    Args:
        jacobian: J, from tangents to n values.
        gram: the solve with J Jᵀ.
        damping: None, or the damping of its steps relative to the size of J.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> plane = mf.LevelSet(lambda x: jnp.array([x[0] + x[1], 2 * x[2]]))
        >>> space = plane.normal_space(jnp.zeros(3))
        >>> type(space).__name__
        'GramNormalSpace'
        >>> print(space.eigenvalues().round(3), space.rank())
        [2. 4.] 2
    """

    jacobian: linalg.AbstractJacobian
    gram: linalg.AbstractGramSolve
    damping: Scalar | None
    units: Float[Array, " n"]  # of f, see `_units`

    def __init__(
        self,
        jacobian: linalg.AbstractJacobian,
        gram: linalg.AbstractGramSolve,
        damping: Scalar | None = None,
    ):
        self.jacobian, self.gram, self.damping = jacobian, gram, damping
        self.units = _units(gram.row_scale)

    def tangent(self, vector: Tangent) -> Tangent:
        return linalg.tangent_component(self.jacobian, self.gram, vector)

    def mv(self, vector: Tangent) -> Constraint:
        return self.jacobian.mv(vector)

    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        return linalg.pseudo_inverse_mv(self.jacobian, self.gram, constraint)

    def multipliers(self, vector: Tangent) -> Constraint:
        return linalg.refined_solve(self.jacobian, self.gram, self.jacobian.mv(vector))

    def damped(self, damping: Scalar) -> "GramNormalSpace":
        # The Gram matrix of rows in units of their lengths has the trace n: this makes μ relative
        # to it.
        damping = damping * self.jacobian.out_structure().size
        where = lambda space: (space.gram, space.damping)
        found = self.gram.damped(damping), damping
        return eqx.tree_at(where, self, found, is_leaf=lambda leaf: leaf is None)

    def step(self, constraint: Constraint) -> tuple[Tangent, Constraint]:
        found = linalg.refined_solve(self.jacobian, self.gram, constraint, self.damping)
        damping = 0 if self.damping is None else self.damping
        # (J Jᵀ + μ diag‖Jᵢ‖²)λ = f leaves f − J Jᵀλ = μ diag‖Jᵢ‖²λ, without another product with J.
        left = damping * self.gram.row_norms_squared() * found
        return self.jacobian.transpose_mv(found), left

    def eigenvalues(self) -> Float[Array, " n"]:
        return self.gram.eigenvalues()

    def rank(self) -> Int[Array, ""]:
        return linalg.numerical_rank(linalg.equilibrated_eigenvalues(self.jacobian))

    def largest_eigenvalue_bound(self) -> Scalar:
        return jnp.sum(self.gram.row_norms_squared())

    def outward(self) -> Tangent:
        return self.jacobian.transpose_mv(self.gram.row_scale)

    def shortfall(self, constraint: Constraint) -> Scalar:
        weighted = self.units * constraint
        # It has no derivative: `_tree.norm` would take care of one at zero.
        return jnp.sqrt(_tree.inner(weighted, weighted) / len(weighted))

    def is_minimum(self) -> Flag:
        return jnp.asarray(True)

    def curvature(self, tol: Any = None) -> RESULTS:
        del tol
        return RESULTS.successful


def _units(row_scale: Float[Array, " n"]) -> Float[Array, " n"]:
    """One over the lengths of the rows of J; for rows without slope, over that of the longest row.

    Such rows can lower nothing: their f counts, and without bound where no row has a slope.
    """
    # A stand-in for 1/0 whose square, times f, is still finite: 1e15 in float32.
    largest = jnp.asarray(float(jnp.finfo(row_scale.dtype).max) ** 0.4, row_scale.dtype)
    longest = jnp.min(_tree.where(row_scale > 0, row_scale, largest))
    return jnp.maximum(row_scale, longest)


class HessianNormalSpace(AbstractNormalSpace):
    """The range of a dense Hessian H = ∂(∇L), whose null space is the tangent space.

    Args:
        hessian: H, D×D.
        rank_rule: the rank of H, or the part of the largest above which eigenvalues count.
        coordinates: of the point, for their structure.
        damping: None, or the damping of its steps relative to ‖H‖.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> hessian = jnp.diag(jnp.array([4.0, 0.0]))
        >>> space = mf.manifolds.HessianNormalSpace(hessian, 1, jnp.zeros(2))
        >>> print(space.tangent(jnp.ones(2)).round(3), space.is_minimum())
        [0. 1.] True
    """

    hessian: Float[Array, "D D"]
    rank_rule: int | float = eqx.field(static=True)
    coordinates: Coordinates
    damping: Scalar | None = None

    def _flat(self, vector: Tangent) -> Array:
        return _tree.ravel(vector)[0]

    def _tangent(self, vector: Array) -> Tangent:
        return _tree.ravel(self.coordinates)[1](vector)

    @property
    def _size(self) -> Scalar:
        size = _tree.norm(self.hessian)
        return _tree.where(size > 0, size, 1)

    def tangent(self, vector: Tangent) -> Tangent:
        flat = self._flat(vector)
        projector = linalg.range_projection(self.hessian, self.rank_rule)
        return self._tangent(flat - _precision.matmul(projector, flat))

    def mv(self, vector: Tangent) -> Constraint:
        return self._tangent(_precision.matmul(self.hessian, self._flat(vector)))

    def pseudo_inverse(self, constraint: Constraint) -> Tangent:
        inverse = linalg.pseudo_inverse(self.hessian, self.rank_rule)
        return self._tangent(_precision.matmul(inverse, self._flat(constraint)))

    def multipliers(self, vector: Tangent) -> Constraint:
        return self.pseudo_inverse(vector)  # the Hessian is symmetric

    def damped(self, damping: Scalar) -> "HessianNormalSpace":
        return HessianNormalSpace(self.hessian, self.rank_rule, self.coordinates, damping)

    def step(self, constraint: Constraint) -> tuple[Tangent, Constraint]:
        flat = self._flat(constraint)
        values, vectors, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # Damped steps follow −∇L also where the Hessian still curves downwards; full ones are
        # Newton's, which find saddles as well, and then say so.
        damping = 0 if self.damping is None else self.damping
        curvatures = _tree.where(damping > 0, jnp.abs(values), values) / self._size
        curvatures = _tree.where(inside, curvatures, 1)
        weights = _tree.where(inside, curvatures / (curvatures**2 + damping), 0)
        lift = _precision.matmul(vectors, weights * _precision.matmul(vectors.T, flat)) / self._size
        return self._tangent(lift), self._tangent(flat - _precision.matmul(self.hessian, lift))

    def eigenvalues(self) -> Float[Array, " n"]:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # Of a number that was promised, those beyond it are told as well.
        counted = inside | isinstance(self.rank_rule, int)
        return jnp.sort(_tree.where(counted, values**2, 0))

    def rank(self) -> Int[Array, ""]:
        return linalg.numerical_rank(self.eigenvalues())

    def largest_eigenvalue_bound(self) -> Scalar:
        return jnp.sum(self.hessian**2)

    def outward(self) -> Tangent:
        return self._tangent(jnp.sum(self.hessian, axis=0) / self._size)

    def shortfall(self, constraint: Constraint) -> Scalar:
        return _tree.norm(constraint) / self._size

    def is_minimum(self) -> Flag:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        return jnp.all(_tree.where(inside, values > 0, True))

    def curvature(self, tol: Any = None) -> RESULTS:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        # As much as the third derivative makes of what the point is off by.
        cutoff = _precision.eps_of_dtype(values) ** 0.5
        noise = (cutoff if tol is None else jnp.maximum(tol, cutoff)) * jnp.max(jnp.abs(values))
        if isinstance(self.rank_rule, int):
            has_more = jnp.any(~inside & (values > noise))
        else:
            noise = jnp.minimum(noise, self.rank_rule * jnp.max(jnp.abs(values)))
            has_more = jnp.asarray(False)
        is_upwards = jnp.all(_tree.where(inside, values > 0, values >= -noise))
        result = _tree.where(has_more, RESULTS.rank_too_small, RESULTS.successful)
        return _tree.where(is_upwards, result, RESULTS.not_a_minimum)
