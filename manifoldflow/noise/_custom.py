"""Noise of any covariance, given by its factor."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import shapes_of
from manifoldflow._types import Key, Point, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise._base import AbstractNoise
from manifoldflow.noise._draws import checked_distribution, drawn_like


class CustomNoise(AbstractNoise):
    """Noise of any covariance F(θ)F(θ)ᵀ: the gradient is ∇L + F(θ)ξ, ξ standard normal.

    The limit of SGD depends on the covariance alone. Other ξ of mean 0 and covariance I have it
    too: independent signs, or `distribution="columns"`, which picks one of the Ξ columns of F at
    every step and adds √Ξ times it. That is the noise of eq. (1) of the paper, whose columns have
    the sum 0. From other columns their mean is subtracted, in the gradient and in F.

    Args:
        factor_fn: point → F as a PyTree like the point, every array with one more, trailing
            axis of noise columns; or as a lineax operator to tangents, which may take any
            PyTree. Values that it merely closes over are constants to JAX; to change or
            differentiate them, hand them over in `jax.tree_util.Partial` or a module.
        distribution: of ξ: "normal", "rademacher" for independent signs ±1, or "columns".

    Raises:
        ValueError: another distribution; when used, if F does not have the shapes of the point's
            coordinates.

    References:
        [LiWangArora2022, eq. (1), Lemma 4.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> columns = jnp.array([[1.0, -0.5, -0.5], [0.0, 1.0, -1.0]])
        >>> noise = mf.CustomNoise(lambda point: columns, distribution="columns")
        >>> loss = mf.FunctionLoss(lambda x: jnp.sum(x**2))
        >>> print(noise.covariance(loss, jnp.zeros(2)).as_matrix().round(3) + 0.0)
        [[1.5 0. ]
         [0.  2. ]]
    """

    factor_fn: Callable[..., Any]
    distribution: str = eqx.field(static=True)

    @checked_but("factor_fn", "distribution")
    def __init__(self, factor_fn: Callable[[Point], Any], *, distribution: str = "normal"):
        if not callable(factor_fn):
            raise ValueError(
                "CustomNoise needs a function point → F, a PyTree like the point with a "
                f"trailing axis of noise columns; got {type(factor_fn).__name__}. For a constant "
                "F use lambda point: F."
            )
        self.factor_fn = _tree.as_pytree_callable(factor_fn)
        self.distribution = checked_distribution(
            "CustomNoise: distribution", distribution, "normal", "rademacher", "columns"
        )

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        factor = self.factor(loss, point)
        drawn = drawn_like(key, factor.in_structure(), self.distribution)
        return _tree.add(loss.gradient(point), factor.mv(drawn))

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        factor = self._given(loss, point)
        # Without its mean: √Ξ times a random column has the mean of all columns times √Ξ.
        return _centred(factor) if self.distribution == "columns" else factor

    def _given(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        coordinates, _ = loss.split(point)
        factor = self.factor_fn(point)
        if not isinstance(factor, lx.AbstractLinearOperator):
            return linalg.factor_operator(coordinates, factor)
        tangents, given = _tree.structure_of(coordinates), factor.out_structure()
        # Shapes and dtypes: lineax would compose operators that differ, and fail far from here.
        same = jax.tree.leaves(tangents) == jax.tree.leaves(given)
        if not same or jax.tree.structure(tangents) != jax.tree.structure(given):
            raise ValueError(
                "CustomNoise: the operator from factor_fn must map to tangents, which are like "
                f"the point's coordinates {shapes_of(tangents)}; it maps to {shapes_of(given)}."
            )
        return factor


def _centred(factor: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """The factor F less the mean of its columns: F(I − 11ᵀ/Ξ)."""

    def without_mean(u: PyTree[Array]) -> PyTree[Array]:
        flat, unravel = ravel_pytree(u)
        return unravel(flat - jnp.mean(flat))

    noise = factor.in_structure()
    return factor @ lx.FunctionLinearOperator(without_mean, noise, lx.symmetric_tag)
