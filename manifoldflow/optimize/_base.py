"""What a method of minimisation is, and what it may ask of the problem.

To add a method, write one small file with a subclass of `AbstractMethod`: what it remembers
(`init`), how it tries to get from one point of the manifold to the next (`step`), and how
long it may go on without progress (`patience`). Everything else, from the start to the
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
        is_finite: whether F and its gradients are numbers.
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
    """What was spent: gradients of F, products with its Hessian, factorisations, each one."""

    num_gradients: Int[Array, ""] = eqx.field(converter=_count, default=0)
    num_hessian_products: Int[Array, ""] = eqx.field(converter=_count, default=0)
    num_factorizations: Int[Array, ""] = eqx.field(converter=_count, default=0)

    def __add__(self, other: "Work") -> "Work":
        return jax.tree.map(jnp.add, self, other)


class Attempt(eqx.Module):
    """How a method tried to get on.

    Attributes:
        iterate: where it stands now; where it stood before, if it did not get on.
        state: what it remembers.
        is_accepted: whether it got on.
        result: `RESULTS.successful`, or why there is no point in trying again.
        work: what was spent.
        defect: how far the new point is from the manifold.
    """

    iterate: Iterate
    state: PyTree[Any]
    is_accepted: Flag
    result: RESULTS
    work: Work
    defect: Scalar


class Trial(eqx.Module):
    """A point that was looked at, and whether it is one of the manifold with a finite F."""

    iterate: Iterate
    is_fine: Flag
    result: RESULTS
    work: Work
    defect: Scalar


class Hessian(eqx.Module):
    """v ↦ P(∇²F − Σλᵢ∇²fᵢ)v for tangent v, at one point, and the normal space there."""

    space: AbstractNormalSpace
    product: Callable[[Tangent], Tangent]

    def __call__(self, vector: Tangent) -> Tangent:
        return self.space.tangent(self.product(vector))


class Problem(eqx.Module):
    """A function on a manifold, as methods see it.

    Attributes:
        manifold: the manifold.
        fn: F, point → scalar.
        remainder: the part of points that does not move.
    """

    manifold: AbstractManifold
    fn: Callable[..., Any]
    remainder: Point

    def point(self, coordinates: Coordinates) -> Point:
        """The user's object with these coordinates."""
        return _tree.join(coordinates, self.remainder)

    def value(self, coordinates: Coordinates) -> Scalar:
        """F, in the precision of the point."""
        return jnp.asarray(self.fn(self.point(coordinates)), _tree.dtype_of(coordinates))

    def normal_space(self, coordinates: Coordinates) -> AbstractNormalSpace:
        """Whose `tangent` is the projection P there; one factorisation."""
        return self.manifold.normal_space(self.point(coordinates))

    def at(self, coordinates: Coordinates) -> Iterate:
        """F and its gradients at a point; one gradient and one factorisation."""
        value, slope = jax.value_and_grad(self.value)(coordinates)
        space = self.normal_space(coordinates)
        return Iterate(coordinates, value, slope, space.tangent(slope), space)

    def moved(self, retraction: AbstractRetraction, iterate: Iterate, vector: Tangent) -> Trial:
        """F and its gradients at the point that is reached along a tangent vector."""
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
        """`covariant_hessian`, made for many products.

        The Hessian of the Lagrangian F − λ·f, with the λ of ∇F at this point, linearised
        once; and without errors where there is no normal space.
        """
        multipliers = iterate.space.multipliers(iterate.slope)

        def lagrangian(x: Coordinates) -> Scalar:
            return self.value(x) - _tree.inner(multipliers, self.manifold.constraint(self.point(x)))

        _, product = jax.linearize(jax.grad(lagrangian), iterate.coordinates)
        return Hessian(iterate.space, product)


class AbstractMethod(eqx.Module):
    """A way to go down along a manifold, one attempt after the other."""

    @property
    @abc.abstractmethod
    def patience(self) -> int:
        """When the method has stalled: after so many steps in a row that neither lowered
        the gradient nor changed F by more than its rounding errors."""

    @abc.abstractmethod
    def init(self, problem: Problem, iterate: Iterate) -> PyTree[Any]:
        """What the method remembers at the start: arrays, whose shapes do not change."""

    @abc.abstractmethod
    def step(self, problem: Problem, iterate: Iterate, state: PyTree[Any]) -> Attempt:
        """One attempt, e.g. along a tangent chosen here, by `problem.moved`."""


def value_rounding(before: Iterate, after: Iterate) -> Scalar:
    """What a difference of two values of F may be wrong by, at the least."""
    eps = _tree.eps_of(before.coordinates)
    return eps * jnp.maximum(jnp.abs(before.value), jnp.abs(after.value))


def shortest_step(iterate: Iterate) -> Scalar:
    """A step of this length is lost in the rounding of the coordinates."""
    return _tree.eps_of(iterate.coordinates) * _tree.norm(iterate.coordinates)


def usual_step(iterate: Iterate) -> Scalar:
    """A first guess of how long a step should be: an eighth of the length of the point."""
    size = _tree.norm(iterate.coordinates)
    return _tree.where(size > 0, size, 1) / 8
