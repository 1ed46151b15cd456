"""Fresh noise on the labels at every step."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import lineax as lx

from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss, LeastSquares
from manifoldflow.noise._base import AbstractNoise


class LabelNoise(AbstractNoise):
    """Gaussian noise of standard deviation `std` on every target, redrawn at each step.

    On the zero-loss manifold the covariance of the gradient is c·∇²L with
    c = scale·std²·N/B for N examples in batches of B: the noise under which SGD walks the
    manifold by −(c/4) P∇tr∇²L [LiWangArora2022, Corollary 5.2].

    Args:
        std: standard deviation, in the units of the targets.
        batch_size: B, examples in a batch, drawn without replacement; None for all.

    Raises:
        ValueError: negative std; a batch size below 1 or above the number of examples; a
            loss other than `LeastSquares`.
    """

    std: Scalar
    batch_size: int | None = eqx.field(static=True)

    def __init__(self, std: Any, batch_size: int | None = None):
        self.std = checked_nonnegative("LabelNoise: std", std, "It is a standard deviation.")
        if batch_size is not None:
            batch_size = checked_count("LabelNoise: batch_size (None for all examples)", batch_size)
        self.batch_size = batch_size

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        loss = self._checked(loss)
        batch_key, label_key = jr.split(key)
        num_examples = len(loss.targets)
        if self.batch_size is not None and self.batch_size < num_examples:
            loss = loss.select(
                jr.choice(batch_key, num_examples, (self.batch_size,), replace=False)
            )
        dtype = loss.targets.dtype
        labels = self.std.astype(dtype) * jr.normal(label_key, loss.targets.shape, dtype)
        return loss.shift_targets(labels).gradient(point)

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """√(c·scale)·Jᵀ from n label perturbations to tangents.

        It is the whole covariance on the manifold, and anywhere for full batches; off the
        manifold small batches add their own, which vanishes with the residual.
        """
        loss = self._checked(loss)
        jacobian = loss.jacobian(point)
        factor = jnp.sqrt(self.strength(loss) * loss.scale)
        return factor.astype(jacobian.out_structure().dtype) * jacobian.T

    def strength(self, loss: AbstractLoss) -> Scalar:
        """The c of Σ = c·∇²L on the manifold: scale·std²·N/B."""
        loss = self._checked(loss)
        num_examples = len(loss.targets)
        batch_size = num_examples if self.batch_size is None else self.batch_size
        return loss.scale * self.std**2 * (num_examples / batch_size)

    def _checked(self, loss: AbstractLoss) -> LeastSquares:
        if not isinstance(loss, LeastSquares):
            raise ValueError(
                f"LabelNoise perturbs the targets of LeastSquares; got {type(loss).__name__}. "
                "Elsewhere its covariance is not a multiple of the Hessian."
            )
        if self.batch_size is not None and self.batch_size > len(loss.targets):
            raise ValueError(
                f"LabelNoise: batch_size={self.batch_size} exceeds the {len(loss.targets)} "
                "examples of the loss. Use batch_size=None for full batches."
            )
        return loss
