"""Base class of manifolds: a constraint and its normal space, from which all geometry follows.

To add a manifold, write one small file with a subclass that gives the function that vanishes on
it (`constraint`), the solve with its derivative (`normal_space`) and the loss that is minimal on
it (`loss`).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._jit import jit_part
from manifoldflow._results import delivered, Info, or_nan, RESULTS
from manifoldflow._types import Constraint, Coordinates, Flag, Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss, AbstractResidualLoss
from manifoldflow.manifolds._gauss_newton import gauss_newton_project
from manifoldflow.manifolds._local import AbstractLocalGeometry
from manifoldflow.manifolds._local_gram import GramGeometry
from manifoldflow.manifolds._local_hessian import HessianGeometry
from manifoldflow.manifolds._normal_space import (
    AbstractNormalSpace,
    GramNormalSpace,
)
from manifoldflow.manifolds._orthographic import orthographic_retract
from manifoldflow.manifolds._search import MAX_STEPS, tolerance


class AbstractManifold(eqx.Module):
    """A submanifold Γ of the space of points: the zero set of a constraint f.

    A subclass defines `constraint`, `normal_space`, `codimension` and the field `loss`, a loss that
    is minimal exactly on Γ. Projections, retractions, curvature, flows and limits follow.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> isinstance(circle, mf.AbstractManifold)
        True
        >>> x = circle.project(jnp.array([3.0, 4.0]))
        >>> print(x.round(3), circle.dimension(x), circle.is_on(x))
        [0.6 0.8] 1 True
        >>> print(circle.tangent_projection(x, jnp.array([1.0, 0.0])).round(2))
        [ 0.64 -0.48]
    """

    # A loss that is minimal exactly on the manifold; its gradient flow gives Φ.
    loss: eqx.AbstractVar[AbstractLoss]

    @abc.abstractmethod
    def constraint(self, point: Point) -> Constraint:
        """The value f(point), zero on the manifold."""

    @abc.abstractmethod
    def normal_space(self, point: Point) -> AbstractNormalSpace:
        """The normal space at a point: the range of the transposed derivative of the constraint."""

    @abc.abstractmethod
    def codimension(self, point: Point) -> int:
        """The number of independent constraints at the point, a Python integer."""

    @property
    def residual_loss(self) -> AbstractResidualLoss | None:
        """The loss, if the manifold is the zero set of its residuals, else None; by types alone.

        It is the loss where that has residuals, except on manifolds of stationary points. The
        constraint is then taken to be the residual, in the same order.
        """
        loss = self.loss
        # By types, which are known where a program is traced; values are not.
        is_residual = isinstance(loss, AbstractResidualLoss)
        return None if isinstance(self, AbstractStationaryManifold) or not is_residual else loss

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        """The coordinates and the remainder of a point."""
        return self.loss.split(point)

    @checked
    def local(
        self, point: Point, *, space: AbstractNormalSpace | None = None
    ) -> AbstractLocalGeometry:
        """The geometry at a point up to second order, for curvature, flows and limits.

        Args:
            point: a point of the manifold; off it, all is evaluated at this point.
            space: the normal space there, if it is known.
        """
        coordinates, remainder = self.split(point)
        space = self.normal_space(point) if space is None else space
        loss = self.residual_loss
        if loss is None or not isinstance(space, GramNormalSpace):
            return HessianGeometry(
                manifold=self, coordinates=coordinates, remainder=remainder, space=space
            )
        return GramGeometry(
            manifold=self, loss=loss, coordinates=coordinates, remainder=remainder, space=space
        )

    def dimension(self, point: Point) -> int:
        """The number of coordinates less the codimension, a Python integer."""
        return _tree.size(self.split(point)[0]) - self.codimension(point)

    @checked
    @eqx.filter_jit
    def rank(self, point: Point) -> Int[Array, ""]:
        """The numerical rank of the constraint's derivative, measured at the point."""
        return self.normal_space(point).rank()

    @checked
    @eqx.filter_jit
    def condition_number(self, point: Point) -> Scalar:
        """The ratio λ_max/λ_min of the eigenvalues of J Jᵀ that make up its rank."""
        return linalg.condition_number(self.normal_space(point).eigenvalues())

    @checked
    @eqx.filter_jit
    def defect(self, point: Point) -> Scalar:
        """The length ‖J†f‖, to first order the distance from the manifold.

        It does not change when the constraint is multiplied by an invertible matrix.
        """
        return _tree.norm(self.normal_space(point).pseudo_inverse(self.constraint(point)))

    @checked
    def tangent_projection(self, point: Point, vector: Tangent, *, throw: bool = True) -> Tangent:
        """The orthogonal projection P v of a vector on the tangent space at the point.

        Args:
            point: a point of the manifold; off it, the projection there.
            vector: with the structure of the coordinates.
            throw: raise where the constraint's derivative vanishes, so that there is no tangent
                space; with `throw=False` the result is NaN there.

        Raises:
            EquinoxRuntimeError: with the message of the `RESULTS` member.
        """
        return delivered(*self._projected(point, vector, True), throw)

    @checked
    def normal_projection(self, point: Point, vector: Tangent, *, throw: bool = True) -> Tangent:
        """The normal part P⊥v = v − P v of a vector; `throw` as for `tangent_projection`."""
        return delivered(*self._projected(point, vector, False), throw)

    @checked
    @eqx.filter_jit
    def _projected(
        self, point: Point, vector: Tangent, is_tangent: bool
    ) -> tuple[Tangent, RESULTS]:
        vector = _tree.as_tangent(self.split(point)[0], vector)
        space = self.normal_space(point)
        projected = space.tangent(vector) if is_tangent else space.normal(vector)
        result = space.existence()
        used = self, point, vector
        return or_nan(projected, result == RESULTS.successful, of=used), result

    @checked
    def project(self, point: Point, *, throw: bool = True, max_steps: int = MAX_STEPS) -> Point:
        """A point of the manifold near any ambient point, by damped Gauss-Newton.

        Agrees with the closest point and with `limit_map` to first order in the
        distance, with neither to second. The derivative is P at the result.

        Args:
            point: any point in the neighbourhood of the manifold.
            throw: raise if no point of the manifold is found; with `throw=False` the
                result has NaN coordinates instead.
            max_steps: Gauss-Newton steps before the search gives up, each with at least one
                factorisation.

        Raises:
            ValueError: `max_steps` is not a positive whole number.
            EquinoxRuntimeError: with the message of the `RESULTS` member.
        """
        return self.project_with_info(point, throw=throw, max_steps=max_steps)[0]

    @checked
    def project_with_info(
        self, point: Point, *, throw: bool = False, max_steps: int = MAX_STEPS
    ) -> tuple[Point, Info]:
        """The point of `project`, with the `Info` of the search.

        Args:
            point: any point in the neighbourhood of the manifold.
            throw: raise if the search fails; by default the result then has NaN coordinates.
            max_steps: Gauss-Newton steps before the search gives up.
        """
        # The limit as an array: another limit is then no other program.
        landed, info = self._landed(point, jnp.asarray(checked_count("max_steps", max_steps)))
        return delivered(landed, info.result, throw), info

    @eqx.filter_jit
    def _landed(self, point: Point, max_steps: Int[Array, ""]) -> tuple[Point, Info]:
        landed, info = self.gauss_newton_project(point, max_steps=max_steps)
        coordinates, remainder = self.split(landed)
        return _tree.join(or_nan(coordinates, info.is_successful), remainder), info

    def gauss_newton_project(
        self, point: Point, *, max_steps: Int[Array, ""] | int = MAX_STEPS
    ) -> tuple[Point, Info]:
        """The result of `project_with_info`, but where it fails the last point of the search."""
        coordinates, remainder = self.split(point)
        landed, info = gauss_newton_project(self, coordinates, remainder, max_steps=max_steps)
        return _tree.join(landed, remainder), self._judged(landed, remainder, info)

    def _judged(self, landed: Coordinates, remainder: Point, info: Info) -> Info:
        """The verdict on a search that ended here; a stationary point that is no minimum fails."""
        if not isinstance(self, AbstractStationaryManifold):
            return info
        # A verdict has no derivative, and that of a Hessian's eigenvalues would be a third one of
        # L.
        space = self.normal_space(_tree.join(jax.lax.stop_gradient(landed), remainder))
        result = _tree.where(info.is_successful, space.curvature(), info.result)
        return eqx.tree_at(lambda i: i.result, info, result)

    @jit_part
    def newton_correct(self, point: Point, *, max_steps: int = MAX_STEPS) -> tuple[Point, Info]:
        """The result of `project_with_info` for points that are almost on the manifold.

        Its steps are undamped, for solvers and saves: it fails where `project` would have to
        shorten a step, and keeps the search for a damping out of the compiled program. The
        derivative of what failed is zero: a step that is tried again must not spoil that of the
        whole path.
        """
        coordinates, remainder = self.split(point)
        landed, info = gauss_newton_project(
            self, coordinates, remainder, is_near=True, max_steps=max_steps
        )
        missing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), landed)
        return _tree.join(_tree.where(info.is_successful, landed, missing), remainder), info

    @checked
    def retract(
        self, point: Point, vector: Tangent, *, throw: bool = True, max_steps: int = MAX_STEPS
    ) -> Point:
        """The point of the manifold reached from `point` along `vector`.

        The step is P v, the return goes along the normal space at `point`: a
        second-order retraction, whose result y has P(y − point) = P v.

        Args:
            point: a point of the manifold.
            vector: with the structure of the coordinates; its tangent part counts.
            throw: as for `project`. Long steps over strong curvature can fail.
            max_steps: Gauss-Newton steps before the search gives up.
        """
        return self.retract_with_info(point, vector, throw=throw, max_steps=max_steps)[0]

    @checked
    def retract_with_info(
        self,
        point: Point,
        vector: Tangent,
        *,
        throw: bool = False,
        max_steps: int = MAX_STEPS,
        space: AbstractNormalSpace | None = None,
    ) -> tuple[Point, Info]:
        """The point of `retract`, with the `Info` of the search.

        Where `space`, the normal space at the point, is known already it is not made again;
        the vector must then be tangent, and derivatives do not go through it.
        """
        max_steps = checked_count("max_steps", max_steps)
        landed, info = self._retreated(point, vector, jnp.asarray(max_steps), space)
        return delivered(landed, info.result, throw), info

    @eqx.filter_jit
    def _retreated(
        self,
        point: Point,
        vector: Tangent,
        max_steps: Int[Array, ""],
        base: AbstractNormalSpace | None = None,
    ) -> tuple[Point, Info]:
        coordinates, remainder = self.split(point)
        vector = _tree.as_tangent(coordinates, vector)
        # The derivative goes through the point: through a space made from it as well, it would
        # count twice.
        base = jax.lax.stop_gradient(base)
        landed, info = orthographic_retract(
            self, coordinates, vector, remainder, max_steps=max_steps, base=base
        )
        info = self._judged(landed, remainder, info)
        return _tree.join(or_nan(landed, info.is_successful), remainder), info

    @checked
    def random_tangent(self, point: Point, key: Key, *, throw: bool = True) -> Tangent:
        """A standard normal vector of the tangent space; `throw` as for `tangent_projection`."""
        drawn = _tree.random_normal_like(key, self.split(point)[0])
        return self.tangent_projection(point, drawn, throw=throw)

    @checked
    @eqx.filter_jit
    def is_on(self, point: Point, *, tol: Any = None) -> Flag:
        """True where the defect is at most `tol`·‖point‖; by default eps^⅔.

        A constraint that no step along the normal space can lower counts as missed, and so does a
        stationary point of the loss that is no minimum. Lengths are measured against the point,
        whatever its units: at the origin only an exact zero of the constraint counts.
        """
        coordinates, _ = self.split(point)
        space, value = self.normal_space(point), self.constraint(point)
        defect = _tree.norm(space.pseudo_inverse(value))
        reach = (tolerance(coordinates) if tol is None else tol) * _tree.norm(coordinates)
        # A point that may be further away may be bent otherwise.
        curvature = space.curvature(None if tol is None else 10 * tol)
        is_minimum = curvature == RESULTS.successful
        # A constraint outside the range of J (an empty set, contradictory data) has J†f = 0
        # without being zero; it must be small against ‖J‖ as well.
        return (defect <= reach) & (space.shortfall(value) <= reach) & is_minimum

    @checked
    def is_tangent(self, point: Point, vector: Tangent, *, tol: Any = None) -> Flag:
        """True where ‖P⊥v‖ ≤ `tol`·‖v‖; by default eps^⅔.

        Where there is no normal space no vector counts as tangent.
        """
        coordinates, _ = self.split(point)
        tol = tolerance(coordinates) if tol is None else tol
        # The squares of entries near 1e-23 are zero in float32, and every vector of them would be
        # tangent.
        vector, _ = _tree.in_own_units(_tree.as_tangent(coordinates, vector))
        normal = self.normal_projection(point, vector, throw=False)
        return _tree.norm(normal) <= tol * _tree.norm(vector)


class AbstractStationaryManifold(AbstractManifold):
    """A manifold whose constraint is the gradient of its loss, which vanishes at saddles too.

    Searches that end on it therefore look at the Hessian, and fail at a saddle with
    `RESULTS.not_a_minimum`. `MinimizerManifold` is one.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> valley = mf.MinimizerManifold(mf.FunctionLoss(lambda x: x[0] ** 2), rank=1)
        >>> isinstance(valley, mf.manifolds.AbstractStationaryManifold)
        True
        >>> print(valley.constraint(jnp.array([3.0, 1.0])))
        [6. 0.]
    """
