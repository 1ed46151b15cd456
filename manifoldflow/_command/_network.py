"""The network that is walked: its construction, its training and its measures."""

import argparse
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._command._waiting import Waiting
from manifoldflow.limits import limit_map_with_info
from manifoldflow.losses import LeastSquares

NUM_STEPS = 1500
MAX_ROUNDS = 4
SMALL = 1e-3  # of the loss of guessing the mean: from there the limit map does the rest exactly


def network(inputs: Array, targets: Array, options: argparse.Namespace) -> eqx.nn.MLP:
    """One hidden layer of tanh units."""
    sizes = inputs.shape[1], targets.shape[1], options.width, 1
    model = eqx.nn.MLP(*sizes, activation=jnp.tanh, key=jr.key(options.seed))
    return jax.tree.map(
        lambda leaf: options.init_scale * leaf if eqx.is_inexact_array(leaf) else leaf, model
    )


def landed_network(loss: LeastSquares, model: eqx.nn.MLP, is_raw: bool) -> eqx.nn.MLP:
    """Trained by Adam, then by gradient flow to zero loss.

    Args:
        loss: on the training examples.
        model: the start of training.
        is_raw: True if the data are as they came, and not standardised.

    Raises:
        ValueError: it did not get there.
    """
    guess = float(jnp.mean(jnp.var(loss.targets, axis=0)) / 2)
    with Waiting("compiling the training, and training"):
        reached = float(loss(model))
        for _ in range(MAX_ROUNDS):
            model = train(loss, model)
            reached = float(loss(model))
            if not reached > SMALL * guess:
                break
    print(f"trained by Adam:        loss {reached:.1e}")
    with Waiting("compiling the gradient flow, and landing on the manifold"):
        landed, info = limit_map_with_info(loss, model)
        is_there = bool(info.is_successful)
    if not is_there:
        raise ValueError(
            f"training did not fit the examples: the loss is {reached:.2g}, where guessing the "
            f"mean has {guess:.2g}, and gradient flow from there finds no perfect fit. "
            + ("Leave out --no-standardise, or use" if is_raw else "Use")
            + " a wider model (--width), fewer --examples, or another --init-scale or --seed."
        )
    return landed


@eqx.filter_jit
def train(loss: LeastSquares, model: eqx.nn.MLP, num_steps: int = NUM_STEPS) -> eqx.nn.MLP:
    """Full-batch Adam, to a small loss; the limit map does the rest exactly."""
    coordinates, remainder = loss.split(model)
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def step(carry: tuple, _: None) -> tuple:
        x, state = carry
        updates, state = optimiser.update(loss.gradient(_tree.join(x, remainder)), state)
        return (optax.apply_updates(x, updates), state), None

    carry = (coordinates, optimiser.init(coordinates))
    (coordinates, _), _ = jax.lax.scan(step, carry, length=num_steps)
    return _tree.join(coordinates, remainder)


def performance(inputs: Array, targets: Array, is_classes: bool) -> Callable[[Any], Array]:
    """The accuracy of classes, the mean square error of numbers."""
    return (_Accuracy if is_classes else _MeanSquare)(inputs, targets)


class _Accuracy(eqx.Module):
    """A module and no closure: other data of the same shapes run the same program."""

    inputs: Array
    targets: Array

    def __call__(self, model: Callable[[Array], Array]) -> Array:
        guesses = jnp.argmax(jax.vmap(model)(self.inputs), axis=1)
        return jnp.mean(guesses == jnp.argmax(self.targets, axis=1))


class _MeanSquare(eqx.Module):
    inputs: Array
    targets: Array

    def __call__(self, model: Callable[[Array], Array]) -> Array:
        return jnp.mean((jax.vmap(model)(self.inputs) - self.targets) ** 2)
