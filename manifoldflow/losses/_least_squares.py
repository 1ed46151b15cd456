"""The squared loss, whose zero set is the manifold of interpolating models."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree, linalg
from manifoldflow._boundary import checked
from manifoldflow._errors import (
    checked_data,
    checked_indices,
    checked_nonnegative,
    is_traced,
    numbers,
    shapes_of,
)
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.losses._base import AbstractExampleLoss, AbstractResidualLoss
from manifoldflow.losses._predict import call_point, model_output


class LeastSquares(AbstractResidualLoss, AbstractExampleLoss):
    """The squared loss L(θ) = (scale/2) Σᵢ (f(θ, xᵢ) − yᵢ)² over all n scalar outputs.

    Its minimisers with L = 0 form the `ZeroLossManifold`.

    Args:
        inputs: PyTree of arrays with a leading axis of N examples; integers are allowed.
        targets: array (N, *output); integers are cast to the point's dtype.
        predict: `predict(point, x)` maps one example to its output; by default `point(x)`.
            To differentiate in values it uses, hand them over: `jax.tree_util.Partial(fn, a)`
            or a module; values it merely closes over cannot be differentiated in.
        scale: the positive factor in front. The default 1/n, n = N × outputs, makes L half the mean
            square; 2 gives the sum of squares of [Gatmiry2024], 1/N the mean of
            [LiWangArora2022].
        trainable: says which leaves of the point may move: a PyTree prefix of booleans or
            functions of a leaf, as for `equinox.partition`. By default all floating arrays move;
            in models of Flax only its parameters do.

    Raises:
        ValueError: lengths differ, NaN or inf in the data, a scale that is not positive; when
            called, an output whose shape differs from that of its target.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 1.0]]), jnp.array([1.0, 0.0])
        >>> loss = mf.LeastSquares(x, y, predict=lambda w, x: jnp.sum(jnp.sinh(w * x)))
        >>> print(loss(jnp.zeros(2)), loss.gradient(jnp.zeros(2)))
        0.25 [-0.5 -1. ]
    """

    inputs: PyTree[Array]
    targets: Float[Array, "N ..."]
    predict: Callable[..., Any]
    scale: Scalar
    trainable: _tree.Static | None = eqx.field(static=True)

    @checked
    def __init__(
        self,
        inputs: PyTree[Any],
        targets: Any,
        *,
        predict: Callable[[Point, Example], Array] | None = None,
        scale: Any = None,
        trainable: PyTree[Any] | None = None,
    ):
        leaves = [numbers("LeastSquares: targets", leaf) for leaf in jax.tree.leaves(targets)]
        if len(leaves) != 1 or jnp.iscomplexobj(leaves[0]):
            raise ValueError(
                f"LeastSquares: targets must be one real array (examples, *output); got "
                f"{shapes_of(targets)}. Concatenate several outputs in `predict`."
            )
        self.inputs, targets = checked_data("LeastSquares", (inputs, targets))
        if not jax.tree.leaves(self.inputs):
            raise ValueError("LeastSquares needs inputs, arrays (examples, …); got none.")
        (targets,) = jax.tree.leaves(targets)
        # Integers have no derivative, and label noise adds fractions to them.
        if not jnp.issubdtype(targets.dtype, jnp.inexact):
            targets = targets.astype(jnp.result_type(float))
        self.targets = targets
        self.predict = _tree.as_pytree_callable(call_point if predict is None else predict)
        scale = 1 / targets.size if scale is None else scale
        self.scale = checked_nonnegative("LeastSquares: scale", scale, "Try scale=None, 1/n.")
        if not is_traced(self.scale) and not np.asarray(self.scale) > 0:
            raise ValueError("LeastSquares: scale must be positive; got 0. Try scale=None, 1/n.")
        self.trainable = None if trainable is None else _tree.Static(trainable)

    @property
    def data(self) -> PyTree[Array]:
        return self.inputs, self.targets

    @property
    def weight_decay(self) -> None:
        """None: weight decay leaves no zero-loss manifold. Its limit is `WeightDecayFlow`."""
        return None

    @property
    def num_residuals(self) -> int:
        """The number n = examples × outputs."""
        return math.prod(self.targets.shape)

    def example_output(self, point: Point, x: Example) -> Float[Array, "..."]:
        return model_output(self.predict, point, x, self.targets.shape[1:])

    def example_residual(self, point: Point, example: Example) -> Float[Array, " k"]:
        x, target = example
        return (self.example_output(point, x) - target).reshape(-1)

    def __call__(self, point: Point) -> Scalar:
        residual = self.residual(point)
        return 0.5 * self.scale.astype(residual.dtype) * jnp.sum(residual**2)

    def gauss_newton_root(self, point: Point) -> linalg.AbstractJacobian:
        """The operator √scale·J."""
        coordinates, remainder = self.split(point)
        dtype = _tree.dtype_of(coordinates)
        # √scale goes into the function: a multiple of a Jacobian would be an operator without rows
        # and without a Gram matrix.
        root = jnp.sqrt(self.scale).astype(dtype)
        return linalg.jacobian(
            lambda x, example: root * self.example_residual(_tree.join(x, remainder), example),
            coordinates,
            _tree.cast_floats(self.data, dtype),
        )

    def output_gradient(
        self, outputs: Float[Array, "N ..."], targets: PyTree[Array]
    ) -> Float[Array, "N ..."]:
        """The derivative scale·(f − y)."""
        return self.scale.astype(outputs.dtype) * (outputs - targets)

    def residual_weights(self, weights: Float[Array, "N outputs"]) -> Float[Array, " n"]:
        """The weights themselves: ∂r = ∂f."""
        return weights.reshape(-1)

    def select(self, indices: Any) -> "LeastSquares":
        indices = checked_indices(indices, self.num_examples)
        inputs, targets = jax.tree.map(lambda leaf: leaf[indices], self.data)
        # E over batches of (N/B)·Σ over the batch is the sum over all N: the estimate stays
        # unbiased.
        factor = len(self.targets) / len(targets)
        return eqx.tree_at(
            lambda loss: (loss.inputs, loss.targets, loss.scale),
            self,
            (inputs, targets, self.scale * factor),
        )

    def shift_targets(self, change: Float[Array, "N ..."]) -> "LeastSquares":
        """The loss with `change` added to the targets, as label noise does."""
        return eqx.tree_at(lambda loss: loss.targets, self, self.targets + change)
