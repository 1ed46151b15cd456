"""What noise is: a sampler of stochastic gradients, and the covariance they have."""

import abc

import equinox as eqx
import lineax as lx

from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss


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


class AbstractDataNoise(AbstractNoise):
    """Noise of the data: which examples are in the batch, and which labels they have."""

    @abc.abstractmethod
    def checked(self, loss: AbstractLoss) -> AbstractExampleLoss:
        """The loss, if this noise can act on it; else a ValueError that says why not."""

    @abc.abstractmethod
    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The c with Σ = c·∇²L everywhere on the zero-loss manifold.

        None where there is none. Which of both it is depends on types, never on values.
        """
