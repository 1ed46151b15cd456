"""Labels drawn from probabilities, as under a likelihood."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, is_traced, shapes_of
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import (
    AbstractExampleLoss,
    AbstractLoss,
    PerExampleLoss,
    ResidualForm,
)
from manifoldflow.noise._base import AbstractDataNoise
from manifoldflow.noise._examples import (
    batch_of,
    checked_examples,
    label_factor,
    Weights,
)


class ResampledLabels(AbstractDataNoise):
    """Hard labels drawn afresh at each step, the targets being their probabilities.

    The targets of a `PerExampleLoss` are numbers p in [0, 1], for labels 0 and 1, or rows of
    probabilities, for one-hot labels. If the loss is a negative log-likelihood (logistic,
    softmax cross-entropy), the covariance of the gradient on the zero-loss manifold is
    c·∇²L with c = 1/B, for N examples in batches of B: SGD follows −(c/4) P∇tr∇²L.

    Args:
        batch_size: B, drawn without replacement; None for all.
        is_likelihood: False for a loss that is linear in the probabilities but not a
            likelihood, such as the exponential loss: the covariance, computed from the
            outcomes, is then in general no multiple of the Hessian, and the limit is the
            general diffusion. It is a multiple where all labels are flipped with one
            probability p, c = 1/(2B√(p(1 − p))) for the exponential loss: `FlippedLabels`
            says so by its type, and its limit is an ordinary differential equation.

    Raises:
        ValueError: another loss; targets that are no probabilities; a batch size below 1 or
            above N; a loss that is no likelihood though `is_likelihood` says so.

    Assumes:
        ∂ℓ/∂f is linear in the probabilities, so that the gradient is unbiased.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss_fn = lambda f, p: jnp.logaddexp(0, f) - p * f
        >>> targets = jnp.array([0.2, 0.9])
        >>> loss = mf.PerExampleLoss(jnp.eye(2), targets, loss_fn, predict=jnp.dot)
        >>> print(mf.ResampledLabels(batch_size=2).hessian_multiple(loss))  # 1/B
        0.5
    """

    batch_size: int | None = eqx.field(static=True)
    is_likelihood: bool = eqx.field(static=True)

    @checked
    def __init__(self, batch_size: int | None = None, *, is_likelihood: bool = True):
        name = "ResampledLabels: batch_size (None for all examples)"
        self.batch_size = None if batch_size is None else checked_count(name, batch_size)
        self.is_likelihood = bool(is_likelihood)

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        batch_key, label_key = jr.split(key)
        batch = batch_of(self.checked(loss), self.batch_size, batch_key)
        probabilities, outcomes = _outcomes(batch.targets)
        # log 0 = −∞ is meant: an outcome of probability 0 is never drawn.
        drawn = jr.categorical(label_key, jnp.log(probabilities), axis=-1)
        labels = outcomes[drawn].reshape(batch.targets.shape)
        return eqx.tree_at(lambda loss: loss.targets, batch, labels).gradient(point)

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The factor F, on a number per outcome of every label, and one per example if B < N."""
        loss = self.checked(loss)
        outputs = loss.outputs(point)
        size = math.sqrt(loss.num_examples / (self.batch_size or loss.num_examples))
        columns = size * label_columns(loss, outputs)
        num_labels = columns.shape[0] * columns.shape[2]

        def from_labels(u: Array) -> Weights:
            return _precision.einsum(
                "noc,nc->no",
                columns,
                u.reshape(columns.shape[0], -1),
            )

        return label_factor(loss, point, self.batch_size, from_labels, num_labels)

    def hessian_multiple(self, loss: AbstractLoss) -> Scalar | None:
        """The c = 1/B for a likelihood, None otherwise: weight decay leaves no such manifold.

        Raises:
            ValueError: the loss is no likelihood after all, or has no zero-loss manifold.
        """
        loss = self.checked(loss)
        if loss.weight_decay is not None:
            return None
        if not is_traced(loss):
            form = ResidualForm(loss) if isinstance(loss, PerExampleLoss) else loss
            with jax.ensure_compile_time_eval():  # inside jit as well, of a loss that is known
                _check_minimum(form)
                if self.is_likelihood:
                    _check_likelihood(form)
        if not self.is_likelihood:
            return None
        return jnp.asarray(1 / (self.batch_size or loss.num_examples))

    def checked(self, loss: AbstractLoss) -> PerExampleLoss | ResidualForm:
        if not isinstance(loss, PerExampleLoss | ResidualForm):
            raise ValueError(
                "ResampledLabels draws the labels of a PerExampleLoss; got "
                f"{type(loss).__name__}. For squared losses use LabelNoise(std)."
            )
        checked_examples("ResampledLabels", loss, self.batch_size)
        leaves = jax.tree.leaves(loss.targets)
        if len(leaves) != 1 or leaves[0].ndim > 2:
            raise ValueError(
                "ResampledLabels needs targets that are probabilities: an array (examples,) "
                f"or (examples, classes); got {shapes_of(loss.targets)}."
            )
        if not is_traced(leaves[0]):
            _check_probabilities(np.asarray(leaves[0]))
        return loss


def _outcomes(targets: Array) -> tuple[Float[Array, "N c"], Float[Array, "c _"]]:
    """The probabilities of the labels, and the labels."""
    probabilities = targets.reshape(len(targets), -1)
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        probabilities = probabilities.astype(jnp.result_type(float))
    if probabilities.shape[1] > 1:
        return probabilities, jnp.eye(probabilities.shape[1], dtype=probabilities.dtype)
    both = jnp.concatenate([1 - probabilities, probabilities], axis=1)
    return both, jnp.array([[0.0], [1.0]], probabilities.dtype)


def label_columns(
    loss: AbstractExampleLoss, outputs: Float[Array, "N ..."]
) -> Float[Array, "N outputs c"]:
    """The columns √p_c (w_c − w̄) for every outcome c, w_c the weights if all labels were c."""
    weights, probabilities = _label_weights(loss, outputs)
    mean = jnp.sum(weights * probabilities, axis=-1, keepdims=True)
    return (jnp.sqrt(probabilities) * (weights - mean)).astype(outputs.dtype)


def _label_weights(
    loss: AbstractExampleLoss, outputs: Float[Array, "N ..."]
) -> tuple[Float[Array, "N outputs c"], Float[Array, "N 1 c"]]:
    """The derivative ∂L/∂f if all labels were the outcome c, and the probabilities of c."""
    probabilities, outcomes = _outcomes(_tree.cast_floats(loss.targets, outputs.dtype))

    def weights_if(outcome: Array) -> Weights:
        targets = jnp.broadcast_to(outcome, probabilities.shape[:1] + outcome.shape)
        gradient = loss.output_gradient(outputs, targets.reshape(loss.targets.shape))
        return gradient.reshape(loss.num_examples, -1)

    return jax.vmap(weights_if, out_axes=-1)(outcomes), probabilities[:, None]


def _check_probabilities(targets: np.ndarray) -> None:
    rows = targets.reshape(len(targets), -1).astype(float)
    # Rows of a softmax in float32 sum to 1 up to some 1e-7 per class.
    tolerance = 1e-5
    is_fine = np.all((rows >= 0) & (rows <= 1))
    if rows.shape[1] > 1:
        is_fine &= np.all(np.abs(rows.sum(axis=1) - 1) < tolerance)
    if not is_fine:
        raise ValueError(
            "ResampledLabels needs targets that are probabilities, in [0, 1] and rows with the "
            f"sum 1; got values from {rows.min():.3g} to {rows.max():.3g} and sums from "
            f"{rows.sum(axis=1).min():.3g} to {rows.sum(axis=1).max():.3g}."
        )


def _check_minimum(loss: ResidualForm) -> None:
    """Refuse a loss whose mean over noisy labels is not minimal where the loss is."""
    weights, probabilities = map(np.asarray, _label_weights(loss, loss.minimizers))
    mean = np.abs(np.sum(weights * probabilities, axis=-1))
    worst = np.max(mean / np.max(np.abs(weights), axis=-1))
    if not worst < _precision.eps_of_dtype(weights) ** 0.5:
        raise ValueError(
            "ResampledLabels needs a loss that is linear in the probabilities, so that labels "
            "drawn from them leave the gradient unbiased; at the minimum of this one the mean "
            f"over the labels is {worst:.2g} of the largest."
        )


def _check_likelihood(loss: ResidualForm) -> None:
    """Refuse a loss whose output Hessian is not the covariance of ∂ℓ/∂f at the minimum."""
    columns = np.asarray(label_columns(loss, loss.minimizers)) * loss.num_examples
    roots = np.asarray(loss.roots)
    covariances, hessians = (x @ np.swapaxes(x, 1, 2) for x in (columns, roots))
    worst = np.max(np.abs(covariances - hessians)) / np.max(np.abs(hessians))
    if not worst < _precision.eps_of_dtype(roots) ** 0.5:
        raise ValueError(
            "ResampledLabels: the covariance of the labels' gradient differs from the Hessian "
            f"of the loss by {worst:.2g}, so the loss is not a negative log-likelihood of "
            "labels with the targets as probabilities. Use ResampledLabels(batch_size, "
            "is_likelihood=False): its limit is then the general diffusion."
        )
