"""What Φ, the limit map of gradient flow, does to second order around its manifold."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import shapes_of
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.manifolds._base import AbstractManifold
from manifoldflow.manifolds._level_set import LevelSet, ZeroLossManifold
from manifoldflow.manifolds._second_derivative import (
    AbstractSecondDerivative,
    Covariance,
    Factor,
    NormalFactor,
    second_derivative_of,
)


@checked
def limit_map_derivative(manifold: AbstractManifold, point: Point, vector: Tangent) -> Tangent:
    """∂Φ(point)[v] = P v on the manifold.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold. Off it, differentiate `limit_map`.
        vector: with the structure of the point's coordinates.

    References:
        [LiWangArora2022, Lemma 4.3].
    """
    return manifold.tangent_projection(point, vector)


@checked
@eqx.filter_jit
def limit_map_second_derivative(
    manifold: AbstractManifold,
    point: Point,
    covariance: lx.AbstractLinearOperator | PyTree[Array],
    *,
    is_factor: bool | None = None,
) -> Tangent:
    """∂²Φ(point)[Σ] = Σⱼₖ ∂ⱼ∂ₖΦ·Σⱼₖ on the manifold.

    Half of it is the drift of the limiting diffusion of SGD whose gradient noise has the
    covariance Σ.

    Costs, for a manifold of n residuals: a factor with r columns takes r Hessian-vector
    products and r second directional derivatives of the residuals over all data; a
    covariance takes n and D of them. `MinimizerManifold` takes D×D matrices.

    Args:
        manifold: the minimisers of the loss whose gradient flow defines Φ.
        point: a point of the manifold; off it, the formula is evaluated where it stands.
        covariance: Σ as a lineax operator on tangents, of which the symmetric part counts;
            or a factor F with Σ = F Fᵀ: an operator from another space to tangents, or a
            PyTree like the point whose arrays have a trailing axis of noise columns.
        is_factor: whether an operator is F; by default, it is if it does not act on
            tangents. An operator on tangents can be either, and counts as Σ.

    Returns:
        A tangent vector of the space of points, with parts along and across the manifold.

    Raises:
        ValueError: `covariance` is neither.

    Assumes:
        The Hessian has constant rank on the manifold, as `manifold.rank` measures it.

    References:
        [LiWangArora2022, Lemma 4.5].
    """
    parts = limit_map_second_derivative_parts(manifold, point, covariance, is_factor=is_factor)
    return parts.total()


@checked
def limit_map_second_derivative_parts(
    manifold: AbstractManifold,
    point: Point,
    covariance: lx.AbstractLinearOperator | PyTree[Array],
    *,
    is_factor: bool | None = None,
) -> AbstractSecondDerivative:
    """The parts of `limit_map_second_derivative`, each computed when it is asked for."""
    coordinates, _ = manifold.split(point)
    return second_derivative_of(manifold, point, _as_sigma(coordinates, covariance, is_factor))


@checked
def normal_second_derivative_parts(
    manifold: LevelSet | ZeroLossManifold, point: Point, residual_factor: lx.AbstractLinearOperator
) -> AbstractSecondDerivative:
    """The parts of ∂²Φ[F Fᵀ] for F = JᵀG, noise that acts through the manifold's residuals.

    All but the normal part vanish, and that needs nothing but n×n matrices.

    Args:
        manifold: the zero set of residuals with the Jacobian J.
        point: a point of the manifold.
        residual_factor: G, from any space to Rⁿ.
    """
    return second_derivative_of(manifold, point, NormalFactor(residual_factor))


def _as_sigma(coordinates: Coordinates, given: Any, is_factor: bool | None) -> Covariance | Factor:
    tangents = _tree.structure_of(coordinates)
    if not isinstance(given, lx.AbstractLinearOperator):
        _refuse_square(tangents, given)
        return Factor(linalg.factor_operator(coordinates, given))
    if not _have_shapes(given.out_structure(), tangents):
        raise ValueError(
            "The covariance must be an operator to tangents, which are like the point's "
            f"coordinates {shapes_of(tangents)}; this one maps to "
            f"{shapes_of(given.out_structure())}."
        )
    acts_on_tangents = _have_shapes(given.in_structure(), tangents)
    if is_factor is False and not acts_on_tangents:
        raise ValueError(
            "A covariance acts on tangents, which are like the point's coordinates "
            f"{shapes_of(tangents)}; this operator takes {shapes_of(given.in_structure())}. "
            "Leave out is_factor=False if it is a factor F of Σ = F Fᵀ."
        )
    if is_factor or not acts_on_tangents:
        return Factor(_cast(given, given.in_structure(), tangents))
    symmetric = given if lx.is_symmetric(given) else (given + given.T) / 2
    return Covariance(_cast(symmetric, tangents, tangents))


def _cast(
    operator: lx.AbstractLinearOperator, inputs: PyTree[Any], outputs: PyTree[Any]
) -> lx.AbstractLinearOperator:
    """The operator between spaces of these dtypes, for data in another precision."""
    given = operator.in_structure(), operator.out_structure()
    if _dtypes(given) == _dtypes((inputs, outputs)):
        return operator

    def cast(tree: PyTree[Array], like: PyTree[Any]) -> PyTree[Array]:
        return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)

    return lx.FunctionLinearOperator(
        lambda v: cast(operator.mv(cast(v, given[0])), outputs), inputs
    )


def _dtypes(tree: PyTree[Any]) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _refuse_square(tangents: PyTree[Any], given: PyTree[Any]) -> None:
    leaves, like = jax.tree.leaves(given), jax.tree.leaves(tangents)
    if len(leaves) == len(like) == 1 and jnp.shape(leaves[0]) == (math.prod(like[0].shape),) * 2:
        raise ValueError(
            f"A plain square array {jnp.shape(leaves[0])} can be a covariance or a factor. Hand "
            "over lineax.MatrixLinearOperator(array), for a factor with is_factor=True."
        )


def _have_shapes(structure: PyTree[Any], like: PyTree[Any]) -> bool:
    shapes = lambda tree: (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
    return shapes(structure) == shapes(like)
