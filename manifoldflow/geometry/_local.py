"""The local geometry at a point, as its users get it: checked; and sums over its tangents."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._results import RESULTS
from manifoldflow._types import Key, Point, Tangent
from manifoldflow.manifolds import AbstractLocalGeometry, AbstractManifold


def checked_local(manifold: AbstractManifold, point: Point) -> AbstractLocalGeometry:
    """`manifold.local(point)`, or an error where there is no normal space to bend towards."""
    coordinates, remainder = manifold.split(point)
    space = manifold.normal_space(point)
    size = space.largest_eigenvalue_bound()
    result = _tree.where(jnp.isfinite(size), RESULTS.rank_zero, RESULTS.nonfinite)
    is_bad: Array = ~(size > 0) | ~jnp.isfinite(size)
    # Where f is quadratic the coordinates do not matter, and a check of them would be dropped.
    coordinates, space = result.error_if((coordinates, space), is_bad)
    return manifold.local(_tree.join(coordinates, remainder), space=space)


def tangent_of(local: AbstractLocalGeometry, vector: Any) -> Tangent:
    """P v, of a vector that is checked."""
    return local.space.tangent(_tree.as_tangent(local.coordinates, vector))


def sum_over_tangents(
    local: AbstractLocalGeometry,
    term: Callable[[Tangent], PyTree[Array]],
    key: Key | None,
    num_samples: int,
) -> Any:
    """Σ term(eᵢ) over an orthonormal basis of the tangent space, for a quadratic form.

    Equal to the sum over the projected unit vectors of the whole space, which need no
    basis; and to the expectation over standard normal tangents.
    """
    coordinates, space = local.coordinates, local.space
    if key is not None:

        def sample(key: Key) -> PyTree[Array]:
            return term(space.tangent(_tree.random_normal_like(key, coordinates)))

        return linalg.estimate(sample, key, num_samples)
    # Σ q(Peᵢ) over unit vectors of the whole space is tr PqP: no basis of the tangent space is
    # needed.
    identity = lx.IdentityLinearOperator(_tree.structure_of(coordinates))

    def projected(index: Int[Array, ""]) -> PyTree[Array]:
        return term(space.tangent(linalg.column(identity, index)))

    size = _tree.size(coordinates)
    # In chunks of some 2¹⁶ numbers: all D tangents at once would be D×D.
    return linalg.sum_terms(projected, size, max(1, 2**16 // size))
