"""Fresh noise on the labels at every step."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_nonnegative, is_traced, shapes_of
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, LeastSquares
from manifoldflow.noise._base import AbstractBatchNoise, Batch
from manifoldflow.noise._draws import checked_distribution, drawn_like
from manifoldflow.noise._examples import (
    batch_of,
    checked_examples,
    label_factor,
    Weights,
)


class LabelNoise(AbstractBatchNoise):
    """Noise of standard deviation `std` on every target, redrawn at each step.

    On the zero-loss manifold of `LeastSquares` the covariance of the gradient is c·∇²L with
    c = scale·std²·N/B for N examples in batches of B. Under this noise SGD walks the
    manifold by −(c/4) P∇tr∇²L [LiWangArora2022, Corollary 5.2].

    Other losses feel a change ε of the target to first order: ∂ℓ/∂f + (∂²ℓ/∂f∂y) ε. For
    cross-entropies, which are linear in the target, this is exact; for others it keeps the
    gradient unbiased and is the leading order for a small std. The covariance is then no
    multiple of the Hessian; where labels are classes, `ResampledLabels` has one that is.

    Args:
        std: standard deviation ≥ 0, in the units of the targets.
        batch_size: B, examples in a batch, drawn without replacement; None for all N, whose
            clock is N times slower than that of B = 1. Small batches have a noise of their own,
            which vanishes where all examples are fitted. A number of Python, not an array: the
            limit depends on std/√B alone, so that std/√B can take its place.
        distribution: "normal", or "rademacher" for labels y ± std with equal chances, those of the
            paper. The limit of SGD is the same. Clipping and signs have theirs for normal labels.

    Raises:
        ValueError: negative std; another distribution; a batch size below 1 or above the number
            of examples; a loss without examples or with integer targets.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: x @ w**2)
        >>> noise, fit = mf.LabelNoise(std=1.0, batch_size=1), jnp.ones(2)
        >>> print(noise.strength(loss), noise.covariance(loss, fit).as_matrix().round(3))
        1.0 [[2. 0.]
         [0. 2.]]
    """

    std: Scalar
    batch_size: int | None = eqx.field(static=True)
    distribution: str = eqx.field(static=True)

    @checked_but("distribution")
    def __init__(self, std: Any, batch_size: Any = None, *, distribution: str = "normal"):
        if is_traced(batch_size):
            raise ValueError(
                "LabelNoise: batch_size is a number of Python, which is compiled in; got a traced "
                "one. Limits depend on std/√B alone: vmap over std/√B in place of std, with "
                "batch_size=1."
            )
        self.std = checked_nonnegative("LabelNoise: std", std, "It is a standard deviation.")
        if batch_size is not None:
            batch_size = checked_count("LabelNoise: batch_size (None for all examples)", batch_size)
        self.batch_size = batch_size
        self.distribution = checked_distribution(
            "LabelNoise: distribution", distribution, "normal", "rademacher"
        )

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        batch_key, label_key = jr.split(key)
        batch = batch_of(self.checked(loss), self.batch_size, batch_key)
        coordinates, remainder = batch.split(point)
        # One pass backwards for gradient and noise together: both are ∂fᵀ of weights on the
        # outputs.
        outputs, pull = jax.vjp(lambda x: batch.outputs(_tree.join(x, remainder)), coordinates)
        targets = _tree.cast_floats(batch.targets, outputs.dtype)
        change = _tree.scale(self.std, drawn_like(label_key, targets, self.distribution))
        slopes, response = _response(batch, outputs, targets, change)
        gradient = pull((slopes + response).astype(outputs.dtype))[0]
        if batch.weight_decay is None:
            return gradient
        return _tree.add(gradient, _tree.scale(batch.weight_decay, coordinates))

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The factor F, on one number per label and, for small batches, one per example."""
        loss = self.checked(loss)
        outputs = loss.outputs(point)
        targets = _tree.cast_floats(loss.targets, outputs.dtype)
        labels, unravel = ravel_pytree(targets)
        # Labels of B of N examples: weights N/B times as large, in B/N of the draws; a root of N/B
        # is left.
        size = math.sqrt(loss.num_examples / (self.batch_size or loss.num_examples))

        def from_labels(u: Array) -> Weights:
            if isinstance(loss, LeastSquares):
                # F = √(c·scale)·Jᵀ, so that F Fᵀ = c·scale·JᵀJ, which is c·∇²L where the residuals
                # vanish.
                weights = jnp.sqrt(self.strength(loss) * loss.scale) * u
            else:
                weights = size * self.std * _response(loss, outputs, targets, unravel(u))[1]
            return weights.reshape(loss.num_examples, -1)

        return label_factor(loss, point, self.batch_size, from_labels, len(labels))

    def strength(self, loss: AbstractLoss) -> Scalar:
        """The c of Σ = c·∇²L on the manifold of a `LeastSquares` loss: scale·std²·N/B."""
        if not isinstance(loss, LeastSquares):
            raise ValueError(
                "LabelNoise has a strength c on LeastSquares; got "
                f"{type(loss).__name__}, where its covariance is not a multiple of the Hessian."
            )
        self.checked(loss)
        batch_size = loss.num_examples if self.batch_size is None else self.batch_size
        return loss.scale * self.std**2 * (loss.num_examples / batch_size)

    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The `strength` on LeastSquares, None on other losses."""
        return self.strength(loss) if isinstance(loss, LeastSquares) else None

    def batch(self, loss: AbstractLoss) -> Batch | None:
        """The batch of a step; None for labels that are not normal, and on losses but LeastSquares.

        Other losses feel a label to first order only.
        """
        size = self.batch_size or self.checked(loss).num_examples
        is_full = size == self.checked(loss).num_examples
        is_known = isinstance(loss, LeastSquares) and self.distribution == "normal"
        return Batch(size, is_full, self.std) if is_known else None

    def checked(self, loss: AbstractLoss) -> AbstractExampleLoss:
        loss = checked_examples("LabelNoise", loss, self.batch_size)
        leaves = jax.tree.leaves(loss.targets)
        if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
            raise ValueError(
                "LabelNoise adds to targets, which must be floating-point arrays; got "
                f"{shapes_of(loss.targets)}. For labels that are classes, hand the loss their "
                "probabilities and use ResampledLabels."
            )
        return loss


def _response(
    loss: AbstractExampleLoss, outputs: Array, targets: PyTree[Array], change: PyTree[Array]
) -> tuple[Float[Array, "N ..."], Float[Array, "N ..."]]:
    """The derivative ∂L/∂f, and its response to a change of the targets."""
    return jax.jvp(lambda y: loss.output_gradient(outputs, y), (targets,), (change,))
