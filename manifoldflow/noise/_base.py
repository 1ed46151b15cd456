"""What noise is: a sampler of stochastic gradients, and the covariance they have."""

import abc

import equinox as eqx
import lineax as lx

from manifoldflow._types import Key, Point, Tangent
from manifoldflow.losses import AbstractLoss


class AbstractNoise(eqx.Module):
    """One class, two faces. A noise is a value that holds no loss."""

    @abc.abstractmethod
    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        """An unbiased stochastic gradient of the loss."""

    @abc.abstractmethod
    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """F, from the noise space to tangents, with F Fᵀ the covariance of the gradient."""

    def covariance(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """Σ(point) = F Fᵀ, a self-adjoint lineax operator on tangents."""
        factor = self.factor(loss, point)
        return lx.TaggedLinearOperator(factor @ factor.T, lx.positive_semidefinite_tag)
