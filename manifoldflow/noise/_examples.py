"""The effect of the choice of a batch of examples on the gradient."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _tree, linalg
from manifoldflow._types import Key, Point
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss


def checked_examples(
    name: str, loss: AbstractLoss, batch_size: int | None, *, replacement: bool = False
) -> AbstractExampleLoss:
    """The loss, if it is one over at least `batch_size` examples."""
    if not isinstance(loss, AbstractExampleLoss):
        raise ValueError(
            f"{name} acts on the examples of a loss such as LeastSquares or PerExampleLoss; got "
            f"{type(loss).__name__}. For any loss there are IsotropicNoise and CustomNoise."
        )
    if batch_size is not None and batch_size > loss.num_examples and not replacement:
        raise ValueError(
            f"{name}: batch_size={batch_size} exceeds the {loss.num_examples} examples of the "
            "loss. Use batch_size=None for full batches."
        )
    return loss


def batch_of(
    loss: AbstractExampleLoss, batch_size: int | None, key: Key, *, replacement: bool = False
) -> AbstractExampleLoss:
    """The loss on a random batch; all of it where the batch is full."""
    num_examples = loss.num_examples
    if batch_size is None or (batch_size == num_examples and not replacement):
        return loss
    # One gather per step: the whole data stay where they are.
    return loss.select(jr.choice(key, num_examples, (batch_size,), replace=replacement))


Weights = Float[Array, "N outputs"]


def weights_of(loss: AbstractExampleLoss, point: Point) -> Weights:
    """The w with ∇L = ∂fᵀw, without the weight decay, the outputs of one example in a row."""
    outputs = loss.outputs(point)
    gradient = loss.output_gradient(outputs, loss.targets)
    return gradient.reshape(loss.num_examples, -1).astype(outputs.dtype)


def batch_spread(
    loss: AbstractExampleLoss, point: Point, batch_size: int, *, replacement: bool
) -> Callable[[Float[Array, " N"]], Weights]:
    """The small part G of a factor ∂fᵀG of the covariance due to the choice of a batch.

    With gᵢ = N∂fᵢᵀwᵢ the gradient of example i (a weight decay, the same for all, drops out), the
    mean over a batch of B has the covariance
    (1/B)·(1/N) Σ (gᵢ − ∇L)(gᵢ − ∇L)ᵀ, times (N − B)/(N − 1) without replacement. So column i
    of F is gᵢ − ∇L up to a factor, and G takes u to w·(u − mean u).

    Returns:
        G, from N numbers to weights.
    """
    num_examples = loss.num_examples
    # One example alone has no spread: 0, and not 0/0.
    finite = 1.0 if replacement else (num_examples - batch_size) / max(num_examples - 1, 1)
    # Columns (gᵢ − ḡ)·√(finite/(B·N)), and gᵢ has the factor N.
    weights = weights_of(loss, point) * math.sqrt(finite * num_examples / batch_size)
    return lambda u: weights * (u - jnp.mean(u))[:, None]


def label_factor(
    loss: AbstractExampleLoss,
    point: Point,
    batch_size: int | None,
    from_labels: Callable[[Array], Weights],
    num_labels: int,
) -> lx.AbstractLinearOperator:
    """The factor F for noise of the labels and, in small batches, of the choice of the examples.

    Both are independent, as the labels are noisy about the same mean in every batch.
    """
    dtype = _tree.dtype_of(loss.split(point)[0])
    if batch_size is None or batch_size == loss.num_examples:
        return output_factor(loss, point, from_labels, jax.ShapeDtypeStruct((num_labels,), dtype))
    from_batch = batch_spread(loss, point, batch_size, replacement=False)
    structure = jax.ShapeDtypeStruct((num_labels + loss.num_examples,), dtype)

    def from_both(u: Array) -> Weights:
        return from_labels(u[:num_labels]) + from_batch(u[num_labels:])

    return output_factor(loss, point, from_both, structure)


def output_factor(
    loss: AbstractExampleLoss,
    point: Point,
    small: Callable[[Array], Weights],
    structure: Any,
) -> lx.AbstractLinearOperator:
    """The factor F = ∂fᵀG for a linear function G from arrays of this structure to weights.

    It is a `linalg.ResidualFactor` where the residuals say as much as the outputs.
    """
    dtype = _tree.dtype_of(loss.split(point)[0])
    weights = jax.eval_shape(small, structure)
    has_residuals = isinstance(loss, AbstractResidualLoss)
    if has_residuals and loss.residual_weights(jnp.zeros(weights.shape, dtype)) is not None:
        through: Any = lambda u: loss.residual_weights(small(u).astype(dtype))
        return linalg.ResidualFactor(
            loss.jacobian(point), lx.FunctionLinearOperator(through, structure)
        )
    flat: Any = lambda u: small(u).astype(dtype).reshape(-1)
    return loss.output_jacobian(point).T @ lx.FunctionLinearOperator(flat, structure)
