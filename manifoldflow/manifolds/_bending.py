"""The second derivatives of a constraint at one point: all that curvature is made of; traces."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._results import RESULTS
from manifoldflow._types import Coordinates, Key, Point, Tangent
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._normal_space import AbstractNormalSpace, Constraint


class Bending(eqx.Module):
    """How a manifold {f = 0} bends in the space around it, at a point."""

    manifold: AbstractManifold
    coordinates: Coordinates
    remainder: Point
    space: AbstractNormalSpace

    def constraint(self, x: Coordinates) -> Constraint:
        return self.manifold.constraint(_tree.join(x, self.remainder))

    def second_derivative(self, u: Tangent, w: Tangent) -> Constraint:
        """D²f[u, w]."""

        def along(x: Coordinates) -> Constraint:
            return jax.jvp(self.constraint, (x,), (u,))[1]

        return jax.jvp(along, (self.coordinates,), (w,))[1]

    def form(self, u: Tangent, w: Tangent) -> Tangent:
        """II(u, w) = −J†D²f[u, w], for tangent u and w."""
        lifted = self.space.pseudo_inverse(self.second_derivative(u, w))
        return _tree.scale(-1, lifted)

    def trace(self, factor: lx.AbstractLinearOperator) -> Tangent:
        """Σᵣ II(Pfᵣ, Pfᵣ) over the columns fᵣ of an operator to tangents: tr II for the identity.

        One second directional derivative of the constraint for each column.
        """
        structure = _tree.structure_of(self.coordinates)
        projection = lx.FunctionLinearOperator(self.space.tangent, structure, lx.symmetric_tag)
        columns = projection @ factor
        total = linalg.second_derivative_sum(self.constraint, self.coordinates, columns, columns)
        return _tree.scale(-1, self.space.pseudo_inverse(total))

    def turn(self, multipliers: Constraint, vector: Tangent) -> Tangent:
        """∇²(λ·f) v."""

        def gradient(x: Coordinates) -> Tangent:
            return jax.vjp(self.constraint, x)[1](multipliers)[0]

        return jax.jvp(gradient, (self.coordinates,), (vector,))[1]

    def tangent(self, vector: Any) -> Tangent:
        """P v, of a vector that is checked."""
        return self.space.tangent(_tree.as_tangent(self.coordinates, vector))


def bending(manifold: AbstractManifold, point: Point) -> Bending:
    """The bending at a point, or an error where there is no normal space to bend towards."""
    coordinates, remainder = manifold.split(point)
    space = manifold.normal_space(point)
    size = space.largest_eigenvalue_bound()
    result = RESULTS.where(jnp.isfinite(size), RESULTS.rank_zero, RESULTS.nonfinite)
    is_bad: Array = ~(size > 0) | ~jnp.isfinite(size)
    # Where f is quadratic the coordinates do not matter, and a check of them would be dropped.
    coordinates, space = result.error_if((coordinates, space), is_bad)
    return Bending(manifold, coordinates, remainder, space)


@checked
def bending_along(
    manifold: AbstractManifold, point: Point, space: AbstractNormalSpace | None = None
) -> Bending:
    """As `bending`, without an error, and with the normal space if that is known.

    For the inside of loops, which may pass where rank is lost.
    """
    coordinates, remainder = manifold.split(point)
    space = manifold.normal_space(point) if space is None else space
    return Bending(manifold, coordinates, remainder, space)


def sum_over_tangents(
    space: AbstractNormalSpace,
    coordinates: Coordinates,
    term: Callable[[Tangent], PyTree[Array]],
    key: Key | None,
    num_samples: int,
) -> Any:
    """Σ term(eᵢ) over an orthonormal basis of the tangent space, for a quadratic form.

    Equal to the sum over the projected unit vectors of the whole space, which need no
    basis; and to the expectation over standard normal tangents.
    """
    if key is not None:

        def sample(key: Key) -> PyTree[Array]:
            return term(space.tangent(_tree.random_normal_like(key, coordinates)))

        return linalg.estimate(sample, key, num_samples)
    identity = lx.IdentityLinearOperator(_tree.structure_of(coordinates))

    def projected(index: Int[Array, ""]) -> PyTree[Array]:
        return term(space.tangent(linalg.column(identity, index)))

    size = _tree.size(coordinates)
    return linalg.sum_terms(projected, size, max(1, 2**16 // size))
