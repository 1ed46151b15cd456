"""The search for matrices that enter a loss only as their product."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._types import Example, Point, Tangent
from manifoldflow.symmetry._find import Search, search
from manifoldflow.symmetry._gradients import (
    example_value,
    ExampleLoss,
    num_examples,
    over_chunks,
)
from manifoldflow.symmetry._paths import layer_names
from manifoldflow.symmetry._products import ProductSymmetry
from manifoldflow.symmetry._relations import Relation, relations

# The number of examples whose matrices are looked at; the check takes all.
_LOOK = 16


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """Picks leaves by their numbers."""

    numbers: tuple[int, ...]

    def __call__(self, tree: Any) -> tuple[Any, ...]:
        leaves = jax.tree.leaves(tree)
        return tuple(leaves[number] for number in self.numbers)


@checked_concrete
def find_products(
    network: Point,
    example_loss: ExampleLoss,
    data: PyTree[Any],
    *,
    tolerance: float | None = None,
) -> list[ProductSymmetry]:
    """The products of matrices in a network: (U, W) ↦ (UQ⁻¹, QW) changes no loss, for every Q.

    These are linear layers with nothing between them and, in every head of attention, queries and
    keys, values and outputs, with their biases. Nothing is read off classes. A rescaling of neurons
    of degree 1, as `find_rescalings` finds it, belongs to a product where ∇_WWᵀ = Uᵀ∇_U on every
    example, for all neurons together or for equal blocks of them, such as heads. Each candidate is
    checked at the network and at weights a tenth away. Not for use inside jit.

    Args:
        network: any network, of finite weights.
        example_loss: ℓ(network, example) → scalar; see `examples_of` for losses.
        data: PyTree of arrays with a leading axis of examples, more than one.
        tolerance: of `check_symmetry`.

    Returns:
        The `ProductSymmetry`s found, in order, for `balance`; an empty list if there are none.

    Raises:
        ValueError: a network with NaN or infinite weights; wrong data; a call inside jit.

    Examples:
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> net = {"W": jr.normal(jr.key(0), (3, 2)), "U": jr.normal(jr.key(1), (2, 3))}
        >>> loss = lambda p, x: ((p["U"] @ (p["W"] @ x) - 1.0) ** 2).sum()
        >>> (found,) = symmetry.find_products(net, loss, jr.normal(jr.key(2), (16, 2)))
        >>> print(found.size(net), found.num_blocks)
        3 1
    """
    found = search(network, example_loss, data, tolerance, "find_products")
    by_neuron = relations(found.shares, found.shapes, found.tolerance**0.5)
    wholes = [whole for whole in (_whole(found, one) for one in by_neuron) if whole is not None]
    if not wholes:
        return []
    step = max(num_examples(found.data) // _LOOK, 1)
    some = jax.tree.map(lambda leaf: leaf[::step], found.data)
    seen = [_squares(found.example_loss, p, some, tuple(wholes)) for p in found.points]
    several = []
    for index, whole in enumerate(wholes):
        gaps, terms = (sum(np.asarray(s[index][i]) for s in seen) for i in (0, 1))
        several.append(_in_blocks(found, whole, gaps <= found.tolerance * np.max(terms)))
    return [product for product in several if product is not None]


def _whole(found: Search, relation: Relation) -> ProductSymmetry | None:
    """The product that a relation of neurons may belong to, all of them in one block."""
    leaves = [s.leaf for s in relation.second + relation.first]
    if relation.degree != 1 or len(set(leaves)) < len(leaves):
        return None
    sides = relation.second, relation.first
    second, first = (layer_names(found.leaves, [s.leaf for s in side]) for side in sides)
    return ProductSymmetry(
        _Leaves(tuple(leaves)),
        tuple(s.view for side in sides for s in side),
        (1,) * len(relation.second) + (-1,) * len(relation.first),
        1,
        f"{first} against {second}",
    )


def _in_blocks(
    found: Search, whole: ProductSymmetry, is_zero: np.ndarray
) -> ProductSymmetry | None:
    """The product in the largest blocks of more than one neuron that are symmetries."""
    for blocks in range(1, len(is_zero) // 2 + 1):
        size, rest = divmod(len(is_zero), blocks)
        # From one block on: fewer blocks are the larger group.
        if not rest and _diagonal_blocks(is_zero, size).all():
            product = dataclasses.replace(whole, num_blocks=blocks)
            if found.verified(product):
                return product
    return None


def _diagonal_blocks(matrix: np.ndarray, size: int) -> np.ndarray:
    count = len(matrix) // size
    blocks = matrix.reshape(count, size, count, size)
    return np.stack([blocks[i, :, i] for i in range(count)])


@eqx.filter_jit
def _squares(
    example_loss: ExampleLoss,
    point: Point,
    data: PyTree[Array],
    products: tuple[ProductSymmetry, ...],
) -> list[tuple[Array, Array]]:
    """The mean squares of ∇_WWᵀ − Uᵀ∇_U and of both terms, entry by entry, for each product."""
    x, remainder = _tree.split(point)
    value = example_value(example_loss, remainder)
    sides = [product.sides(x) for product in products]

    def of_example(example: Example) -> list[tuple[Array, Array]]:
        gradient: Tangent = jax.grad(value)(x, example)
        found = []
        for product, (u, w) in zip(products, sides):
            of_u, of_w = product.sides(gradient)
            one, other = (_precision.matmul(a[0], b[0].T) for a, b in ((of_w, w), (u, of_u)))
            found.append(((one - other) ** 2, one**2 + other**2))
        return found

    with _precision.full_precision():
        seen = over_chunks(of_example, data, _tree.size(x))
    return jax.tree.map(lambda squares: jnp.mean(squares, axis=0), seen)
