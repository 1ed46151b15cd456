"""The balanced network: the one point of the orbit of its rescalings with the least norm.

Sharpness alone depends on where on that orbit a network is, though it is the same function. The
programs are those of the report: nothing is compiled for it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point
from manifoldflow.diagnostics._passes import outputs_at, pulled
from manifoldflow.losses import AbstractExampleLoss

# So many random combinations of outputs have derivatives along an orbit, or have none.
_DRAWS = 4
_SWEEPS = 1000


class _Pair:
    """Two consecutive `equinox.nn.Linear` layers, their places among all, and their rescalings.

    Along the rates 1 and −p of what comes before and after a neuron, squares S and T of their
    norms are least in sum where e^{2λ}S = p·e^{−2pλ}T.
    """

    def __init__(self, first: int, second: int):
        self.first, self.second = first, second
        self.degree, self.is_each = 0.0, False

    def shares(self, gradient: list[Any], layers: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """g∘θ summed over what comes before each neuron, and over what comes after."""
        first, second = (
            _map(np.multiply, gradient[i], layers[i]) for i in (self.first, self.second)
        )
        before = first[0].sum(axis=1) + (0 if first[1] is None else first[1].reshape(-1))
        return before, second[0].sum(axis=0)

    def look(self, before: np.ndarray, after: np.ndarray, tolerance: float) -> bool:
        """True where outputs do not see the layer's rescaling; notes that of neurons as well."""
        x, y = before.sum(axis=1), after.sum(axis=1)
        if not (np.isfinite(before).all() and np.abs(y).max() > 0):
            return False
        degree = float(x @ y / (y @ y))
        nearest = float(np.rint(degree))
        self.degree = nearest if abs(degree - nearest) <= tolerance else degree
        if self.degree <= 0:
            return False
        size = np.abs(before).sum(axis=1).max() + self.degree * np.abs(after).sum(axis=1).max()
        is_layer = bool(np.abs(x - self.degree * y).max() <= tolerance * size)
        apart = np.abs(before - self.degree * after).max(axis=0)
        scale = np.abs(before).max() + self.degree * np.abs(after).max()
        self.is_each = bool(np.all(apart <= tolerance * scale))
        return is_layer

    def step(self, layers: list[Any], by_neuron: bool) -> float:
        """The layers, in place, where their norms are least; the largest logarithm of a factor."""
        (weight, bias), (after, _) = layers[self.first], layers[self.second]
        up = (weight**2).sum(axis=1) + (0 if bias is None else bias.reshape(-1) ** 2)
        down = (after**2).sum(axis=0)
        if not (by_neuron and self.is_each):
            up, down = np.full(len(up), up.sum()), np.full(len(down), down.sum())
        is_finite = (up > 0) & (down > 0)
        ratio = np.where(is_finite, self.degree * down / np.where(is_finite, up, 1), 1)
        # e^{2λ}S = p·e^{−2pλ}T has λ = ln(pT/S)/(2 + 2p).
        logs = np.log(ratio) / (2 * (1 + self.degree))
        weight *= np.exp(logs)[:, None]
        if bias is not None:
            bias *= np.exp(logs).reshape(bias.shape)
        after *= np.exp(-self.degree * logs)
        return float(np.abs(logs).max())


def least_norm(
    part: AbstractExampleLoss, point: Point, random: np.random.Generator
) -> tuple[Point, str]:
    """The balanced network, and of what the norms are balanced: "neurons" or "layers".

    Args:
        part: of the loss, by which the rescalings are found.
        point: with `equinox.nn.Linear` layers.
        random: for combinations of outputs.

    Raises:
        ValueError: no rescaling was found.
    """
    coordinates, remainder = part.split(point)
    layers = _layers(coordinates)
    pairs = _pairs(layers)
    if not pairs:
        raise ValueError(
            _nothing("it is looked for between equinox.nn.Linear layers, and no two are in a row")
        )
    outputs = outputs_at(part, point)
    found = _shares(part, point, pairs, outputs.slopes, random)
    tolerance = _tree.eps_of(coordinates) ** (1 / 3)
    pairs = [pair for pair in pairs if pair.look(*found[pair], tolerance)]
    if not pairs:
        raise ValueError(
            _nothing("between these equinox.nn.Linear layers no activation is homogeneous, as ReLU")
        )
    for by_neuron in (True, False):
        moved = [_map(np.array, layer) for layer in layers]
        for _ in range(_SWEEPS):
            if max(pair.step(moved, by_neuron) for pair in pairs) < 1e-9:
                break
        balanced = _tree.join(_with_layers(coordinates, moved), remainder)
        after = outputs_at(part, balanced)
        change = jnp.max(jnp.abs(after.slopes - outputs.slopes)) / jnp.max(jnp.abs(outputs.slopes))
        if float(change) <= tolerance:
            is_each = by_neuron and all(pair.is_each for pair in pairs)
            return balanced, "neurons" if is_each else "layers"
    raise ValueError(f"what looked like rescalings changed the outputs by {float(change):.1g}")


def _nothing(why: str) -> str:
    return (
        f"no rescaling was found: {why}. symmetry.balance(model, loss, kind='norm') looks between "
        "layers of any kind; report on what it returns."
    )


def _shares(
    part: AbstractExampleLoss, point: Point, pairs: list[_Pair], like: Any, random: Any
) -> dict[_Pair, tuple[np.ndarray, np.ndarray]]:
    """The shares of all pairs, at the model and at weights a tenth away, where chance breaks."""
    coordinates, remainder = part.split(point)
    flat, unravel = _tree.ravel(coordinates)
    rows: dict[_Pair, list[Any]] = {pair: [] for pair in pairs}
    kicks = random.standard_normal(flat.shape, np.float32)
    for shake in (0.0, 0.1):
        there = unravel(flat * (1 + jnp.asarray(shake * kicks, flat.dtype)))
        layers = _layers(there)
        for _ in range(_DRAWS):
            drawn = jnp.asarray(random.standard_normal(like.shape), like.dtype)
            gradient = _layers(unravel(pulled(part, _tree.join(there, remainder), drawn)))
            for pair in pairs:
                rows[pair].append(pair.shares(gradient, layers))
    stacked = {pair: [np.stack(part) for part in zip(*found)] for pair, found in rows.items()}
    return {pair: (before, after) for pair, (before, after) in stacked.items()}


def _pairs(layers: list[Any]) -> list[_Pair]:
    """Each layer against the next one that takes as many inputs as it has outputs."""
    found = []
    for index, (weight, _) in enumerate(layers):
        later = (i for i in range(index + 1, len(layers)) if layers[i][0].shape[1] == len(weight))
        found += [_Pair(index, other) for other in [next(later, None)] if other is not None]
    return found


def _is_layer(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear) and node.weight is not None


def _layers(coordinates: Coordinates) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Weights and biases, in double precision."""
    nodes = [x for x in jax.tree.leaves(coordinates, is_leaf=_is_layer) if _is_layer(x)]
    return [_map(lambda x: np.asarray(x, float), (n.weight, n.bias)) for n in nodes]


def _with_layers(coordinates: Coordinates, layers: list[Any]) -> Coordinates:
    following = iter(layers)

    def replaced(node: Any) -> Any:
        if not _is_layer(node):
            return node
        new = next(following)
        leaves = [n for n in (node.weight, node.bias) if n is not None]
        given = [jnp.asarray(x, leaf.dtype) for x, leaf in zip(new, leaves)]
        where = lambda layer: [n for n in (layer.weight, layer.bias) if n is not None]
        return eqx.tree_at(where, node, given)

    return jax.tree.map(replaced, coordinates, is_leaf=_is_layer)


def _map(fn: Any, *pairs: Any) -> tuple[np.ndarray, np.ndarray | None]:
    weights, biases = zip(*pairs)
    return fn(*weights), None if biases[0] is None else fn(*biases)
