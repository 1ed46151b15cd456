"""The columns of a Jacobian that belong to one leaf, and the products that they must offer."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow.linalg.jacobian._views import apply_view, pull_view, View

# On NVIDIA GPUs float32 products default to TF32, three digits: too few for projections.


class AbstractBlock(eqx.Module):
    """The columns of J that belong to one leaf, as one use of it makes them.

    There are k rows for each of n examples. Every array that a block holds has a leading axis of n
    examples: the Gram matrix of many examples is computed in strips, which are cut along it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.structured_jacobian(jnp.dot, jnp.ones(2), jnp.array([[3.0, 4.0]]))
        >>> ((block,),) = jacobian.blocks
        >>> print(isinstance(block, linalg.AbstractBlock), block.norms())
        True [[25.]]
    """

    @abc.abstractmethod
    def mv(self, leaf: Array) -> Float[Array, "n k"]:
        """J v for a vector that lives on this leaf."""

    @abc.abstractmethod
    def transpose_mv(self, weights: Float[Array, "n k"]) -> Array:
        """Jᵀ w, in the shape of the leaf."""

    @abc.abstractmethod
    def rows(self) -> Float[Array, "n k ..."]:
        """The rows themselves, n·k times the size of the leaf."""

    @abc.abstractmethod
    def cross_gram(self, other: "AbstractBlock") -> Float[Array, "n k m l"]:
        """Inner products with the rows of another block of the same leaf."""

    @abc.abstractmethod
    def norms(self) -> Float[Array, "n k"]:
        """Squared norms of the rows."""

    @abc.abstractmethod
    def column_norms(self) -> Array:
        """Sums over all rows of their squared entries, in the shape of the leaf."""


class AbstractPositionBlock(AbstractBlock):
    """A block whose rows are sums over positions, at each of which the leaf is used alike."""

    @abc.abstractmethod
    def merged(self) -> "AbstractPositionBlock":
        """An axis of steps, in all arrays before that of the examples, becomes more positions."""


class LeafView(NamedTuple):
    """A leaf as a use sees it: rearranged, by static steps.

    Args:
        steps: the rearrangements; hashable, so that equal models compile once.
        shape: the shape of the leaf itself.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.LeafView((), (2,)).apply(jnp.array([1.0, 2.0])))
        [1. 2.]
    """

    steps: View
    shape: tuple[int, ...]

    def apply(self, leaf: Array) -> Array:
        """The rearranged leaf, as the use sees it."""
        return apply_view(self.steps, leaf)

    def pull(self, value: Array) -> Array:
        """The transpose of `apply`: from what the use sees back to the leaf."""
        return pull_view(self.steps, self.shape, value)

    def then(self, steps: View) -> "LeafView":
        """The same leaf, further rearranged."""
        return LeafView(self.steps + steps, self.shape)


Place = tuple[Any, Any, Any]
"""Position in the first block, position in the second, batch index of the weight."""


def accumulate(fn: Callable[[Any], Array], xs: Any) -> Array:
    """Σ fn(x), with the memory of one term in reverse mode too."""
    structure = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))
    step = jax.checkpoint(lambda total, x: (total + fn(x), None))
    return jax.lax.scan(step, jnp.zeros(structure.shape, structure.dtype), xs)[0]


def column_norms_of_rows(block: AbstractBlock) -> Array:
    """Squares of explicit rows, one example at a time: rows are sums, and have no short squares."""
    one = lambda example: jax.tree.map(lambda x: x[None], example)
    return accumulate(lambda example: jnp.sum(one(example).rows() ** 2, axis=(0, 1)), block)


def over_positions(fn: Callable[[Place], Array], counts: tuple[int, int, int]) -> Array:
    """Σ fn over all pairs of positions."""
    grid = jnp.meshgrid(*map(jnp.arange, counts), indexing="ij")
    return accumulate(fn, tuple(axis.reshape(-1) for axis in grid))


def merge_positions(part: Float[Array, "steps n k T ..."]) -> Float[Array, "n k stepsT ..."]:
    """Steps in front of the outputs become positions behind them."""
    part = jnp.moveaxis(part, 0, 2)
    return part.reshape(*part.shape[:2], -1, *part.shape[4:])


def rearranged(steps: View, array: Array, num_axes: int) -> Array:
    """The steps of a view for all members of the first axes: of examples, of outputs."""
    fn = lambda x: apply_view(steps, x)
    for _ in range(num_axes):
        fn = jax.vmap(fn)
    return fn(array)


def inner_products(x: Float[Array, "n k f"], y: Float[Array, "m l f"]) -> Float[Array, "n k m l"]:
    """The inner products of all pairs of vectors."""
    return einsum("nkf,mlf->nkml", x, y)


def einsum(spec: str, *arrays: Array) -> Array:
    """`jax.numpy.einsum` in which axes of size one are broadcast, and cost no operations."""
    inputs, output = spec.split("->")
    kept, squeezed, sizes = [], [], {}
    for letters, array in zip(inputs.split(","), arrays, strict=True):
        named = dict(zip(letters, array.shape, strict=True))
        long = {letter: size for letter, size in named.items() if size != 1}
        sizes |= long
        kept.append("".join(long))
        squeezed.append(array.reshape(tuple(long.values())))
    found = "".join(letter for letter in output if letter in sizes)
    product = _precision.einsum(",".join(kept) + "->" + found, *squeezed)
    return product.reshape([sizes.get(letter, 1) for letter in output])


def times(x: Array, y: Array) -> Array:
    """x·y, broadcast in one operation: `jax.numpy` takes three."""
    shape = jnp.broadcast_shapes(x.shape, y.shape)

    def full(z: Array) -> Array:
        axes = [axis for axis, size in enumerate(z.shape) if size == shape[axis]]
        return jax.lax.broadcast_in_dim(z.reshape([shape[axis] for axis in axes]), shape, axes)

    return (x if x.shape == shape else full(x)) * (y if y.shape == shape else full(y))
