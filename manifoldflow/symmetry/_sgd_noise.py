"""The parameters of SGD that move a charge: examples, their noise scale and weight decay."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Example, Point, Scalar
from manifoldflow.symmetry._gradients import (
    checked_examples,
    example_value,
    ExampleLoss,
    num_examples,
    over_chunks,
)


class SGDNoise(eqx.Module):
    """SGD on a mean over examples as dθ = −∇L dt − 2γθ dt + √(2σ²Σ) dW, on the clock kη.

    Σ is the centred covariance of per-example gradients.

    Args:
        example_loss: ℓ(point, example) → scalar, without the decay.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S) ≥ 0, the learning rate over twice the batch size.
        weight_decay: γ ≥ 0, where γ‖θ‖² is added to the loss.
        name: of the caller, for messages.
        throw: False leaves values inside jit unchecked.

    Attributes:
        mean_scale: the weight of ∇L∇Lᵀ beside σ²Σ: η/2 in steps of finite length, else None.

    Raises:
        ValueError: wrong data, σ² or γ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> loss = lambda p, x: (p * x - 1.0) ** 2
        >>> noise = symmetry.SGDNoise(
        ...     loss, jnp.arange(3.0), noise_scale=0.1 / (2 * 5)
        ... )  # η = 0.1, S = 5
        >>> print(noise.noise_scale, noise.weight_decay)
        0.01 0.0
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
        """The same noise with its numbers in this precision."""
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
    """The noise of a step of SGD, exactly: its drift of a charge is (E[Cₖ₊₁] − Cₖ)/η.

    From C_{k+1} = (1 − 2ηγ)²C_k + ½η²gᵀAg and E[ggᵀ] = f·Σ/S + ∇L∇Lᵀ: the σ² is ηf/(2S), the γ is
    γ(1 − ηγ), and ∇L∇Lᵀ counts η/2.

    Args:
        example_loss: ℓ.
        data: N examples.
        learning_rate: η.
        batch_size: S; None for all N.
        replacement: f = 1 for examples drawn with replacement, else (N − S)/(N − 1).
        weight_decay: γ.
        name: of the caller, for messages.
        throw: False leaves values inside jit unchecked.
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


class _Scaled(eqx.Module):
    """The example loss ℓ/u."""

    example_loss: ExampleLoss
    unit: Scalar

    def __call__(self, point: Point, example: Example) -> Scalar:
        return self.example_loss(point, example) / self.unit


def in_own_units(noise: SGDNoise, point: Point) -> SGDNoise:
    """The noise on ℓ/u with decay γ/u², which has the same equilibrium; u = 1 if ℓ is moderate.

    Its potential is Φ/u². In float32 squares of gradients overflow from ‖∇ℓ‖ = 2·10¹⁹ on, which
    weights of 10⁶ reach, and an infinite Φ has no minimum.
    """
    coordinates, remainder = _tree.split(point)
    value = example_value(noise.example_loss, remainder)
    size = _tree.size(coordinates)
    losses = over_chunks(lambda example: value(coordinates, example), noise.data, size)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(losses)))
    # A power of 2, so that the division does not round.
    is_large = jnp.isfinite(largest) & (largest > float(jnp.finfo(largest.dtype).max) ** 0.15)
    unit = jnp.where(is_large, jnp.exp2(jnp.floor(jnp.log2(jnp.where(is_large, largest, 1)))), 1)
    # Without noise Φ is the decay alone, and γ/u² would vanish.
    has_noise = noise.noise_scale > 0
    if noise.mean_scale is not None:
        has_noise |= noise.mean_scale > 0
    # XLA makes γ/u/u a quotient by u², which overflows; products it leaves as they are.
    inverse = jnp.where(has_noise, 1 / unit, 1)
    decay = noise.weight_decay * inverse * inverse
    scaled = _Scaled(noise.example_loss, unit), decay.astype(noise.weight_decay.dtype)
    return eqx.tree_at(lambda noise: (noise.example_loss, noise.weight_decay), noise, scaled)


def checked_decay(name: str, weight_decay: Any) -> Array:
    return checked_nonnegative(f"{name}: weight_decay", weight_decay, "It is the γ of γ‖θ‖².")
