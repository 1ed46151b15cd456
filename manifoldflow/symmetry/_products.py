"""Matrices that enter a loss only as their product: families of symmetries that do not commute."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import described, real_numbers, shapes_of
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.symmetry._constructors import Where
from manifoldflow.symmetry._generators import checked_symmetric, Rotation
from manifoldflow.symmetry._symmetry import ExponentialSymmetry
from manifoldflow.symmetry._views import as_view, View

Sides = tuple[Float[Array, "blocks d ..."], Float[Array, "blocks d ..."]]


class ProductSymmetry(eqx.Module):
    """The family of symmetries (U, W) ↦ (UQ⁻¹, QW), for every invertible Q.

    With several blocks each has a Q of its own. `member` gives the `double_rotation` of one
    symmetric matrix B; different members do not commute. Build it with `product_symmetry` or
    `attention_products`, or let `find_products` find it. `balance` takes it.

    Args:
        where: picks the leaves of U and then those of W out of a point, as a tuple.
        axes: the axis of each leaf over which the product sums, or a `View` of several or of a
            part.
        signs: +1 for the leaves of U, −1 for those of W.
        num_blocks: the number of matrices Q, one after the other along those axes.
        name: for messages.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point = {"U": jnp.array([[1.0, 2.0]]), "W": jnp.array([[3.0], [0.5]])}
        >>> product = symmetry.product_symmetry(point, lambda p: p["U"], lambda p: p["W"])
        >>> moved = product.act(point, jnp.array([[2.0, 1.0], [0.0, 1.0]]))
        >>> print(isinstance(product, symmetry.ProductSymmetry), moved["U"] @ moved["W"])
        True [[4.]]

    References:
        [Ziyin2024, Proposition 5.1].
    """

    where: Callable[[Any], tuple[Any, ...]] = eqx.field(static=True)
    axes: tuple[int | View, ...] = eqx.field(static=True)
    signs: tuple[int, ...] = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True, default=1)
    name: str = eqx.field(static=True, default="a product")

    def size(self, point: Point) -> int:
        """The size d of every Q, for points of this structure."""
        coordinates, _ = _tree.split(point)
        return self._length(coordinates) // self.num_blocks

    def _length(self, coordinates: Coordinates) -> int:
        lengths = [
            as_view(axis, leaf.ndim).length(leaf.shape)
            for leaf, axis in zip(self.where(coordinates), self.axes)
        ]
        if len(set(lengths)) != 1 or lengths[0] % self.num_blocks:
            raise ValueError(
                f"ProductSymmetry: {self.name} sums over axes {self.axes} of "
                f"{shapes_of(self.where(coordinates))} in {self.num_blocks} blocks; they must be "
                "of one length, which the number of blocks divides."
            )
        return lengths[0]

    @checked
    def act(self, point: Point, matrices: Any) -> Point:
        """The point with (UQ⁻¹, QW) in place of (U, W).

        Args:
            point: θ.
            matrices: Q, invertible, (d, d), or (blocks, d, d) for one in each block.

        Returns:
            A point like θ.
        """
        coordinates, remainder = _tree.split(point)
        q = self._blocks(coordinates, real_numbers("act: matrices", matrices))
        return _tree.join(self.turned(coordinates, q, jnp.linalg.inv(q)), remainder)

    @checked
    def member(self, point: Point, matrix: Any) -> ExponentialSymmetry:
        """The symmetry (Ue^{λB}, e^{−λB}W) of one symmetric matrix B.

        Args:
            point: a point of the structure to be moved.
            matrix: B, (d, d) for the same in all blocks, or (blocks, d, d).

        Returns:
            An `ExponentialSymmetry`.
        """
        blocks = self._blocks(_tree.split(point)[0], real_numbers("member: matrix", matrix))
        blocks = jnp.stack([checked_symmetric(block) for block in blocks])
        values, vectors = jnp.linalg.eigh(blocks)
        return ExponentialSymmetry(Rotation(self.where, self.axes, self.signs, vectors, values))

    @checked
    def charge(self, point: Point) -> Float[Array, "blocks d d"]:
        """The conserved matrix C = UᵀU − WWᵀ of every block; the charge of the member B is ½tr(BC).

        Args:
            point: θ.

        Returns:
            (blocks, d, d).
        """
        first, second = self.grams(_tree.split(point)[0])
        return first - second

    def _blocks(self, coordinates: Coordinates, matrices: Any) -> Float[Array, "blocks d d"]:
        size = self._length(coordinates) // self.num_blocks
        matrices = jnp.asarray(matrices, _tree.dtype_of(coordinates))
        shape = (self.num_blocks, size, size)
        if matrices.shape not in (shape[1:], shape):
            raise ValueError(
                f"ProductSymmetry: {self.name} needs a matrix of shape {shape[1:]}, or {shape} for "
                f"one in each block; got shape {matrices.shape}."
            )
        return jnp.broadcast_to(matrices, shape)

    def sides(self, vector: Tangent) -> Sides:
        """Uᵀ and W of a vector like the coordinates, with all their leaves side by side."""
        length = self._length(vector)
        parts: dict[int, list[Array]] = {1: [], -1: []}
        for leaf, axis, sign in zip(self.where(vector), self.axes, self.signs):
            rows = as_view(axis, leaf.ndim).rows(leaf)
            parts[sign].append(rows.reshape(self.num_blocks, length // self.num_blocks, -1))
        first, second = (jnp.concatenate(parts[sign], axis=-1) for sign in (1, -1))
        return first, second

    def grams(self, vector: Tangent) -> tuple[Float[Array, "blocks d d"], ...]:
        """UᵀU and WWᵀ of every block."""
        return tuple(_precision.einsum("bik,bjk->bij", x, x) for x in self.sides(vector))

    def turned(
        self,
        coordinates: Coordinates,
        matrices: Float[Array, "blocks d d"],
        inverses: Float[Array, "blocks d d"],
    ) -> Coordinates:
        """The coordinates with (UQ⁻¹, QW), for given Q and Q⁻¹."""

        def moved(leaf: Array, axis: int | View, sign: int) -> Array:
            view = as_view(axis, leaf.ndim)
            rows = view.rows(leaf)
            spec, by = ("bji,bjk->bik", inverses) if sign > 0 else ("bij,bjk->bik", matrices)
            blocks = rows.reshape(*by.shape[:2], -1)
            return view.with_rows(_precision.einsum(spec, by, blocks).reshape(rows.shape), leaf)

        leaves = tuple(map(moved, self.where(coordinates), self.axes, self.signs))
        return eqx.tree_at(self.where, coordinates, leaves)


def as_leaves(picked: Any) -> tuple[Any, ...]:
    """A leaf, or a tuple of leaves, as a tuple."""
    return tuple(picked) if isinstance(picked, tuple | list) else (picked,)


@dataclasses.dataclass(frozen=True)
class Both:
    """Picks the leaves that two functions pick, one after the other; equal for equal functions."""

    first: Where
    second: Where

    def __call__(self, tree: Any) -> tuple[Any, ...]:
        return as_leaves(self.first(tree)) + as_leaves(self.second(tree))


@checked
def product_symmetry(
    point: Point,
    first: Where,
    second: Where,
    *,
    axes: tuple[Any, Any] = (1, 0),
    num_blocks: int = 1,
    name: str = "a product",
) -> ProductSymmetry:
    """The family (U, W) ↦ (UQ⁻¹, QW) of two matrices that enter as their product UW.

    Two linear layers with nothing between them are an example. A bias that W's layer adds belongs
    to W: pick both, as `lambda p: (p.weight, p.bias)`, with axes (1, (0, 0)).

    Args:
        point: a point of the structure to be moved.
        first: picks U, (m, d), or a tuple of several leaves.
        second: picks W, (d, n), or a tuple of several leaves.
        axes: the axes of U and W over which their product sums, counted from the end where
            negative. Where one of them has several leaves: a tuple, or one number for all of them.
        num_blocks: the number of equal parts of those axes, such as the heads of a network. Each
            has its own Q.
        name: for messages.

    Returns:
        A `ProductSymmetry`.

    Raises:
        ValueError: an axis that a leaf does not have; axes of different lengths, or not divided by
            the number of blocks.

    Assumes:
        The loss has the symmetry. `check_symmetry` tests it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point = {"U": jnp.ones((4, 3)), "W": 2 * jnp.ones((3, 5))}
        >>> product = symmetry.product_symmetry(point, lambda p: p["U"], lambda p: p["W"])
        >>> print(product.size(point), product.charge(point)[0, 0])  # UᵀU − WWᵀ
        3 [-16. -16. -16.]

    References:
        [Ziyin2024, Proposition 5.1].
    """
    coordinates, _ = _tree.split(point)
    counts = [len(as_leaves(pick(coordinates))) for pick in (first, second)]
    spread = [
        as_leaves(axis) if isinstance(axis, tuple | list) else (axis,) * count
        for axis, count in zip(axes, counts)
    ]
    if [len(given) for given in spread] != counts:
        raise ValueError(
            f"product_symmetry: axes must be one for each leaf, {counts[0]} and {counts[1]} of "
            f"them; got {axes}."
        )
    signs = (1,) * counts[0] + (-1,) * counts[1]
    found = ProductSymmetry(Both(first, second), spread[0] + spread[1], signs, num_blocks, name)
    # Raises where lengths do not fit: here, and not in the loop of a search.
    found.size(point)
    return found


@dataclasses.dataclass(frozen=True)
class _Projections:
    """Picks the weight, and the bias if it has one, of some projections of an attention layer."""

    layer: Where
    names: tuple[tuple[str, bool], ...]

    def __call__(self, tree: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = ()
        for name, with_bias in self.names:
            projection = getattr(self.layer(tree), name)
            found += (projection.weight,) + ((projection.bias,) if with_bias else ())
        return found


@checked
def attention_products(
    point: Point, where: Callable[[Any], Any], *, name: str = "attention"
) -> tuple[ProductSymmetry, ProductSymmetry]:
    """The two products in every head of an attention layer: queries and keys, values and outputs.

    (W_Q, W_K) ↦ (Q⁻ᵀW_Q, QW_K) with their biases, since scores are products qᵀk. And (W_V, W_O) ↦
    (QW_V, W_OQ⁻¹) with the bias of the values. Each head has its own Q.

    Args:
        point: a network.
        where: picks an `equinox.nn.MultiheadAttention` out of it.
        name: for messages.

    Returns:
        Two `ProductSymmetry`.

    Raises:
        ValueError: `where` picks something else.

    Assumes:
        Nothing acts on queries and keys but their product: no rotary embedding, no normalisation.
        `check_symmetry` tests it.

    Examples:
        >>> import equinox as eqx
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> layer = eqx.nn.MultiheadAttention(2, 6, key=jr.key(0))
        >>> scores, values = symmetry.attention_products(layer, lambda p: p)
        >>> print(scores.name, scores.num_blocks, scores.size(layer))
        attention, queries and keys 2 3
    """
    layer = where(point)
    if not isinstance(layer, eqx.nn.MultiheadAttention):
        raise ValueError(
            "attention_products: `where` must pick an equinox.nn.MultiheadAttention out of the "
            f"point; it picks {described(layer)}."
        )
    has_bias = lambda which: getattr(layer, which).bias is not None
    leaves = lambda which, bias: _Projections(where, ((which, bias and has_bias(which)),))
    query, key = (leaves(f"{which}_proj", True) for which in ("query", "key"))
    value, output = leaves("value_proj", True), leaves("output_proj", False)
    build = lambda first, second, axes, what: product_symmetry(
        point, first, second, axes=axes, num_blocks=layer.num_heads, name=f"{name}, {what}"
    )
    scores = build(query, key, (0, 0), "queries and keys")
    return scores, build(output, value, (1, 0), "values and outputs")
