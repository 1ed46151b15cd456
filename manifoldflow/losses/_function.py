"""Losses given as plain functions of a point."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.losses._base import AbstractLoss, AbstractResidualLoss


class FunctionLoss(AbstractLoss):
    """A loss that is any smooth function of a point, minimal on a manifold.

    It knows nothing of residuals or examples: `MinimizerManifold` is its manifold, and methods that
    need the Hessian build it densely, for up to a few thousand coordinates.

    Args:
        fn: maps a point to a scalar.
        trainable: says which leaves may move, as for `LeastSquares`.

    Raises:
        ValueError: when called, a value of `fn` that is no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: (x @ x - 1) ** 2)
        >>> print(loss.trace_hessian(jnp.array([1.0, 0.0])))
        8.0
    """

    fn: Callable[..., Any]
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked
    def __init__(self, fn: Callable[[Point], Any], *, trainable: PyTree[Any] | None = None):
        self.fn = _tree.as_pytree_callable(fn)
        self.trainable = None if trainable is None else _tree.Static(trainable)

    def __call__(self, point: Point) -> Scalar:
        value = jnp.asarray(self.fn(point))
        if value.shape != ():
            raise ValueError(
                f"FunctionLoss needs a function of the point with a scalar value; got shape "
                f"{value.shape}. Sum over the rest, or use LeastSquares."
            )
        return value


class SquaredNorm(AbstractResidualLoss):
    """The loss L(θ) = ½‖fn(θ)‖² of a function with any array as its value.

    It is the `loss` of a `LevelSet`.

    Args:
        fn: maps a point to an array or a PyTree of arrays.
        trainable: says which leaves may move, as for `LeastSquares`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.losses.SquaredNorm(lambda x: x @ x - 1)
        >>> print(circle(jnp.array([2.0, 0.0])), circle.gradient(jnp.array([2.0, 0.0])))
        4.5 [12.  0.]
    """

    fn: Callable[..., Any]
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        fn: Callable[[Point], Any],
        *,
        trainable: _tree.Static | None = None,
    ):
        self.fn = _tree.as_pytree_callable(fn)
        self.trainable = trainable

    @property
    def data(self) -> PyTree[Array]:
        return jnp.zeros(1)  # one example that holds everything

    @property
    def scale(self) -> Scalar:
        return jnp.ones(())

    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        del example
        return ravel_value(self.fn(point))

    def __call__(self, point: Point) -> Scalar:
        return 0.5 * jnp.sum(self.residual(point) ** 2)

    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """The Jacobian J itself."""
        return self.jacobian(point)


def ravel_value(value: PyTree[Any]) -> Float[Array, " n"]:
    """A function's value, an array or a PyTree of arrays, as one vector."""
    # `ravel_pytree` would also promote, and its way back is not needed.
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(value)])
