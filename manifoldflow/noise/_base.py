"""Base classes of noise: samplers of stochastic gradients, and their covariance."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import described, shapes_of
from manifoldflow._signatures import shown
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss
from manifoldflow.noise._short_limit import hessian_trace, ShortLimit


class AbstractStochasticGradient(eqx.Module):
    """A source of stochastic gradients for SGD; a value that holds no loss.

    A subclass defines `gradient`; `simulate` needs no more.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> class Deterministic(mf.noise.AbstractStochasticGradient):
        ...     def gradient(self, loss, point, key):
        ...         return loss.gradient(point)
        >>> loss = mf.FunctionLoss(lambda x: jnp.sum(x**2))
        >>> print(Deterministic().gradient(loss, jnp.ones(2), jr.key(0)))
        [2. 2.]
    """

    @abc.abstractmethod
    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        """An unbiased stochastic gradient of the loss."""


class AbstractNoise(AbstractStochasticGradient):
    """A stochastic gradient whose covariance is known, as flows need it.

    A subclass defines `gradient` and `factor`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> noise = mf.IsotropicNoise(std=2.0)
        >>> isinstance(noise, mf.AbstractNoise)
        True
        >>> loss = mf.FunctionLoss(lambda x: jnp.sum(x**2))
        >>> print(noise.covariance(loss, jnp.ones(2)).as_matrix())
        [[4. 0.]
         [0. 4.]]
    """

    @abc.abstractmethod
    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The factor F, from the noise space to tangents; F Fᵀ is the gradient's covariance."""

    def checked_factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The result of `factor`, where it is an operator to tangents.

        Raises:
            ValueError: it is no operator, or one to another space.
        """
        factor, name = self.factor(loss, point), type(self).__name__
        # Before others compose it: lineax would name classes of its own, and not this noise.
        if not isinstance(factor, lx.AbstractLinearOperator):
            raise ValueError(
                f"{name}.factor must return a lineax operator to tangents; got "
                f"{described(factor)}. Give the columns of F to "
                "linalg.factor_operator(loss.split(point)[0], columns)."
            )
        tangents, given = _tree.structure_of(loss.split(point)[0]), factor.out_structure()
        shapes = lambda tree: (jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)])
        if shapes(tangents) != shapes(given):
            raise ValueError(
                f"{name}.factor must return an operator to tangents, which are like the point's "
                f"coordinates {shapes_of(tangents)}; it maps to {shapes_of(given)}. A factor takes "
                "the numbers of the noise: transpose it, or unravel its values."
            )
        return factor

    def covariance(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The covariance Σ(point) = F Fᵀ, a self-adjoint lineax operator on tangents."""
        factor = self.checked_factor(loss, point)
        # lineax does not see by itself that F Fᵀ is symmetric.
        return lx.TaggedLinearOperator(factor @ factor.T, lx.positive_semidefinite_tag)


class AbstractShortNoise(AbstractNoise):
    """A noise for which `LimitDiffusion` has a short form on the minimisers of some losses.

    A subclass defines `short_limit`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> noise = mf.IsotropicNoise(std=2.0)
        >>> isinstance(noise, mf.noise.AbstractShortNoise)
        True
        >>> limit = noise.short_limit(mf.FunctionLoss(lambda x: jnp.sum(x**2)))
        >>> print(limit.potential.__name__, limit.rate)  # −(std²/4) P∇ln|∇²L|₊
        log_determinant 1.0
    """

    @abc.abstractmethod
    def short_limit(self, loss: AbstractLoss) -> ShortLimit | None:
        """The short form on the minimisers of this loss, None where it has none; by types alone."""


class AbstractDataNoise(AbstractShortNoise):
    """Noise of the data: of the choice of the examples in a batch, and of their labels.

    A subclass defines `checked` and `hessian_multiple`, the c with Σ = c·∇²L.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> noise = mf.LabelNoise(std=1.0, batch_size=1)
        >>> isinstance(noise, mf.noise.AbstractDataNoise)
        True
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> print(noise.hessian_multiple(loss))
        1.0
    """

    @abc.abstractmethod
    def checked(self, loss: AbstractLoss) -> AbstractExampleLoss:
        """The loss, if this noise can act on it; else a ValueError that says why not."""

    @abc.abstractmethod
    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The c with Σ = c·∇²L everywhere on the zero-loss manifold, else None; by types alone."""

    def short_limit(self, loss: AbstractLoss) -> ShortLimit | None:
        """The short form Y' = −(c/4) P∇tr∇²L where Σ = c·∇²L, else None.

        It follows from −P∂²(∇L)[𝓛_H⁻¹(cH)]/2 and 𝓛_H⁻¹(H) = P⊥/2.
        """
        multiple = self.hessian_multiple(self.checked(loss))
        if multiple is None:
            return None
        return ShortLimit(hessian_trace, multiple / 4, is_ode=True, at_zero_loss=True)


class Batch(NamedTuple):
    """The batch of a step: the number of its examples, and the noise of their labels.

    Attributes:
        size: B.
        is_full: True if all examples are in it, each once.
        label_std: the standard deviation of Gaussian noise on every target, None where the labels
            are as they are.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> mf.MinibatchNoise(1).batch(loss)
        Batch(size=1, is_full=False, label_std=None)
    """

    size: int
    is_full: bool
    label_std: Scalar | None


class AbstractBatchNoise(AbstractDataNoise):
    """Noise of the data with a known batch, for limits of other optimisers than SGD.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> noise = mf.MinibatchNoise(2)
        >>> isinstance(noise, mf.noise.AbstractBatchNoise), noise.batch(loss).is_full
        (True, True)
    """

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

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> limit = mf.noise.short_limit(mf.LabelNoise(std=1.0), loss)
        >>> print(limit.potential.__name__, limit.rate, limit.is_ode)
        hessian_trace 0.125 True
    """
    return noise.short_limit(loss) if isinstance(noise, AbstractShortNoise) else None


@shown
def checked_noise(name: str, noise: Any) -> AbstractNoise:
    """The noise itself, if it has a covariance; an error that names `name` if not.

    Args:
        name: the flow or function that needs the noise, for the message.
        noise: the argument of the user.

    Returns:
        `noise`.

    Raises:
        ValueError: something else, such as a stochastic gradient that is known by samples only.

    Examples:
        >>> import manifoldflow as mf
        >>> mf.noise.checked_noise("MyFlow", "label noise")
        Traceback (most recent call last):
        ...
        ValueError: MyFlow needs a noise, e.g. LabelNoise(std=1.0) or IsotropicNoise(); got ...
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
