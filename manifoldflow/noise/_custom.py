"""Noise of any covariance, given by its factor."""

from collections.abc import Callable
from typing import Any

import jax
import lineax as lx

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import shapes_of
from manifoldflow._types import Key, Point, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise._base import AbstractNoise


class CustomNoise(AbstractNoise):
    """∇L + F(θ)ξ with ξ standard normal in r dimensions; covariance F(θ)F(θ)ᵀ.

    Args:
        factor_fn: point → F as a PyTree like the point, every array with one more, trailing
            axis of r noise columns; or as a lineax operator to tangents, which may take any
            PyTree. Values that it merely closes over are constants to JAX; to change or
            differentiate them, hand them over in `jax.tree_util.Partial` or a module.

    Raises:
        ValueError: when used, if F does not have the shapes of the point's coordinates.
    """

    factor_fn: Callable[..., Any]

    @checked_but("factor_fn")
    def __init__(self, factor_fn: Callable[[Point], Any]):
        if not callable(factor_fn):
            raise ValueError(
                "CustomNoise needs a function point → F, a PyTree like the point with a "
                f"trailing axis of noise columns; got {type(factor_fn).__name__}. For a constant "
                "F use lambda point: F."
            )
        self.factor_fn = _tree.as_pytree_callable(factor_fn)

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        factor = self.factor(loss, point)
        drawn = _tree.random_normal_like(key, factor.in_structure())
        return _tree.add(loss.gradient(point), factor.mv(drawn))

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        coordinates, _ = loss.split(point)
        factor = self.factor_fn(point)
        if not isinstance(factor, lx.AbstractLinearOperator):
            return linalg.factor_operator(coordinates, factor)
        tangents, given = _tree.structure_of(coordinates), factor.out_structure()
        same = jax.tree.leaves(tangents) == jax.tree.leaves(given)
        if not same or jax.tree.structure(tangents) != jax.tree.structure(given):
            raise ValueError(
                "CustomNoise: the operator from factor_fn must map to tangents, which are like "
                f"the point's coordinates {shapes_of(tangents)}; it maps to {shapes_of(given)}."
            )
        return factor
