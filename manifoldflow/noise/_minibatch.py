"""The noise of mini-batches."""

from typing import Any

import equinox as eqx
import jax
import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key, Point, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss
from manifoldflow.noise._base import AbstractBatchNoise, Batch
from manifoldflow.noise._examples import batch_of, batch_spread, checked_examples, output_factor


class MinibatchNoise(AbstractBatchNoise):
    """The noise of mini-batches: the gradient of a random batch of B of the N examples.

    Its covariance is exactly

        Σ = (1/B)·(1/N) Σᵢ (gᵢ − ∇L)(gᵢ − ∇L)ᵀ   × (N − B)/(N − 1) without replacement,

    with gᵢ the gradient for example i alone. It vanishes where all examples are fitted, so
    on a zero-loss manifold the limit of SGD stays put.

    Args:
        batch_size: B.
        replacement: True if the same example can be drawn again within a batch.

    Raises:
        ValueError: a batch size below 1, or above N without replacement; a loss without
            examples.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.array([1.0, -1.0]), predict=jnp.dot)
        >>> covariance = mf.MinibatchNoise(1).covariance(loss, jnp.zeros(2))
        >>> print(covariance.as_matrix().round(3))  # g₁ = (−1, 0), g₂ = (0, 1)
        [[0.25 0.25]
         [0.25 0.25]]
    """

    batch_size: int = eqx.field(static=True)
    replacement: bool = eqx.field(static=True)

    @checked
    def __init__(self, batch_size: Any, replacement: bool = False):
        self.batch_size = checked_count("MinibatchNoise: batch_size", batch_size)
        self.replacement = bool(replacement)

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        loss = self.checked(loss)
        return batch_of(loss, self.batch_size, key, replacement=self.replacement).gradient(point)

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The factor F, on N numbers: column i is a multiple of gᵢ − ∇L."""
        loss = self.checked(loss)
        dtype = _tree.dtype_of(loss.split(point)[0])
        structure = jax.ShapeDtypeStruct((loss.num_examples,), dtype)
        spread = batch_spread(loss, point, self.batch_size, replacement=self.replacement)
        return output_factor(loss, point, spread, structure)

    def checked(self, loss: AbstractLoss) -> AbstractExampleLoss:
        return checked_examples(
            "MinibatchNoise", loss, self.batch_size, replacement=self.replacement
        )

    def hessian_multiple(self, loss: AbstractLoss) -> None:
        """None: the noise vanishes where the Hessian does not."""
        return None

    def batch(self, loss: AbstractLoss) -> Batch:
        # Drawn with replacement, a batch of N still leaves examples out.
        is_full = self.batch_size == self.checked(loss).num_examples and not self.replacement
        return Batch(self.batch_size, is_full, None)
