"""The Jacobian of more examples than memory holds: formed a chunk at a time, never kept."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _mesh, _tree
from manifoldflow._boundary import checked
from manifoldflow._types import Coordinates, Example, Tangent
from manifoldflow.linalg.jacobian._operator import AbstractJacobian
from manifoldflow.linalg.jacobian._structured import structured_jacobian, StructuredJacobian


class ChunkedJacobian(AbstractJacobian):
    """The Jacobian of `fn` on all examples, through the structured Jacobians of chunks of them.

    Products, row norms and their derivatives cost what they cost on all examples at once, plus one
    more pass through the model. A Gram matrix of m chunks costs m such passes. The memory is that
    of two chunks and of the result.

    Args:
        fn: maps coordinates and one example to an array of k numbers; a PyTree, so that derivatives
            in what it holds are kept (`equinox.filter_closure_convert`).
        coordinates: of the point.
        data: PyTree with a leading axis of examples.
        chunk_size: the number of examples at a time.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> found = linalg.chunked_jacobian(jnp.dot, jnp.zeros(2), jnp.ones((5, 2)), 2)
        >>> print(isinstance(found, linalg.ChunkedJacobian), found.row_norms_squared())
        True [2. 2. 2. 2. 2.]
    """

    fn: Callable[..., Any]
    coordinates: Coordinates
    data: PyTree[Array]
    chunk_size: int = eqx.field(static=True)

    def _jacobian(self, chunk: PyTree[Array]) -> StructuredJacobian:
        return structured_jacobian(self.fn, self.coordinates, chunk)

    @property
    def _num_examples(self) -> int:
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def _num_outputs(self) -> int:
        return eqx.filter_eval_shape(self.fn, self.coordinates, self._example(0)).size

    def _example(self, index: int) -> Example:
        return jax.tree.map(lambda leaf: leaf[index], self.data)

    @property
    def _shares(self) -> tuple[int, int, int]:
        """The number of devices that share the examples, and the chunks of a share."""
        num_shares = _mesh.num_shares(self._num_examples)
        size = max(1, self.chunk_size // num_shares)
        return num_shares, self._num_examples // num_shares // size, size

    @property
    def _has_tail(self) -> bool:
        num_shares, full, size = self._shares
        return num_shares * full * size < self._num_examples

    def _chunks(self, *others: Array) -> tuple[PyTree[Array], PyTree[Array]]:
        """All full chunks, stacked, and the examples that are left: the same of every share.

        A chunk that crossed the borders of shares would be sent from device to device.
        """
        num_shares, full, size = self._shares

        def stacked(x: Array) -> Array:
            shares = x.reshape(num_shares, -1, *x.shape[1:])[:, : full * size]
            chunks = shares.reshape(num_shares, full, size, *x.shape[1:]).swapaxes(0, 1)
            return chunks.reshape(full, -1, *x.shape[1:])

        def left(x: Array) -> Array:
            shares = x.reshape(num_shares, -1, *x.shape[1:])[:, full * size :]
            return shares.reshape(-1, *x.shape[1:])

        every = (self.data, *others)
        return jax.tree.map(stacked, every), jax.tree.map(left, every)

    def _over_rows(self, fn: Callable[[Any], Array]) -> Float[Array, "n ..."]:
        """`fn` of every chunk of data, one result for each of its rows."""
        (head,), (tail,) = self._chunks()
        num_shares = self._shares[0]
        # Without the checkpoint, reverse mode would keep all chunks after all.
        parts = jax.lax.map(jax.checkpoint(fn), head)
        shape = parts.shape[2:]
        parts = parts.reshape(len(parts), num_shares, -1, *shape).swapaxes(0, 1)
        parts = parts.reshape(num_shares, -1, *shape)
        if self._has_tail:
            rest = fn(tail).reshape(num_shares, -1, *shape)
            parts = jnp.concatenate([parts, rest], axis=1)
        return parts.reshape(-1, *shape)

    def mv(self, vector: Tangent) -> Float[Array, " n"]:
        return self._over_rows(lambda chunk: self._jacobian(chunk).mv(vector))

    def transpose_mv(self, vector: Float[Array, " n"]) -> Tangent:
        weights = vector.reshape(self._num_examples, self._num_outputs)
        head, tail = self._chunks(weights)

        @jax.checkpoint
        def add(total: Tangent, chunk: Any) -> tuple[Tangent, None]:
            data, weights = chunk
            part = self._jacobian(data).transpose_mv(weights.reshape(-1))
            return _tree.add(total, part), None

        zeros = jax.tree.map(jnp.zeros_like, self.coordinates)
        total, _ = jax.lax.scan(add, zeros, head)
        return add(total, tail)[0] if self._has_tail else total

    def cross_gram(self, other: "ChunkedJacobian") -> Float[Array, "n m"]:
        def strip(chunk: Any) -> Float[Array, "rows m"]:
            mine = self._jacobian(chunk)
            return other._over_rows(lambda theirs: other._jacobian(theirs).cross_gram(mine)).T

        return self._over_rows(strip)

    def gram_triangle(self) -> Float[Array, "n n"]:
        return self.cross_gram(self)

    def distributed_gram(self) -> Float[Array, "n n"]:
        return _mesh.over_all(self.cross_gram(self))

    def row_norms_squared(self) -> Float[Array, " n"]:
        return self._over_rows(lambda chunk: self._jacobian(chunk).row_norms_squared())

    def column_norms_squared(self) -> Tangent:
        (head,), (tail,) = self._chunks()

        @jax.checkpoint
        def add(total: Tangent, chunk: Any) -> tuple[Tangent, None]:
            return _tree.add(total, self._jacobian(chunk).column_norms_squared()), None

        zeros = jax.tree.map(jnp.zeros_like, self.coordinates)
        total, _ = jax.lax.scan(add, zeros, head)
        return add(total, tail)[0] if self._has_tail else total

    def rows(self) -> PyTree[Float[Array, "n ..."]]:
        return structured_jacobian(self.fn, self.coordinates, self.data).rows()

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return _tree.structure_of(self.coordinates)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        size = self._num_examples * self._num_outputs
        return jax.ShapeDtypeStruct((size,), _tree.dtype_of(self.coordinates))


@checked
def chunked_jacobian(
    fn: Callable[[Coordinates, Example], Array],
    coordinates: Coordinates,
    data: PyTree[Array],
    chunk_size: int,
) -> ChunkedJacobian:
    """The `jacobian`, formed anew for `chunk_size` examples at a time wherever it is used.

    Args:
        fn: maps coordinates and one example to an array of k numbers.
        coordinates: of the point.
        data: PyTree with a leading axis of N examples.
        chunk_size: the number of examples at a time.

    Returns:
        A `ChunkedJacobian`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> chunked = linalg.chunked_jacobian(
        ...     jnp.dot, jnp.zeros(2), jnp.arange(6.0).reshape(3, 2), 2
        ... )
        >>> print(chunked.mv(jnp.array([1.0, 1.0])))
        [1. 5. 9.]
    """
    num_examples = jax.tree.leaves(data)[0].shape[0]
    example = jax.tree.map(lambda leaf: leaf[0], data)
    # Arrays that the function closes over become leaves: derivatives in them then pass `scan` and
    # `checkpoint`, and `frozen` finds them.
    fn = eqx.filter_closure_convert(fn, coordinates, example)
    return ChunkedJacobian(fn, coordinates, data, min(chunk_size, num_examples))
