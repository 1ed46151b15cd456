"""Binary labels that are all flipped with one probability."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced, shapes_of
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss, PerExampleLoss, ResidualForm
from manifoldflow.noise._base import AbstractDataNoise
from manifoldflow.noise._resampled import label_columns, ResampledLabels


class FlippedLabels(AbstractDataNoise):
    """Labels of two classes, each flipped with one probability p, afresh at each step.

    It is for a `PerExampleLoss` whose targets are the probabilities of the label 1, all of them p
    or 1 − p, as `losses.flipped_labels_loss` makes it. Then the covariance of the gradient on the
    zero-loss manifold is c·∇²L whatever the loss φ of a margin, with z the margin at the minimum:

        c = p(1 − p)(φ'(z) + φ'(−z))² / (B((1 − p)φ''(z) + pφ''(−z))),

    1/B for the logistic loss, 1/(2B√(p(1 − p))) for the exponential one. SGD follows the ordinary
    differential equation Y' = −(c/4) P∇tr ∇²L. `ResampledLabels` is for any probabilities.

    Args:
        batch_size: B, drawn without replacement; None for all.

    Raises:
        ValueError: another loss; more than two classes; a batch size below 1 or above N. On a
            `ZeroLossManifold` outside of jit also labels of several probabilities, where c differs
            from example to example; `simulate` takes them.

    References:
        [LiWangArora2022, Corollary 5.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.losses.flipped_labels_loss(
        ...     jnp.eye(2), jnp.ones(2), lambda z: jnp.exp(-z), probability=0.1, predict=jnp.dot
        ... )
        >>> c = mf.FlippedLabels(batch_size=1).hessian_multiple(mf.ZeroLossManifold(loss).loss)
        >>> print(f"{c:.4f}")  # 1/(2√0.09)
        1.6667
    """

    labels: ResampledLabels

    @checked
    def __init__(self, batch_size: int | None = None):
        self.labels = ResampledLabels(batch_size, is_likelihood=False)

    @property
    def batch_size(self) -> int | None:
        return self.labels.batch_size

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        return self.labels.gradient(self.checked(loss), point, key)

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The factor of `ResampledLabels`."""
        return self.labels.factor(self.checked(loss), point)

    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The c for the loss of a `ZeroLossManifold`, whose minimum is known; None for others.

        Raises:
            ValueError: c is not the same for all examples.
        """
        loss = self.checked(loss)
        if not isinstance(loss, ResidualForm):
            return None
        self.labels.hessian_multiple(loss)  # raises where the labels have another mean
        if not is_traced(loss):
            with jax.ensure_compile_time_eval():  # inside jit as well, of a loss that is known
                _check_equal(np.asarray(_variance_over_curvature(loss)))
        # All of them are equal; the mean has derivatives in every one.
        ratio = jnp.mean(_variance_over_curvature(loss))
        return ratio / (self.batch_size or loss.num_examples)

    def checked(self, loss: AbstractLoss) -> PerExampleLoss | ResidualForm:
        loss = self.labels.checked(loss)
        targets = jax.tree.leaves(loss.targets)[0]
        if targets.size != len(targets):
            raise ValueError(
                "FlippedLabels needs one probability for each example, as "
                f"losses.flipped_labels_loss makes them; got {shapes_of(loss.targets)}. For more "
                "than two classes use ResampledLabels."
            )
        return loss


def _variance_over_curvature(loss: ResidualForm) -> Float[Array, " N"]:
    """The ratio of Var ∂ℓ/∂f to ∂²ℓ/∂f² at the minimum, for every example."""
    columns = label_columns(loss, loss.minimizers) * loss.num_examples
    return jnp.sum(columns**2, axis=(1, 2)) / jnp.sum(loss.roots**2, axis=(1, 2))


def _check_equal(ratios: np.ndarray) -> None:
    spread = np.ptp(ratios) / np.max(ratios)
    if not spread < _precision.eps_of_dtype(ratios) ** 0.5:
        raise ValueError(
            "FlippedLabels needs labels that are all flipped with one probability, targets p or "
            "1 − p; variance over curvature of this loss is from "
            f"{ratios.min():.3g} to {ratios.max():.3g}. For any probabilities use "
            "ResampledLabels(batch_size, is_likelihood=False), whose limit is the general one."
        )
