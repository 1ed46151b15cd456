"""The same Gaussian noise on every coordinate."""

from typing import Any

import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise._base import AbstractShortNoise
from manifoldflow.noise._short_limit import log_determinant, ShortLimit


class IsotropicNoise(AbstractShortNoise):
    """The same Gaussian noise on every coordinate: ∇L + std·ξ, with the covariance std²·I.

    Args:
        std: standard deviation of every coordinate of the gradient, ≥ 0.

    Raises:
        ValueError: a negative std.

    References:
        [LiWangArora2022, Corollary 5.1].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: jnp.sum(x**2))
        >>> print(mf.IsotropicNoise(std=0.5).covariance(loss, jnp.ones(2)).as_matrix())
        [[0.25 0.  ]
         [0.   0.25]]
    """

    std: Scalar

    @checked
    def __init__(self, std: Any = 1.0):
        self.std = checked_nonnegative("IsotropicNoise: std", std, "It is a standard deviation.")

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        gradient = loss.gradient(point)
        drawn = _tree.random_normal_like(key, gradient)
        return _tree.add(gradient, _tree.scale(self.std, drawn))

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        coordinates, _ = loss.split(point)
        # A factor in float64 would promote the products of a point in float32.
        std = self.std.astype(_tree.dtype_of(coordinates))
        return std * lx.IdentityLinearOperator(_tree.structure_of(coordinates))

    def short_limit(self, loss: AbstractLoss) -> ShortLimit:
        """The short form −(std²/4) P∇ln|∇²L|₊, beside a Brownian motion of speed std²."""
        del loss
        return ShortLimit(log_determinant, self.std**2 / 4, is_ode=False)
