"""The Jacobian of a model over its examples, without its n×D matrix.

A row for the weight of z = W·a is δ ⊗ a, with a the factor the weight met and δ the
derivative of the output in z (see `_taps`). Products of rows are then products of factors:

    ⟨δᵢ ⊗ aᵢ, δⱼ ⊗ aⱼ⟩ = (δᵢ·δⱼ)(aᵢ·aⱼ),     ‖δᵢ ⊗ aᵢ‖² = ‖δᵢ‖²‖aᵢ‖²,

so that the Gram matrix costs O(n² Σ widths) and not O(n² D), and the row norms cost less
than the loss. Leaves without such structure keep explicit rows, alone.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from manifoldflow import _mesh, _precision
from manifoldflow._boundary import checked_but
from manifoldflow._errors import numbers
from manifoldflow.linalg.jacobian import _taps
from manifoldflow.linalg.jacobian._block import AbstractBlock
from manifoldflow.linalg.jacobian._layers import Layer, products
from manifoldflow.linalg.jacobian._operator import AbstractJacobian
from manifoldflow.linalg.jacobian._sums import block_of, label_of, twins_of
from manifoldflow.linalg.jacobian._tiles import has_tiles, tiles, triangle
from manifoldflow.linalg.jacobian._use_matrix_product import OuterBlock
from manifoldflow.linalg.jacobian._use_rows import DENSE_ROWS, RowBlock


class StructuredJacobian(AbstractJacobian):
    """The Jacobian as factors of its rows, leaf by leaf: PyTrees like the parameters → (n·k,).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> layer = lambda p, x: jnp.tanh(p["w"] @ x)
        >>> found = linalg.structured_jacobian(layer, {"w": jnp.zeros((3, 4))}, jnp.ones((2, 4)))
        >>> print(isinstance(found, linalg.StructuredJacobian), found.as_matrix().shape)
        True (6, 12)
    """

    # For every leaf the blocks that add up to its columns; they share no entry of the leaf,
    # so that their rows are orthogonal.
    blocks: tuple[tuple[AbstractBlock, ...], ...]
    num_examples: int = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)
    labels: tuple[tuple[str, str], ...] = eqx.field(static=True)
    # Biases and the weights whose δ is their row: it is sent and multiplied once for both.
    twins: tuple[tuple[int, int], ...] = eqx.field(static=True, default=())

    @property
    def treatments(self) -> dict[str, str]:
        """The treatment of every leaf, by its path: the form in which its columns are kept."""
        return dict(self.labels)

    @property
    def _dtype(self) -> Any:
        return jnp.result_type(*(leaf.dtype for leaf in self.leaves))

    def _unflatten(self, leaves: Any) -> PyTree[Any]:
        return jax.tree.unflatten(self.treedef, leaves)

    def _leaves_of(self, vector: PyTree[Any]) -> list[Array]:
        leaves = jax.tree.leaves(vector)
        got = [jnp.shape(leaf) for leaf in leaves]
        expected = [leaf.shape for leaf in self.leaves]
        if got != expected:
            raise ValueError(
                f"The vector must have the shapes of the parameters, {expected}, got {got}."
            )
        return leaves

    @property
    def _num_rows(self) -> int:
        return self.num_examples * self.num_outputs

    def _each_leaf(
        self,
        fn: Callable[[AbstractBlock], Array],
        shape_fn: Any,
        place: Callable[[Array], Array] = lambda total: total,
    ) -> PyTree[Array]:
        """Σ fn(block) for every leaf, in the leaf's dtype; zeros for a leaf without use."""
        results = []
        for leaf, blocks in zip(self.leaves, self.blocks, strict=True):
            shape = shape_fn(leaf)
            # Without an order XLA may gather all layers first, and a device then holds the whole
            # model.
            blocks = _mesh.in_turn(results[-1:], blocks)
            parts = [fn(block).reshape(shape).astype(leaf.dtype) for block in blocks]
            total = sum(parts[1:], parts[0]) if parts else jnp.zeros(shape, leaf.dtype)
            results.append(place(total))
        return self._unflatten(results)

    def mv(self, vector: PyTree[Float[Array, "..."]]) -> Float[Array, " rows"]:
        """J v."""
        total = jnp.zeros((self.num_examples, self.num_outputs), self._dtype)
        for blocks, leaf in zip(self.blocks, self._leaves_of(vector), strict=True):
            blocks, leaf = _mesh.in_turn(total, (blocks, leaf))
            total = sum((block.mv(_mesh.at_work(leaf)) for block in blocks), total)
        return _mesh.whole(total.reshape(-1))

    def transpose_mv(self, vector: Float[Array, " rows"]) -> PyTree[Float[Array, "..."]]:
        """Jᵀ w, a PyTree like the parameters."""
        # Whole first: else factorisations that the vector comes from are cut up as well.
        weights = _mesh.whole(vector).reshape(self.num_examples, self.num_outputs)
        weights = _mesh.rows_cut(weights)
        product = lambda block: block.transpose_mv(weights)
        return self._each_leaf(product, lambda leaf: leaf.shape, _mesh.spread)

    def cross_gram(self, other: "StructuredJacobian") -> Float[Array, "rows other_rows"]:
        """J J'ᵀ with the Jacobian of the same model at another point or on other data."""
        self._check_comparable(other)
        return _mesh.whole(self._in_blocks(other))

    def distributed_gram(self) -> Float[Array, "rows rows"]:
        return _mesh.over_all(self._in_blocks(self))

    def _products(self, other: "StructuredJacobian") -> Float[Array, "rows other_rows"]:
        twins = self._twins_with(other)

        def pairs(layer: list[int]) -> Layer:
            found: Layer = []
            for leaf in (leaf for leaf in layer if leaf not in twins):
                found += zip(self.blocks[leaf], other.blocks[leaf], strict=True)
                if leaf in twins.values():
                    # The product δ·δ of the bias, from the array of the weight: the compiler then
                    # sees that both are one product.
                    both = (cast(OuterBlock, found[-1][0]), cast(OuterBlock, found[-1][1]))
                    found.append((RowBlock(both[0].delta), RowBlock(both[1].delta)))
            return found

        total = jnp.zeros((self._num_rows, other._num_rows), self._dtype)
        return products(total, [pairs(layer) for layer in self._layers()])

    def _twins_with(self, other: "StructuredJacobian") -> dict[int, int]:
        """The biases, with their weights, that are left out where rows of the two are multiplied.

        One for each weight: a second one has rows of its own.
        """
        shared = {weight: bias for bias, weight in self.twins if (bias, weight) in other.twins}
        return {bias: weight for weight, bias in shared.items()}

    def _layers(self) -> list[list[int]]:
        """The numbers of the leaves that have one place in the point, as a weight and its bias."""
        # The names decide in which order layers are gathered, never a number of the result.
        places = [re.sub(r"(\.\w+|\[[^\]]*\])$", "", path) for path, _ in self.labels]
        return [
            list(layer)
            for _, layer in itertools.groupby(range(len(places)), key=places.__getitem__)
        ]

    @property
    def _is_spread(self) -> bool:
        return _mesh.is_spread(self.num_examples)

    def _in_blocks(self, other: "StructuredJacobian") -> Float[Array, "rows other_rows"]:
        """Each device has its own rows, and gets the factors of its columns."""
        if not self._is_spread:
            return self._products(other)
        own = self._sent(_mesh.rows_cut, other)
        return own._products(other._sent(_mesh.columns_cut, self))

    def _sent(self, place: Any, partner: "StructuredJacobian") -> "StructuredJacobian":
        """The factors that a product with the partner takes, where they are multiplied."""
        twins = self._twins_with(partner)
        # Rows that come with those of the weight are not sent a second time.
        blocks = [() if i in twins else found for i, found in enumerate(self.blocks)]
        return dataclasses.replace(self, blocks=_mesh.in_one(place, blocks))

    def gram_triangle(self) -> Float[Array, "rows rows"]:
        """K with zeros below the blocks on its diagonal: 10 of 16 products, or 36 of 64."""
        num_rows, strips = self._num_rows, []
        if has_tiles(self.num_examples, num_rows):
            parts = self._sent(_mesh.columns_cut, self)._parts()
            return triangle(functools.reduce(jnp.add, map(_tiles_of, parts)))
        cuts = _strips(self.num_examples, num_rows)
        if len(cuts) == 1 or self._is_spread:
            return self.cross_gram(self)
        for start, stop in cuts:
            rest = self.examples(start, self.num_examples)
            # K is symmetric: the examples before `start` have met these rows already.
            strip = self.examples(start, stop).cross_gram(rest)
            strips.append(jnp.pad(strip, ((0, 0), (num_rows - strip.shape[1], 0))))
        return jnp.concatenate(strips)

    def _parts(self) -> list["StructuredJacobian"]:
        """The factors that are sent together; layer by layer where they are large."""
        if _mesh.fits_one_message(jax.tree.leaves(self.blocks)):
            return [self]

        def only(layer: list[int]) -> StructuredJacobian:
            blocks = tuple(found if i in layer else () for i, found in enumerate(self.blocks))
            twins = tuple(pair for pair in self.twins if set(pair) <= set(layer))
            return dataclasses.replace(self, blocks=blocks, twins=twins)

        return [only(layer) for layer in self._layers()]

    def examples(self, start: int, stop: int) -> "StructuredJacobian":
        """The rows of the examples from `start` to before `stop`."""

        # Every array of every block has a leading axis of examples. Cut as matrices: the
        # compiler then sees where two blocks (a weight's and a bias's) share a factor, and
        # computes its products once.
        def cut(array: Array) -> Array:
            matrix = array.reshape(array.shape[0], -1)[start:stop]
            return matrix.reshape(stop - start, *array.shape[1:])

        blocks = jax.tree.map(cut, self.blocks)
        return dataclasses.replace(self, blocks=blocks, num_examples=stop - start)

    def _check_comparable(self, other: "StructuredJacobian") -> None:
        shapes = [tuple(leaf.shape for leaf in jac.leaves) for jac in (self, other)]
        if shapes[0] != shapes[1] or self.labels != other.labels:
            raise ValueError(
                "cross_gram needs two Jacobians of the same function, got parameters of shapes "
                f"{shapes[0]} and {shapes[1]}, kept as {self.treatments} and {other.treatments}."
            )

    def leaf_row_norms_squared(self) -> PyTree[Float[Array, " rows"]]:
        """The squared norms of the rows, leaf by leaf: a PyTree like the parameters of (n·k,)."""
        return self._each_leaf(lambda block: block.norms(), lambda leaf: (self._num_rows,))

    def row_norms_squared(self) -> Float[Array, " rows"]:
        """‖∇fᵢ‖² for every row, the diagonal of the Gram matrix."""
        norms = jax.tree.leaves(self.leaf_row_norms_squared())
        return sum(norms, jnp.zeros(self._num_rows, self._dtype))

    def column_norms_squared(self) -> PyTree[Float[Array, "..."]]:
        """Σᵢ (∂fᵢ/∂θⱼ)² for every coordinate, a PyTree like the parameters."""
        sums = self._each_leaf(lambda block: block.column_norms(), lambda leaf: leaf.shape)
        return _mesh.whole(sums) if self._is_spread else sums

    def rows(self) -> PyTree[Float[Array, "rows ..."]]:
        """All rows, explicitly: n·k times the size of the parameters. For tests."""
        shape_fn = lambda leaf: (self._num_rows, *leaf.shape)
        return self._each_leaf(lambda block: block.rows(), shape_fn)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self._unflatten(self.leaves)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self._num_rows,), self._dtype)


@checked_but("params")
def structured_jacobian(
    fn: Callable[[Any, Any], Array], params: PyTree[Any], inputs: PyTree[Any]
) -> StructuredJacobian:
    """The Jacobian of `fn(params, example)` over all examples, as factors of its rows.

    Row i·k + c is the derivative of output c at example i. Every use of every leaf of the
    parameters is found in the jaxpr of one example: matrix products keep their two factors,
    additions and elementwise products keep rows of the leaf's size, and a leaf with any use that is
    none of these keeps explicit rows from k backward passes. The derivatives that JAX sees, custom
    rules included, are the ones that are used.

    Args:
        fn: maps the parameters and one example to one real array of any shape (k numbers).
        params: PyTree of floating-point arrays; `None` leaves are skipped.
        inputs: PyTree of arrays with a leading axis of n examples.

    Returns:
        A linear operator with the products, Gram matrices and row norms of J.

    Raises:
        ValueError: if a leaf is not a real floating-point array, the inputs disagree on n, or `fn`
            does not return one real array.

    Assumes:
        that `fn` treats each example by itself; it is never shown a batch.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> layer = lambda p, x: jnp.tanh(p["w"] @ x)
        >>> jacobian = linalg.structured_jacobian(layer, {"w": jnp.zeros((3, 4))}, jnp.ones((2, 4)))
        >>> print(jacobian.row_norms_squared())
        [4. 4. 4. 4. 4. 4.]
    """
    leaves, treedef = _checked_leaves(params)
    num_examples, columns = _num_examples(inputs), jax.tree.leaves(inputs)
    structures = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    leaves = _mesh.spread(leaves)
    with _precision.full_precision():  # the model's own products as well
        model = _taps.trace(fn, params, inputs)  # an error of the model's own is not caught
        try:
            blocks, labels, twins = _structured_blocks(model, structures, leaves, columns)
        except Exception:
            # Of the jaxpr only what is understood helps: all else is JAX's to differentiate.
            blocks, labels, twins = _row_blocks(model, leaves, columns)
    # Without this word XLA would find a cut of the factors for each product by itself.
    blocks = _mesh.rows_and_widths_cut(blocks)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    named = tuple(zip(paths, labels, strict=True))
    return StructuredJacobian(
        tuple(blocks), num_examples, model.num_outputs, structures, treedef, named, twins
    )


def _structured_blocks(model: _taps.Model, structures: Any, leaves: Any, columns: Any) -> Any:
    """Blocks and label of every leaf, from its uses in the model's jaxpr, and their twins."""
    uses = model.uses(structures)
    read = lambda column: _taps.read_taps(model, uses, leaves, column)
    # The model is traced for one example and mapped over them here. In the jaxpr of a batch no axis
    # says which one counts the examples.
    deltas, rows, records = jax.vmap(read)(columns)
    blocks, labels, reasons = [], [], dict(uses.reasons)
    for index, leaf in enumerate(leaves):
        if index in uses.opaque:
            found, label = (RowBlock(rows[index]),), DENSE_ROWS
            if index in reasons:
                label += f" ({reasons[index]})"
        else:
            groups = uses.groups[index]
            found = tuple(block_of(uses.sites, group, deltas, records, leaf) for group in groups)
            label = label_of(uses.sites, found, groups)
        blocks.append(found)
        labels.append(label)
    return blocks, labels, twins_of(uses, deltas, records, blocks)


def _row_blocks(model: _taps.Model, leaves: Any, columns: Any) -> Any:
    """The same with explicit rows for every leaf, without a look at the jaxpr."""
    rows = jax.vmap(lambda column: _taps.read_rows(model, leaves, column))(columns)
    return [(RowBlock(row),) for row in rows], [DENSE_ROWS] * len(leaves), ()


def _tiles_of(jacobian: StructuredJacobian) -> Float[Array, "tiles tile tile"]:
    """The tiles of K from these factors, which all devices get."""

    def product(*strips: Any) -> Float[Array, "tile tile"]:
        size = jax.tree.leaves(strips)[0].shape[0]
        of_strip = lambda blocks: dataclasses.replace(jacobian, blocks=blocks, num_examples=size)
        first, second = map(of_strip, strips)
        return first._products(second)

    return tiles(product, _mesh.columns_cut(jacobian.blocks))


def _strips(num_examples: int, num_rows: int) -> list[tuple[int, int]]:
    """The cuts of the examples of a Gram matrix; more cuts save products, but cost compile time."""
    num_strips = 1 if num_rows < 1024 else 4 if num_rows < 4096 else 8
    num_strips = min(num_strips, num_examples)
    stops = [num_examples * index // num_strips for index in range(num_strips + 1)]
    return list(zip(stops, stops[1:]))


def _checked_leaves(params: PyTree[Any]) -> tuple[list[Array], Any]:
    leaves, treedef = jax.tree.flatten(params)
    is_number = lambda leaf: isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc"
    leaves = [jnp.asarray(leaf) if is_number(leaf) else leaf for leaf in leaves]
    for leaf in leaves:
        if not eqx.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                "Every leaf of the parameters must be a real floating-point array, got "
                f"{leaf!r}. Take them out with `eqx.partition(model, eqx.is_inexact_array)`."
            )
    if not leaves:
        raise ValueError("The parameters hold no arrays, so there is nothing to differentiate.")
    return leaves, treedef


def _num_examples(inputs: PyTree[Any]) -> int:
    shapes = [numbers("inputs", leaf).shape for leaf in jax.tree.leaves(inputs)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or sizes & {None, 0}:
        raise ValueError(f"All inputs need one common leading axis of examples, got {shapes}.")
    return shapes[0][0]
