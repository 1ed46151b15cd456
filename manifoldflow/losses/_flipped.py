"""The mean loss of binary labels that are flipped with one probability."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_positive, described, is_traced
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.losses._per_example import PerExampleLoss


@checked
def flipped_labels_loss(
    inputs: PyTree[Any],
    labels: Float[Array, " N"],
    margin_loss: Callable[[Scalar], Any],
    *,
    probability: Any,
    predict: Callable[[Point, Example], Array] | None = None,
    trainable: PyTree[Any] | None = None,
) -> PerExampleLoss:
    """The mean loss of labels ±1 when each of them is flipped with one probability p.

        L(θ) = (1/N) Σᵢ (1 − p)·φ(yᵢf(θ, xᵢ)) + p·φ(−yᵢf(θ, xᵢ))

    Unlike φ(yf) itself, with its infimum at infinity, it is minimal at finite outputs for p in
    (0, 1): yf = ln((1 − p)/p) for the logistic loss, half of that for the exponential one. SGD
    that flips the labels anew at each step, `FlippedLabels`, has this loss as its mean.

    Args:
        inputs: PyTree of arrays with a leading axis of N examples.
        labels: y, each −1 or 1.
        margin_loss: φ, decreasing, from a margin to a number: `lambda z: jnp.logaddexp(0, -z)` or
            `lambda z: jnp.exp(-z)`.
        probability: p in (0, ½), with which a label is wrong.
        predict: `predict(point, x)` → f, one number for one example; by default `point(x)`.
        trainable: says which leaves may move, as for `LeastSquares`.

    Returns:
        The loss, with the probabilities of the label 1 as targets.

    Raises:
        ValueError: labels other than ±1, a probability that is not between 0 and ½.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> labels = jnp.array([1.0, -1.0])
        >>> loss = mf.losses.flipped_labels_loss(
        ...     jnp.eye(2), labels, lambda z: jnp.exp(-z), probability=0.1, predict=jnp.dot
        ... )
        >>> print(loss.targets)
        [0.9 0.1]
    """
    if not callable(margin_loss):
        raise ValueError(
            "flipped_labels_loss needs a function of a margin, as lambda z: jnp.exp(-z); got "
            f"{described(margin_loss)}."
        )
    # p = 0 would send the minimum to infinity, as hard labels do.
    chance = checked_positive("flipped_labels_loss: probability", probability)
    if not is_traced(chance) and not float(chance) < 0.5:
        raise ValueError(
            f"flipped_labels_loss: probability must be below ½; got {float(chance):g}. Above it "
            "change the signs of the labels; at ½ they say nothing."
        )
    # By NumPy: within jit JAX traces operations on constants as well.
    if not is_traced(labels) and not np.all(np.abs(np.asarray(labels)) == 1):
        raise ValueError(f"flipped_labels_loss: labels must be -1 or 1; got {labels}.")
    targets = jnp.where(labels > 0, 1 - chance, chance).astype(labels.dtype)

    def mean_loss(output: Array, target: Array) -> Array:
        return target * margin_loss(output) + (1 - target) * margin_loss(-output)

    return PerExampleLoss(inputs, targets, mean_loss, predict=predict, trainable=trainable)
