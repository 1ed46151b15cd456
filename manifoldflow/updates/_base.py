"""The base class of updates: the transform of an optimiser, its clock and its slow drift."""

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import optax
from jaxtyping import Array, Float

from manifoldflow._clock import AbstractClock
from manifoldflow._types import Coordinates, Scalar, Tangent


@runtime_checkable
class LocalHessian(Protocol):
    """The Hessian ∇²L at a point of the manifold, as updates may ask for it."""

    def hessian_trace(self) -> Scalar: ...

    def hessian_eigenvalues(self) -> Float[Array, " n"]: ...


class AbstractUpdate(eqx.Module):
    """An optimiser as a value: `simulate` runs it, `LimitDiffusion` takes its limit.

    One step with the learning rate η and the stochastic gradient g is

        θ ← θ − η(F(θ) + noise) + η²G(θ),

    where F vanishes on the zero-loss manifold and G is slow: weight decay, say. A subclass defines
    `clock`, `transform` and `slow_drift`.

    Examples:
        >>> import manifoldflow as mf
        >>> import optax
        >>> class PlainSGD(mf.updates.AbstractUpdate):
        ...     @property
        ...     def clock(self):
        ...         return mf.LimitClock()
        ...
        ...     def transform(self, learning_rate):
        ...         return optax.sgd(learning_rate)
        ...
        ...     def slow_drift(self, coordinates):
        ...         return None
        >>> PlainSGD().clock.num_steps(learning_rate=0.1, end_time=1.0)
        100
    """

    @property
    @abc.abstractmethod
    def clock(self) -> AbstractClock:
        """The clock of the limit."""

    @abc.abstractmethod
    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        """The Optax transform of the update, for a learning rate or a schedule step ↦ η."""

    @abc.abstractmethod
    def slow_drift(self, coordinates: Coordinates) -> Tangent | None:
        """The slow drift G per unit of the clock, None where there is none."""


def sgd_of(fn: Callable[[Tangent], Tangent], learning_rate: Any) -> optax.GradientTransformation:
    """SGD on a function of the gradient."""
    return optax.chain(optax.stateless(lambda gradient, _: fn(gradient)), optax.sgd(learning_rate))
