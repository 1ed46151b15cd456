"""The Jacobian as explicit rows: for small problems, where forming them is cheapest."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _mesh, _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._types import Coordinates, Example, Tangent
from manifoldflow.linalg.jacobian._operator import AbstractJacobian

# TF32 is the default for float32 matrix products on NVIDIA GPUs and loses the
# projections three digits; every product here asks for full float32.


class DenseJacobian(AbstractJacobian):
    """The Jacobian as explicit rows: for every leaf of the point an array (n, *leaf.shape).

    Args:
        leaf_rows: the PyTree of these arrays.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.DenseJacobian({"a": jnp.array([[3.0, 4.0]])})
        >>> print(jacobian.mv({"a": jnp.ones(2)}), jacobian.gram())
        [7.] [[25.]]
    """

    leaf_rows: PyTree[Float[Array, "n ..."]]

    @property
    def _num_rows(self) -> int:
        return jax.tree.leaves(self.leaf_rows)[0].shape[0]

    def _matrices(self) -> list[Float[Array, "n _"]]:
        return [leaf.reshape(self._num_rows, -1) for leaf in jax.tree.leaves(self.leaf_rows)]

    def mv(self, vector: Tangent) -> Float[Array, " n"]:
        parts = [leaf.reshape(-1) for leaf in jax.tree.leaves(vector)]
        products = [
            _precision.matmul(rows, part)
            for rows, part in zip(self._matrices(), parts, strict=True)
        ]
        return _mesh.whole(sum(products[1:], products[0]))

    def transpose_mv(self, vector: Float[Array, " n"]) -> Tangent:
        weights = _mesh.rows_cut(_mesh.whole(vector))
        product = lambda rows: _precision.tensordot(weights, rows, axes=1)
        return _mesh.spread(jax.tree.map(product, self.leaf_rows))

    def cross_gram(self, other: "DenseJacobian") -> Float[Array, "n m"]:
        return _mesh.whole(self._in_blocks(other))

    def _in_blocks(self, other: "DenseJacobian") -> Float[Array, "n m"]:
        mine = _mesh.rows_cut(_mesh.in_one(_mesh.rows_cut, self._matrices()))
        theirs = _mesh.columns_cut(_mesh.in_one(_mesh.columns_cut, other._matrices()))
        products = [_precision.matmul(a, b.T) for a, b in zip(mine, theirs, strict=True)]
        return _mesh.in_blocks(sum(products[1:], products[0]))

    def gram_triangle(self) -> Float[Array, "n n"]:
        return self.cross_gram(self)

    def distributed_gram(self) -> Float[Array, "n n"]:
        return _mesh.over_all(self._in_blocks(self))

    def row_norms_squared(self) -> Float[Array, " n"]:
        norms = [jnp.sum(rows**2, axis=1) for rows in self._matrices()]
        return sum(norms[1:], norms[0])

    def column_norms_squared(self) -> Tangent:
        return jax.tree.map(lambda rows: jnp.sum(rows**2, axis=0), self.leaf_rows)

    def rows(self) -> PyTree[Float[Array, "n ..."]]:
        return self.leaf_rows

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), self.leaf_rows
        )

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._num_rows,), _tree.dtype_of(self.leaf_rows))


@checked
def dense_jacobian(
    fn: Callable[[Coordinates, Example], Array],
    coordinates: Coordinates,
    data: PyTree[Array],
) -> DenseJacobian:
    """The `jacobian` by k backward passes for each example, with n×D numbers of memory.

    Args:
        fn: maps coordinates and one example to an array of k numbers.
        coordinates: of the point.
        data: PyTree with a leading axis of N examples.

    Returns:
        A `DenseJacobian`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> square = lambda w, x: (w @ x) ** 2
        >>> jacobian = linalg.dense_jacobian(square, jnp.array([1.0, 2.0]), jnp.array([[3.0, 1.0]]))
        >>> print(jacobian.as_matrix())
        [[30. 10.]]
    """

    def rows_of_one(example: Example) -> PyTree[Array]:
        return jax.jacrev(lambda x: fn(x, example).reshape(-1))(coordinates)

    rows = jax.vmap(rows_of_one)(data)
    # The number of rows in full: of a leaf without numbers, -1 could be anything.
    rows = jax.tree.map(lambda r: r.reshape(r.shape[0] * r.shape[1], *r.shape[2:]), rows)
    return DenseJacobian(_mesh.rows_and_widths_cut(rows))
