"""Explicit rows: what is kept of a leaf where nothing smaller is known.

A row of a bias or of a scale has the size of the leaf, and is all that there is to keep. A leaf
with a use that is not understood keeps its rows too, which then cost n times its size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow.linalg.jacobian._block import AbstractBlock, inner_products, LeafView

DENSE_ROWS = "dense rows"
"""What `treatments` says of a leaf with a use that is not understood."""


class RowBlock(AbstractBlock):
    """Explicit rows."""

    array: Float[Array, "n k ..."]

    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        return _precision.tensordot(self.array, leaf, axes=leaf.ndim)

    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        return _precision.tensordot(weights, self.array, axes=2)

    def rows(self) -> Float[Array, "n k ..."]:
        return self.array

    def cross_gram(self, other: AbstractBlock) -> Float[Array, "n k m l"]:
        # As for factors: the compiler then sees that δ·δ of a bias is that of its weight.
        flat = lambda rows: rows.reshape(*rows.shape[:2], -1)
        return inner_products(flat(self.array), flat(other.rows()))

    def norms(self) -> Float[Array, "n k"]:
        return jnp.sum(self.array**2, axis=tuple(range(2, self.array.ndim)))

    def column_norms(self) -> Array:
        return jnp.sum(self.array**2, axis=(0, 1))


def rows_of(
    use: Callable[[Array, Any], Array],
    delta: Float[Array, "n k ..."],
    factor: Any,
    leaf: LeafView,
) -> RowBlock:
    """The rows of a linear use: the transpose of z = use(view of the leaf, factor), on δ."""
    structure = jax.ShapeDtypeStruct(leaf.shape, delta.dtype)

    def of_example(delta: Array, factor: Any) -> Float[Array, "k ..."]:
        shown = lambda x: jnp.broadcast_to(use(leaf.apply(x), factor), delta.shape[1:])
        return jax.vmap(lambda d: jax.linear_transpose(shown, structure)(d)[0])(delta)

    return RowBlock(jax.vmap(of_example)(delta, factor))
