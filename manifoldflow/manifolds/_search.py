"""The parts that searches for a point of a manifold share: tests of arrival, and derivatives.

`gauss_newton_project` goes there from anywhere, `orthographic_retract` after a step. Both are
loops that cannot be differentiated through; each has a derivative rule that follows from what
its result satisfies, so that forward and reverse mode both work.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._results import RESULTS
from manifoldflow._types import Constraint, Coordinates, Flag, Point, Scalar
from manifoldflow.manifolds._normal_space import AbstractNormalSpace

MAX_STEPS = 100


@runtime_checkable
class Constrained(Protocol):
    """All that a search needs of a manifold."""

    def constraint(self, point: Point) -> Constraint: ...

    def normal_space(self, point: Point) -> AbstractNormalSpace: ...


def tolerance(coordinates: Coordinates) -> float:
    """The relative defect below which a point counts as on the manifold."""
    # Between rounding, eps, and √eps, from which on curvature is seen: 4e-11 and 2e-5.
    return _tree.eps_of(coordinates) ** (2 / 3)


class Floors(eqx.Module):
    """Lengths that follow from the rounding of a point, and so scale with it."""

    target: Scalar  # two roundings of the point: nothing is left to go
    near: Scalar  # counts as on the manifold
    root: Scalar  # as near as a search gets where J nearly loses rank
    rounding: Scalar
    each: Scalar  # of f, as a distance, from independent roundings of D coordinates
    is_finite: Flag  # are all coordinates numbers, whose squares are numbers as well?

    def __init__(self, coordinates: Coordinates):
        eps, scale = _tree.eps_of(coordinates), _tree.norm(coordinates)
        self.target, self.near = 2 * eps * scale, tolerance(coordinates) * scale
        self.root, self.rounding = eps**0.5 * scale, 16 * eps * scale
        self.each = eps * scale / _tree.size(coordinates) ** 0.5
        self.is_finite = jnp.isfinite(scale)


class Found(eqx.Module):
    """The findings of a search at a point: its distance from the manifold, and the space there."""

    defect: Scalar
    shortfall: Scalar
    has_normals: Flag
    is_minimum: Flag
    is_on: Flag
    is_stalled: Flag
    is_finite: Flag

    def verdict(self, is_done: Flag, is_double: Flag) -> RESULTS:
        """The result of a search that ends here."""
        # Later lines overrule earlier ones: the order says which of several reasons is told.
        result = _tree.where(self.is_on, RESULTS.successful, RESULTS.not_on_manifold)
        result = _tree.where(self.is_on & ~self.is_minimum, RESULTS.not_a_minimum, result)
        is_double = self.is_on & is_double
        result = _tree.where(is_double | ~self.has_normals, RESULTS.rank_zero, result)
        result = _tree.where(is_done, result, RESULTS.max_steps_reached)
        return _tree.where(self.is_finite, result, RESULTS.nonfinite)


def look(
    space: AbstractNormalSpace, constraint: Constraint, defect: Scalar, floors: Floors
) -> Found:
    """The findings at a point with this normal space, constraint and defect ‖J†f‖."""
    left = space.shortfall(constraint)
    # Where J nearly loses rank, J†f magnifies what is left of f, the manifold itself is as
    # blurred, and Newton's method creeps: then what is near will do.
    is_stalled = (left <= floors.rounding) | ((defect <= floors.root) & (left <= floors.near))
    is_on = ((defect <= floors.near) & (left <= floors.near)) | is_stalled
    has_normals = space.largest_eigenvalue_bound() > 0
    is_finite = floors.is_finite & jnp.isfinite(defect)
    return Found(defect, left, has_normals, space.is_minimum(), is_on, is_stalled, is_finite)


def nothing_found(like: Scalar) -> Found:
    """The findings before the first look, in the precision of a length."""
    no = jnp.asarray(False)
    infinite = jnp.full_like(like, jnp.inf)
    return Found(infinite, infinite, no, no, no, no, no)
