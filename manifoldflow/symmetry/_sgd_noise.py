"""What moves a charge under SGD: examples, the scale of their noise, and weight decay."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Scalar
from manifoldflow.symmetry._gradients import checked_examples, ExampleLoss, num_examples


class SGDNoise(eqx.Module):
    """SGD on a mean over examples as dθ = −∇L dt − 2γθ dt + √(2σ²Σ) dW, on the clock kη.

    Σ is the centred covariance of per-example gradients.

    Args:
        example_loss: ℓ(point, example) → scalar, without the decay.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S), learning rate over twice the batch size.
        weight_decay: γ, where γ‖θ‖² is added to the loss.
        name: of the caller, for messages.
        throw: whether values inside jit are looked at.

    Attributes:
        mean_scale: what ∇L∇Lᵀ counts beside σ²Σ: η/2 in steps of finite length, else None.

    Raises:
        ValueError: wrong data, σ² or γ.
    """

    example_loss: ExampleLoss
    data: PyTree[Array]
    noise_scale: Scalar
    weight_decay: Scalar
    mean_scale: Scalar | None

    @checked
    def __init__(
        self,
        example_loss: ExampleLoss,
        data: PyTree[Any],
        *,
        noise_scale: Any,
        weight_decay: Any = 0.0,
        name: str = "SGDNoise",
        throw: bool = True,
    ):
        self.example_loss = _tree.as_pytree_callable(example_loss)
        self.data = checked_examples(data, throw=throw)
        self.noise_scale = checked_nonnegative(
            f"{name}: noise_scale", noise_scale, "It is σ² = η/(2S)."
        )
        self.weight_decay = checked_decay(name, weight_decay)
        self.mean_scale = None

    def astype(self, dtype: Any) -> "SGDNoise":
        """With its numbers in this precision."""
        scales = lambda noise: [
            scale
            for scale in (noise.noise_scale, noise.weight_decay, noise.mean_scale)
            if scale is not None
        ]
        return eqx.tree_at(scales, self, [scale.astype(dtype) for scale in scales(self)])


def noise_of_steps(
    example_loss: ExampleLoss,
    data: PyTree[Any],
    *,
    learning_rate: Array,
    batch_size: int | None,
    replacement: bool,
    weight_decay: Any,
    name: str,
    throw: bool = True,
) -> SGDNoise:
    """What moves a charge in a step of SGD, exactly: its drift is (E[C_{k+1}] − C_k)/η.

    From C_{k+1} = (1 − 2ηγ)²C_k + ½η²gᵀAg and E[ggᵀ] = f·Σ/S + ∇L∇Lᵀ: the σ² is ηf/(2S),
    the γ is γ(1 − ηγ), and ∇L∇Lᵀ counts η/2.

    Args:
        example_loss: ℓ.
        data: N examples.
        learning_rate: η.
        batch_size: S; None for all N.
        replacement: f = 1 for examples drawn with replacement, else (N − S)/(N − 1).
        weight_decay: γ.
        name: of the caller, for messages.
        throw: whether values inside jit are looked at.
    """
    decay = checked_decay(name, weight_decay)
    noise = SGDNoise(
        example_loss, data, noise_scale=learning_rate, weight_decay=decay, name=name, throw=throw
    )
    count = num_examples(noise.data)
    size = count if batch_size is None else checked_count(f"{name}: batch_size", batch_size)
    if size > count and not replacement:
        raise ValueError(
            f"{name}: batch_size={size} exceeds the {count} examples. Draw with replacement=True."
        )
    finite = 1.0 if replacement else (count - size) / max(count - 1, 1)
    kept = 1 - learning_rate * decay
    scales = learning_rate * finite / (2 * size), decay * kept, learning_rate / 2
    where = lambda noise: (noise.noise_scale, noise.weight_decay, noise.mean_scale)
    return eqx.tree_at(where, noise, scales, is_leaf=lambda leaf: leaf is None)


def checked_decay(name: str, weight_decay: Any) -> Array:
    return checked_nonnegative(f"{name}: weight_decay", weight_decay, "It is the γ of γ‖θ‖².")
