"""What a manifold is: a constraint and its normal space. All geometry follows from these.

To add a manifold, write one small file with a subclass that says what vanishes on it
(`constraint`), how its derivative is solved with (`normal_space`) and which loss is
minimal on it (`loss`).
"""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Int

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._solution import delivered, Info
from manifoldflow._types import Coordinates, Flag, Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.manifolds._normal_space import AbstractNormalSpace, Constraint
from manifoldflow.manifolds._search import land, reaches, retreat, tolerance


class AbstractManifold(eqx.Module):
    """A submanifold Γ of the space of points, the zero set of a constraint f."""

    # A loss that is minimal exactly on the manifold; its gradient flow gives Φ.
    loss: eqx.AbstractVar[AbstractLoss]

    @abc.abstractmethod
    def constraint(self, point: Point) -> Constraint:
        """f(point), zero on the manifold."""

    @abc.abstractmethod
    def normal_space(self, point: Point) -> AbstractNormalSpace:
        """The range of the constraint's transposed derivative at a point."""

    @abc.abstractmethod
    def codimension(self, point: Point) -> int:
        """How many independent constraints there are, a static count."""

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        """`(coordinates, remainder)` of a point."""
        return self.loss.split(point)

    def dimension(self, point: Point) -> int:
        """Number of coordinates less the codimension, a static count."""
        return _tree.size(self.split(point)[0]) - self.codimension(point)

    @checked
    @eqx.filter_jit
    def rank(self, point: Point) -> Int[Array, ""]:
        """The numerical rank of the constraint's derivative, measured at the point."""
        return self.normal_space(point).rank()

    @checked
    @eqx.filter_jit
    def condition_number(self, point: Point) -> Scalar:
        """λ_max/λ_min of J Jᵀ over the eigenvalues that make the rank."""
        return linalg.condition_number(self.normal_space(point).eigenvalues())

    @checked
    @eqx.filter_jit
    def defect(self, point: Point) -> Scalar:
        """‖J†f‖, to first order the distance from the manifold.

        Unchanged when the constraint is multiplied by an invertible matrix.
        """
        return _tree.norm(self.normal_space(point).pseudo_inverse(self.constraint(point)))

    @checked
    @eqx.filter_jit
    def tangent_projection(self, point: Point, vector: Tangent) -> Tangent:
        """P v, the orthogonal projection on the tangent space at the point."""
        vector = _tree.as_tangent(self.split(point)[0], vector)
        return self.normal_space(point).tangent(vector)

    @checked
    @eqx.filter_jit
    def normal_projection(self, point: Point, vector: Tangent) -> Tangent:
        """P⊥ v = v − P v."""
        vector = _tree.as_tangent(self.split(point)[0], vector)
        return self.normal_space(point).normal(vector)

    @checked
    def project(self, point: Point, *, throw: bool = True) -> Point:
        """A point of the manifold near any ambient point, by damped Gauss-Newton.

        Agrees with the closest point and with `limit_map` to first order in the
        distance, with neither to second. The derivative is P at the result.

        Args:
            point: any point in the neighbourhood of the manifold.
            throw: raise if no point of the manifold is found; with `throw=False` the
                result has NaN coordinates instead.

        Raises:
            EquinoxRuntimeError: with the message of the `RESULTS` member.
        """
        return self.project_with_info(point, throw=throw)[0]

    @checked
    @eqx.filter_jit
    def project_with_info(self, point: Point, *, throw: bool = False) -> tuple[Point, Info]:
        """As `project`, with the `Info` of the search."""
        coordinates, remainder = self.split(point)
        landed, info = land(self, coordinates, remainder)
        return _tree.join(delivered(landed, info, throw), remainder), info

    @eqx.filter_jit
    def touch_up(self, point: Point) -> tuple[Point, Info]:
        """As `project_with_info` for points that are almost on the manifold.

        Undamped, for solvers and saves: fails where `project` would have to shorten a
        step, and leaves the search for damping out of the compiled program.
        """
        coordinates, remainder = self.split(point)
        landed, info = land(self, coordinates, remainder, is_near=True)
        return _tree.join(delivered(landed, info, False), remainder), info

    @checked
    def retract(self, point: Point, vector: Tangent, *, throw: bool = True) -> Point:
        """The point of the manifold reached from `point` along `vector`.

        The step is P v, the return goes along the normal space at `point`: a
        second-order retraction, whose result y has P(y − point) = P v.

        Args:
            point: a point of the manifold.
            vector: with the structure of the coordinates; its tangent part counts.
            throw: as for `project`. Long steps over strong curvature can fail.
        """
        return self.retract_with_info(point, vector, throw=throw)[0]

    @checked
    @eqx.filter_jit
    def retract_with_info(
        self, point: Point, vector: Tangent, *, throw: bool = False
    ) -> tuple[Point, Info]:
        """As `retract`, with the `Info` of the search."""
        coordinates, remainder = self.split(point)
        vector = _tree.as_tangent(coordinates, vector)
        landed, info = retreat(self, coordinates, vector, remainder)
        return _tree.join(delivered(landed, info, throw), remainder), info

    @checked
    @eqx.filter_jit
    def random_tangent(self, point: Point, key: Key) -> Tangent:
        """A standard normal vector of the tangent space."""
        coordinates, _ = self.split(point)
        return self.normal_space(point).tangent(_tree.random_normal_like(key, coordinates))

    @checked
    @eqx.filter_jit
    def is_on(self, point: Point, *, tol: Any = None) -> Flag:
        """Whether the defect is at most `tol`·max(1, ‖point‖); by default eps^⅔.

        A constraint that no step along the normal space can lower counts as missed.
        """
        coordinates, _ = self.split(point)
        space, value = self.normal_space(point), self.constraint(point)
        defect = _tree.norm(space.pseudo_inverse(value))
        return reaches(space, value, defect, coordinates, tol)

    @checked
    def is_tangent(self, point: Point, vector: Tangent, *, tol: Any = None) -> Flag:
        """Whether ‖P⊥v‖ ≤ `tol`·‖v‖; by default eps^⅔."""
        coordinates, _ = self.split(point)
        tol = tolerance(coordinates) if tol is None else tol
        vector = _tree.as_tangent(coordinates, vector)
        return _tree.norm(self.normal_projection(point, vector)) <= tol * _tree.norm(vector)
