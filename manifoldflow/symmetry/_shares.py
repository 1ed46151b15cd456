"""The shares of slices of leaves in ∇ℓ·θ, example by example.

A rescaling multiplies slice j of some leaves by c and slice j of others by c⁻ᵖ. It leaves ℓ as it
is where the shares Σ∇ℓ∘θ of the former are p times those of the latter. So symmetries are linear
relations between shares, and no layer's class need be known.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._types import Coordinates, Example, Point
from manifoldflow.symmetry._gradients import (
    example_value,
    ExampleLoss,
    num_examples,
    over_chunks,
)
from manifoldflow.symmetry._views import View

# So many shares of all examples together are kept, and so long an axis may be.
_NUMBERS, _LONGEST = 2**23, 2**13


class Slices(NamedTuple):
    """The slices of a leaf along a view."""

    leaf: int  # its number among all
    view: View


class Shares(NamedTuple):
    """Shares at several points, one after the other: (rows, n) for each of the slices."""

    of: dict[Slices, np.ndarray]
    totals: np.ndarray  # (rows, leaves)
    losses: np.ndarray  # (rows,)
    sizes: np.ndarray  # (leaves,), the root mean square of Σ|∇ℓ∘θ|


def plain_slices(coordinates: Coordinates) -> list[Slices]:
    """The slices along every axis of each leaf, and along neighbouring axes where others fit."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(coordinates)]
    single = [
        Slices(i, View((axis,)))
        for i, shape in enumerate(shapes)
        for axis in range(len(shape))
        if shape[axis] <= _LONGEST
    ]
    pairs = [
        Slices(i, View((axis, axis + 1)))
        for i, shape in enumerate(shapes)
        for axis in range(len(shape) - 1)
        if 1 < min(shape[axis], shape[axis + 1])
    ]
    length = lambda one: one.view.length(shapes[one.leaf])
    # Kernels with an axis of heads have three axes or more; biases among them, two.
    of_heads = {length(one) for one in pairs if len(shapes[one.leaf]) > 2}
    lengths = [length(one) for one in single + pairs]
    near = [p for p in pairs if length(p) in of_heads and lengths.count(length(p)) > 1]
    return single + [p for p in near if length(p) <= _LONGEST]


def shares_of(
    example_loss: ExampleLoss, points: list[Point], data: PyTree[Array], slices: list[Slices]
) -> Shares:
    """The shares at all of these points, of the examples that there is room for."""
    coordinates, _ = _tree.split(points[0])
    shapes = [leaf.shape for leaf in jax.tree.leaves(coordinates)]
    numbers = len(points) * (sum(s.view.length(shapes[s.leaf]) for s in slices) + 2 * len(shapes))
    count = num_examples(data)
    # Examples from all over: files are often sorted by class.
    kept = np.linspace(0, count - 1, min(count, max(2, _NUMBERS // numbers))).astype(int)
    data = jax.tree.map(lambda leaf: leaf[kept], data)
    found = [_measured(example_loss, point, data, tuple(slices)) for point in points]
    found = jax.tree.map(lambda *parts: np.concatenate(parts).astype(float), *found)
    sums, totals, losses, sizes = found
    return Shares(dict(zip(slices, sums)), totals, losses, np.sqrt(np.mean(sizes**2, axis=0)))


@eqx.filter_jit
def _measured(
    example_loss: ExampleLoss, point: Point, data: PyTree[Array], slices: tuple[Slices, ...]
) -> tuple[Any, Any, Any, Any]:
    coordinates, remainder = _tree.split(point)
    value = example_value(example_loss, remainder)

    def of_example(example: Example) -> tuple[list[Array], Array, Array, Array]:
        loss, gradient = jax.value_and_grad(value)(coordinates, example)
        products = jax.tree.leaves(jax.tree.map(jnp.multiply, gradient, coordinates))
        sums = [jnp.sum(s.view.rows(products[s.leaf]), axis=1) for s in slices]
        totals = jnp.stack([jnp.sum(leaf) for leaf in products])
        return sums, totals, loss, jnp.stack([jnp.sum(jnp.abs(leaf)) for leaf in products])

    with _precision.full_precision():
        return over_chunks(of_example, data, _tree.size(coordinates))
