"""Objectives that a walk lowers: a number at every point, for the loss whose outputs are kept."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from manifoldflow import _tree, linalg
from manifoldflow._errors import described
from manifoldflow._types import Point, Scalar
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss


class AbstractObjective(eqx.Module):
    """A quantity that `walk` lowers. A subclass says what it is, and its name in tables.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> class LargestWeight(mf.walks.AbstractObjective):
        ...     name = property(lambda self: "largest weight")
        ...
        ...     def __call__(self, loss, point):
        ...         return jnp.max(jnp.abs(point))
        >>> loss = mf.FunctionLoss(lambda w: (w[0] * w[1] - 1) ** 2)
        >>> print(LargestWeight()(loss, jnp.array([2.0, 0.5])))
        2.0
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A few words for tables and pictures."""

    @abc.abstractmethod
    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        """Its value at a point, a scalar with derivatives in the point."""


class Flatness(AbstractObjective):
    """tr G, the trace of the Gauss-Newton matrix: equal to tr ∇²L where the loss is zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: w @ x)
        >>> print(mf.walks.Flatness()(loss, jnp.ones(2)))
        1.0
    """

    @property
    def name(self) -> str:
        return "trace of G"

    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        return with_examples(self, loss).trace_gauss_newton(point)


class LargestEigenvalue(AbstractObjective):
    """λ₁(G), the largest eigenvalue of the Gauss-Newton matrix.

    It has one derivative, ⟨v, ∂G v⟩ with the top eigenvector v. Where two eigenvalues cross, that
    is the derivative of one of the branches. Walk down by a method of first order.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: w @ x)
        >>> print(f"{mf.walks.LargestEigenvalue()(loss, jnp.ones(2)):.3f}")
        0.500
    """

    @property
    def name(self) -> str:
        return "largest eigenvalue of G"

    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        # AAᵀ has the eigenvalues of AᵀA = G, on vectors of n numbers in place of D.
        root = with_examples(self, loss).gauss_newton_root(point)
        gram = lx.FunctionLinearOperator(
            lambda v: root.mv(root.transpose_mv(v)), root.out_structure(), lx.symmetric_tag
        )
        return linalg.largest_eigenvalues(gram).values[0]


class WeightNorm(AbstractObjective):
    """½‖θ‖², over the leaves of the point that may move.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda w: (w[0] * w[1] - 1) ** 2)
        >>> print(mf.walks.WeightNorm()(loss, jnp.array([3.0, 4.0])))
        12.5
    """

    @property
    def name(self) -> str:
        return "half squared weight norm"

    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        coordinates, _ = loss.split(point)
        return _tree.inner(coordinates, coordinates) / 2


class _OfFunction(AbstractObjective):
    """Any function of the point."""

    fn: Callable[..., Any]

    @property
    def name(self) -> str:
        return "objective"

    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        return jnp.asarray(self.fn(point))


_NAMED = {
    "flatness": Flatness,
    "largest_eigenvalue": LargestEigenvalue,
    "weight_norm": WeightNorm,
}


def objective_of(given: Any) -> AbstractObjective:
    """The objective that a user names, hands over or writes as a function of the point."""
    if isinstance(given, AbstractObjective):
        return given
    if isinstance(given, str) and given in _NAMED:
        return _NAMED[given]()
    if isinstance(given, type) or not callable(given):
        names = ", ".join(map(repr, _NAMED))
        raise ValueError(
            f"walk: objective must be one of {names}, walks.Rounding(bits), or a function of the "
            f"point; got {described(given)}."
        )
    return _OfFunction(_tree.as_pytree_callable(given))


def with_examples(
    objective: AbstractObjective, loss: AbstractLoss
) -> AbstractResidualLoss | AbstractExampleLoss:
    """The loss, if it has a Gauss-Newton matrix."""
    if not isinstance(loss, AbstractResidualLoss | AbstractExampleLoss):
        raise ValueError(
            f"The {objective.name} needs a loss over examples, e.g. LeastSquares or "
            f"PerExampleLoss; got {type(loss).__name__}, which has no Gauss-Newton matrix. Lower a "
            "function of the point in its place."
        )
    return loss
