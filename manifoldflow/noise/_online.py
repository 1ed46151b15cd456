"""Batches of new examples at every step, without a data set."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count
from manifoldflow._types import Coordinates, Key, Point, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise._base import AbstractStochasticGradient


class OnlineBatch(AbstractStochasticGradient):
    """The mean gradient of an example's loss over B examples that are drawn anew.

    It is for `simulate`: SGD on a stream of data. The loss that it is given decides only which
    leaves of a point may move; that loss should be the mean of `example_loss` over all
    data, up to a constant, for the gradient to be unbiased. It has no covariance, which would
    be an integral over all data: flows take other noises.

    Args:
        sample_fn: (key, B) ↦ B examples, a PyTree of arrays with a leading axis of B.
        example_loss: ℓ(point, example) → scalar.
        batch_size: B ≥ 1.

    Raises:
        ValueError: a batch size below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> draw = lambda key, count: jr.rademacher(key, (count,), float)
        >>> stream = mf.OnlineBatch(draw, lambda w, x: jnp.sum((w * x) ** 2) / 2, batch_size=8)
        >>> loss = mf.FunctionLoss(lambda w: jnp.sum(w**2) / 2)  # the mean over all x = ±1
        >>> print(stream.gradient(loss, jnp.array([3.0]), jr.key(0)))
        [3.]
    """

    sample_fn: Callable[..., Any]
    example_loss: Callable[..., Any]
    batch_size: int = eqx.field(static=True)

    @checked_but("sample_fn", "example_loss")
    def __init__(
        self,
        sample_fn: Callable[[Key, int], PyTree[Array]],
        example_loss: Callable[[Point, Any], Any],
        batch_size: Any,
    ):
        if not callable(sample_fn) or not callable(example_loss):
            raise ValueError(
                "OnlineBatch needs two functions, sample_fn(key, B) → examples and "
                f"example_loss(point, example) → scalar; got {type(sample_fn).__name__} and "
                f"{type(example_loss).__name__}."
            )
        self.sample_fn = _tree.as_pytree_callable(sample_fn)
        self.example_loss = _tree.as_pytree_callable(example_loss)
        self.batch_size = checked_count("OnlineBatch: batch_size", batch_size)

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        coordinates, remainder = loss.split(point)
        batch = self.sample_fn(key, self.batch_size)
        # A stream in float64 would promote a float32 point.
        batch = _tree.cast_floats(batch, _tree.dtype_of(coordinates))

        def mean_loss(x: Coordinates) -> Array:
            point = _tree.join(x, remainder)
            return jnp.mean(jax.vmap(lambda example: self.example_loss(point, example))(batch))

        return jax.grad(mean_loss)(coordinates)
