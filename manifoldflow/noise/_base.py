"""What noise is: a sampler of stochastic gradients, and the covariance that they have."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import lineax as lx

from manifoldflow._boundary import checked
from manifoldflow._errors import described
from manifoldflow._signatures import shown
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss
from manifoldflow.noise._short_limit import hessian_trace, ShortLimit


class AbstractStochasticGradient(eqx.Module):
    """What SGD draws its gradients from. It is a value that holds no loss."""

    @abc.abstractmethod
    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        """An unbiased stochastic gradient of the loss."""


class AbstractNoise(AbstractStochasticGradient):
    """A stochastic gradient whose covariance is known: what flows need."""

    @abc.abstractmethod
    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """F, from the noise space to tangents, with F Fᵀ the covariance of the gradient."""

    def covariance(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """Σ(point) = F Fᵀ, a self-adjoint lineax operator on tangents."""
        factor = self.factor(loss, point)
        return lx.TaggedLinearOperator(factor @ factor.T, lx.positive_semidefinite_tag)


class AbstractShortNoise(AbstractNoise):
    """A noise for which `LimitDiffusion` has a short form on the minimisers of some losses."""

    @abc.abstractmethod
    def short_limit(self, loss: AbstractLoss) -> ShortLimit | None:
        """The short form on the minimisers of this loss, None where there is none.

        Which of both it is depends on types, never on values.
        """


class AbstractDataNoise(AbstractShortNoise):
    """Noise of the data: which examples are in the batch, and which labels they have."""

    @abc.abstractmethod
    def checked(self, loss: AbstractLoss) -> AbstractExampleLoss:
        """The loss, if this noise can act on it; else a ValueError that says why not."""

    @abc.abstractmethod
    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The c with Σ = c·∇²L everywhere on the zero-loss manifold.

        None where there is none. Which of both it is depends on types, never on values.
        """

    def short_limit(self, loss: AbstractLoss) -> ShortLimit | None:
        """Y' = −(c/4) P∇tr∇²L where Σ = c·∇²L: −P∂²(∇L)[𝓛_H⁻¹(cH)]/2, and 𝓛_H⁻¹(H) = P⊥/2."""
        multiple = self.hessian_multiple(self.checked(loss))
        if multiple is None:
            return None
        return ShortLimit(hessian_trace, multiple / 4, is_ode=True, at_zero_loss=True)


class Batch(NamedTuple):
    """The batch of a step: how many examples, and how noisy their labels are.

    Attributes:
        size: B.
        is_full: whether all examples are in it, each once.
        label_std: of Gaussian noise on every target, None where the labels are as they are.
    """

    size: int
    is_full: bool
    label_std: Scalar | None


class AbstractBatchNoise(AbstractDataNoise):
    """Noise of the data that can say what a batch is, for limits of other optimisers than SGD."""

    @abc.abstractmethod
    def batch(self, loss: AbstractLoss) -> Batch | None:
        """The batch of a step; None where its gradients are not those of such labels."""


@checked
def short_limit(noise: AbstractNoise, loss: AbstractLoss) -> ShortLimit | None:
    """The short form that `LimitDiffusion` takes for a noise on a loss, if it has one.

    Args:
        noise: any noise.
        loss: the loss whose gradient it perturbs.

    Returns:
        The short form, or None: the limit is then the general diffusion.

    Raises:
        ValueError: a noise of data on a loss that it does not fit.
    """
    return noise.short_limit(loss) if isinstance(noise, AbstractShortNoise) else None


@shown
def checked_noise(name: str, noise: Any) -> AbstractNoise:
    """A noise with a covariance, for what is called `name`.

    Args:
        name: of the flow or function that needs it, for the message.
        noise: what the user gave.

    Raises:
        ValueError: something else, such as a stochastic gradient that is known by samples only.
    """
    if isinstance(noise, AbstractNoise):
        return noise
    if isinstance(noise, AbstractStochasticGradient):
        raise ValueError(
            f"{type(noise).__name__} has no covariance, which {name} needs: it is known by "
            "samples only. Draw a data set and use MinibatchNoise(B, replacement=True), or give "
            "the factor of the covariance to CustomNoise."
        )
    raise ValueError(
        f"{name} needs a noise, e.g. LabelNoise(std=1.0) or IsotropicNoise(); got "
        f"{described(noise)}."
    )
