"""Finding the rescaling symmetries of a network, by the gradients of its examples."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_positive
from manifoldflow._types import Example, Point, Tangent
from manifoldflow.symmetry._check import check_symmetry, default_tolerance, SymmetryCheck
from manifoldflow.symmetry._constructors import linear_rescaling
from manifoldflow.symmetry._gradients import (
    checked_examples,
    example_value,
    ExampleLoss,
    over_chunks,
)
from manifoldflow.symmetry._symmetry import ExponentialSymmetry


class Rescaling(eqx.Module):
    """A rescaling symmetry that was found.

    Attributes:
        symmetry: the first layer grows, the second shrinks `degree` times as fast.
        first: the path of the first layer in the network.
        second: the path of the second.
        neuron: the output of the first layer, or None for all of them together.
        degree: of the activation between them, φ(cz) = c^degree φ(z).
        check: how well the symmetry holds.
    """

    symmetry: ExponentialSymmetry
    first: str = eqx.field(static=True)
    second: str = eqx.field(static=True)
    neuron: int | None = eqx.field(static=True)
    degree: float = eqx.field(static=True)
    check: SymmetryCheck = eqx.field(static=True)

    def __str__(self) -> str:
        which = "" if self.neuron is None else f", neuron {self.neuron}"
        return f"{self.first} against {self.second}{which}, degree {self.degree:g}; {self.check}"


@checked
def find_rescalings(
    network: Point,
    example_loss: ExampleLoss,
    data: PyTree[Any],
    *,
    per_neuron: bool = False,
    tolerance: float | None = None,
) -> list[Rescaling]:
    """The rescalings of consecutive `equinox.nn.Linear` layers under which a loss is the same.

    Layers are taken in the order of the network's PyTree, each against the next one that
    takes as many inputs as it has outputs. Nothing is read off activations: with a
    homogeneous one of degree p, ∇ℓ·(one layer) = p ∇ℓ·(the next) on every example. That
    gives p, and is then checked at the network and at weights a tenth away. Not for use
    inside jit.

    Args:
        network: any Equinox network with linear layers.
        example_loss: ℓ(network, example) → scalar; see `examples_of` for losses.
        data: PyTree of arrays with a leading axis of examples, more than one.
        per_neuron: one symmetry for each neuron, not for each layer.
        tolerance: of `check_symmetry`.

    Returns:
        What was found, in order; an empty list if nothing was. Layers and neurons without
        any gradient (dead ReLUs) are left out: nothing can be told of them.
    """
    data, example_loss = checked_examples(data), _tree.as_pytree_callable(example_loss)
    coordinates, remainder = _tree.split(network)
    if tolerance is None:
        tolerance = default_tolerance(network)
    bound = float(checked_positive("find_rescalings: tolerance", tolerance))
    if not _candidates(network):
        return []
    elsewhere = _tree.join(_shaken(coordinates), remainder)
    # One layer behind another one of them: their shares for every example and neuron.
    shares = [[np.asarray(s) for s in _shares(example_loss, p, data)] for p in (network, elsewhere)]
    found: list[Rescaling] = []
    for index, (first, second) in enumerate(_candidates(network)):
        pairs = [s[index] for s in shares]
        neurons = range(pairs[0].shape[1]) if per_neuron else [None]
        for neuron in neurons:
            rescaling = _verified(
                network, elsewhere, example_loss, data, first, second, neuron, pairs, bound
            )
            found += [] if rescaling is None else [rescaling]
    return found


def _verified(
    network: Point,
    elsewhere: Point,
    example_loss: ExampleLoss,
    data: PyTree[Array],
    first: tuple[str, Callable[[Any], Any]],
    second: tuple[str, Callable[[Any], Any]],
    neuron: int | None,
    pairs: list[Float[np.ndarray, "N neurons 3"]],
    tolerance: float,
) -> Rescaling | None:
    """The rescaling of a pair of layers, if there is one."""
    picked = [p.sum(axis=1) if neuron is None else p[:, neuron] for p in pairs]
    # Query and key projections share their outputs: there the second bias goes along.
    for column, with_bias in ((1, False), (2, True))[: 2 if neuron is None else 1]:
        degree = _degree([(p[:, 0], p[:, column]) for p in picked], tolerance)
        if degree is None:
            continue
        symmetry = linear_rescaling(
            network, first[1], second[1], neuron, degree, with_bias=with_bias
        )
        checks = [
            check_symmetry(symmetry, example_loss, p, data, tolerance=tolerance)
            for p in (network, elsewhere)
        ]
        if all(checks):
            worst = max(checks, key=lambda check: check.defect)
            return Rescaling(symmetry, first[0], second[0], neuron, degree, worst)
    return None


def _degree(pairs: list[tuple[np.ndarray, np.ndarray]], tolerance: float) -> float | None:
    """p > 0 with x = p·y for all pairs (x, y), a small integer if it is one to rounding."""
    x, y = (np.concatenate(parts).astype(float) for parts in zip(*pairs))
    if not np.isfinite([x, y]).all() or not np.max(np.abs(y)) > 0:
        return None
    degree = float(x @ y / (y @ y))
    nearest = float(np.rint(degree))
    degree = nearest if abs(degree - nearest) <= tolerance**0.5 else degree
    size = np.max(np.abs(x)) + abs(degree) * np.max(np.abs(y))
    fits = np.max(np.abs(x - degree * y)) <= tolerance**0.5 * size
    return degree if degree > 0 and fits else None


def _shaken(coordinates: Tangent) -> Tangent:
    """Every leaf moved by a tenth of its size: what holds by chance holds there no more."""
    noise = _tree.random_normal_like(jax.random.key(0), coordinates)
    return jax.tree.map(
        lambda leaf, kick: leaf + 0.1 * jnp.sqrt(jnp.mean(leaf**2)) * kick, coordinates, noise
    )


def _candidates(network: Point) -> list[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Pairs of layers, each as (its path, how to pick it out of the network)."""
    layers = _linear_layers(network)
    pairs = []
    for index, (_, first, pick) in enumerate(layers):
        outputs = first.weight.shape[0]
        later = (c for c in layers[index + 1 :] if c[1].weight.shape[1] == outputs)
        for path, _, pick_second in later:
            pairs.append(((layers[index][0], pick), (path, pick_second)))
            break
    return pairs


def _linear_layers(network: Point) -> list[tuple[str, eqx.nn.Linear, Callable[[Any], Any]]]:
    is_layer = lambda node: isinstance(node, eqx.nn.Linear)
    leaves = jax.tree_util.tree_leaves_with_path(network, is_leaf=is_layer)

    def picker(number: int) -> Callable[[Any], Any]:
        return lambda tree: [x for x in jax.tree.leaves(tree, is_leaf=is_layer) if is_layer(x)][
            number
        ]

    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if is_layer(leaf)]
    return [(path, leaf, picker(number)) for number, (path, leaf) in enumerate(found)]


@eqx.filter_jit
def _shares(
    example_loss: ExampleLoss, network: Point, data: PyTree[Array]
) -> list[Float[Array, "N neurons 3"]]:
    """For each pair and neuron Σ∇ℓ∘θ over the first layer, over the second layer's weight,
    and over that with its bias, which belongs to all of its outputs."""
    coordinates, remainder = _tree.split(network)
    value = example_value(example_loss, remainder)
    pairs = _candidates(network)

    def of_example(example: Example) -> list[Array]:
        products = jax.tree.map(jnp.multiply, jax.grad(value)(coordinates, example), coordinates)

        def share(first: eqx.nn.Linear, second: eqx.nn.Linear) -> Array:
            growing = jnp.sum(first.weight, axis=1)
            growing += 0 if first.bias is None else jnp.sum(first.bias.reshape(len(growing), -1), 1)
            shrinking = jnp.sum(second.weight, axis=0)
            bias = 0 if second.bias is None else jnp.sum(second.bias) / len(shrinking)
            return jnp.stack([growing, shrinking, shrinking + bias], axis=1)

        return [share(first[1](products), second[1](products)) for first, second in pairs]

    with _precision.full_precision():
        return over_chunks(of_example, data, _tree.size(coordinates))
