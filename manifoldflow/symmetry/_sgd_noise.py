"""What moves a charge under SGD: examples, the scale of their noise, and weight decay."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Scalar
from manifoldflow.symmetry._gradients import checked_examples, ExampleLoss


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

    Raises:
        ValueError: wrong data, σ² or γ.
    """

    example_loss: ExampleLoss
    data: PyTree[Array]
    noise_scale: Scalar
    weight_decay: Scalar

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


def checked_decay(name: str, weight_decay: Any) -> Array:
    return checked_nonnegative(f"{name}: weight_decay", weight_decay, "It is the γ of γ‖θ‖².")
