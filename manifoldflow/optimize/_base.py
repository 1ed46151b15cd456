"""Base classes of methods of minimisation, and the problem as methods see it.

To add a method, write one small file with a subclass of `AbstractMethod`: its memory (`init`),
its attempt to get from one point of the manifold to the next (`step`), and the number of steps
that it may go on without progress (`patience`). Everything else, from the start to the
`Solution`, is done by `minimize`.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._results import RESULTS
from manifoldflow._types import Coordinates, Flag, Point, Scalar, Tangent
from manifoldflow.manifolds import (
    AbstractManifold,
    AbstractNormalSpace,
    AbstractRetraction,
)


class Iterate(eqx.Module):
    """A point of the manifold, and the function there to first order.

    Attributes:
        coordinates: of the point.
        value: F.
        slope: ∇F, in the space around the manifold.
        gradient: P∇F, along the manifold.
        space: the normal space, whose `tangent` is P.
        gradient_norm: ‖P∇F‖, zero at a stationary point.
        slope_norm: ‖∇F‖.
        is_finite: True if F and its gradients are finite numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> problem = mf.optimize.Problem(circle, lambda x: x[1], None)
        >>> iterate = problem.at(jnp.array([0.6, 0.8]))
        >>> print(iterate.value, iterate.gradient.round(2), iterate.gradient_norm.round(2))
        0.8 [-0.48  0.36] 0.6
    """

    coordinates: Coordinates
    value: Scalar
    slope: Tangent
    gradient: Tangent
    space: AbstractNormalSpace
    gradient_norm: Scalar
    slope_norm: Scalar
    is_finite: Flag

    def __init__(
        self,
        coordinates: Coordinates,
        value: Scalar,
        slope: Tangent,
        gradient: Tangent,
        space: AbstractNormalSpace,
    ):
        self.coordinates, self.value, self.space = coordinates, value, space
        self.slope, self.gradient = slope, gradient
        self.slope_norm, self.gradient_norm = _tree.norm(slope), _tree.norm(gradient)
        self.is_finite = jnp.isfinite(value) & jnp.isfinite(self.gradient_norm)


def _count(number: Any) -> Int[Array, ""]:
    return jnp.asarray(number, int)


class Work(eqx.Module):
    """The work spent: gradients of F, products with its Hessian, factorisations.

    Args:
        num_gradients: evaluations of F with its gradient.
        num_hessian_products: products with its covariant Hessian.
        num_factorizations: Gram matrices or Hessians factorised.

    Examples:
        >>> import manifoldflow as mf
        >>> total = mf.optimize.Work(num_gradients=1) + mf.optimize.Work(num_gradients=2)
        >>> print(total.num_gradients, total.num_hessian_products)
        3 0
    """

    num_gradients: Int[Array, ""] = eqx.field(converter=_count, default=0)
    num_hessian_products: Int[Array, ""] = eqx.field(converter=_count, default=0)
    num_factorizations: Int[Array, ""] = eqx.field(converter=_count, default=0)

    def __add__(self, other: "Work") -> "Work":
        return jax.tree.map(jnp.add, self, other)


class Attempt(eqx.Module):
    """One attempt of a method to get on.

    Attributes:
        iterate: the present iterate; the one before, if the method did not get on.
        state: the memory of the method.
        is_accepted: True if it got on.
        result: `RESULTS.successful`, or why there is no point in trying again.
        work: the work spent.
        defect: the distance of the new point from the manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> problem = mf.optimize.Problem(circle, lambda x: x[1], None)
        >>> here = problem.at(jnp.array([0.6, 0.8]))
        >>> method = mf.RiemannianGradientDescent()
        >>> attempt = method.step(problem, here, method.init(problem, here))
        >>> print(attempt.is_accepted, attempt.iterate.value < here.value)
        True True
    """

    iterate: Iterate
    state: PyTree[Any]
    is_accepted: Flag
    result: RESULTS
    work: Work
    defect: Scalar


class Trial(eqx.Module):
    """A point that was tried, and a mark if it is on the manifold with a finite F."""

    iterate: Iterate
    is_fine: Flag
    result: RESULTS
    work: Work
    defect: Scalar


class Hessian(eqx.Module):
    """The map v ↦ P(∇²F − Σλᵢ∇²fᵢ)v for tangent v, at one point, and the normal space there."""

    space: AbstractNormalSpace
    product: Callable[[Tangent], Tangent]

    def __call__(self, vector: Tangent) -> Tangent:
        return self.space.tangent(self.product(vector))


class Problem(eqx.Module):
    """A function on a manifold, as methods see it.

    Args:
        manifold: the manifold.
        fn: F, point → scalar.
        remainder: the part of points that does not move.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> problem = mf.optimize.Problem(circle, lambda x: x[1], None)
        >>> top = problem.at(jnp.array([0.0, 1.0]))
        >>> print(problem.hessian(top)(jnp.array([1.0, 0.0])).round(3) + 0.0)
        [-1.  0.]
    """

    manifold: AbstractManifold
    fn: Callable[..., Any]
    remainder: Point

    def point(self, coordinates: Coordinates) -> Point:
        """The user's object with these coordinates."""
        return _tree.join(coordinates, self.remainder)

    def value(self, coordinates: Coordinates) -> Scalar:
        """The value of F, in the precision of the point."""
        return jnp.asarray(self.fn(self.point(coordinates)), _tree.dtype_of(coordinates))

    def normal_space(self, coordinates: Coordinates) -> AbstractNormalSpace:
        """The normal space, whose `tangent` is the projection P there; one factorisation."""
        return self.manifold.normal_space(self.point(coordinates))

    def at(self, coordinates: Coordinates) -> Iterate:
        """The iterate at a point: F and its gradients; one gradient and one factorisation."""
        value, slope = jax.value_and_grad(self.value)(coordinates)
        space = self.normal_space(coordinates)
        return Iterate(coordinates, value, slope, space.tangent(slope), space)

    def moved(self, retraction: AbstractRetraction, iterate: Iterate, vector: Tangent) -> Trial:
        """The trial of the point that is reached along a tangent vector."""
        here = iterate.coordinates
        landed, info = retraction.with_info(
            self.manifold, self.point(here), vector, space=iterate.space
        )
        is_on = info.is_successful
        # Where nothing was reached, evaluate at a point that is known to be harmless.
        trial = self.at(_tree.where(is_on, self.manifold.split(landed)[0], here))
        is_fine = is_on & trial.is_finite
        result = _tree.where(is_on, RESULTS.nonfinite, RESULTS.not_on_manifold)
        return Trial(
            trial,
            is_fine,
            _tree.where(is_fine, RESULTS.successful, result),
            # The one at the new point, for that at the start, which was there.
            Work(num_gradients=1, num_factorizations=info.num_factorizations),
            _tree.where(is_fine, info.defect, 0),
        )

    def hessian(self, iterate: Iterate) -> "Hessian":
        """The `covariant_hessian`, made for many products.

        It is the Hessian of the Lagrangian F − λ·f, with the λ of ∇F at this point, linearised
        once; and without errors where there is no normal space.
        """
        multipliers = iterate.space.multipliers(iterate.slope)

        def lagrangian(x: Coordinates) -> Scalar:
            return self.value(x) - _tree.inner(multipliers, self.manifold.constraint(self.point(x)))

        # λ is held fixed: its change along a tangent multiplies ∇f, which is normal and drops out
        # under P.
        _, product = jax.linearize(jax.grad(lagrangian), iterate.coordinates)
        return Hessian(iterate.space, product)


class AbstractMethod(eqx.Module):
    """A method of descent along a manifold, one attempt after the other.

    A subclass defines `init`, `step` and `patience`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow.optimize import AbstractMethod, Attempt
        >>> class FixedSteps(AbstractMethod):
        ...     patience = 10
        ...
        ...     def init(self, problem, iterate):
        ...         return None
        ...
        ...     def step(self, problem, iterate, state):
        ...         trial = problem.moved(mf.NewtonRetraction(), iterate, -0.5 * iterate.gradient)
        ...         ends = trial.is_fine, trial.result, trial.work, trial.defect
        ...         return Attempt(trial.iterate, state, *ends)
        >>> circle, start = mf.models.Sphere(1).manifold, jnp.array([1.0, 0.0])
        >>> found = mf.minimize(circle, lambda x: x[1], start, method=FixedSteps())
        >>> print(found.final.round(3) + 0.0)
        [ 0. -1.]
    """

    @property
    @abc.abstractmethod
    def patience(self) -> int:
        """The number of idle steps in a row after which the method has stalled.

        An idle step neither lowers the gradient nor changes F by more than its rounding errors.
        """

    @abc.abstractmethod
    def init(self, problem: Problem, iterate: Iterate) -> PyTree[Any]:
        """The memory of the method at the start: arrays, whose shapes do not change."""

    @abc.abstractmethod
    def step(self, problem: Problem, iterate: Iterate, state: PyTree[Any]) -> Attempt:
        """One attempt, e.g. along a tangent chosen here, by `problem.moved`."""


def value_rounding(before: Iterate, after: Iterate) -> Scalar:
    """A lower bound of the rounding error of a difference of two values of F."""
    eps = _tree.eps_of(before.coordinates)
    return eps * jnp.maximum(jnp.abs(before.value), jnp.abs(after.value))


def shortest_step(iterate: Iterate) -> Scalar:
    """The length of steps that are lost in the rounding of the coordinates."""
    return _tree.eps_of(iterate.coordinates) * _tree.norm(iterate.coordinates)


def usual_step(iterate: Iterate) -> Scalar:
    """A first guess of the length of a step: an eighth of the length of the point."""
    size = _tree.norm(iterate.coordinates)
    return _tree.where(size > 0, size, 1) / 8
