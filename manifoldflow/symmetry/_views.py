"""Views of the axes of a leaf: one axis, several as one, or a part of one."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class View:
    """Axes of an array as before × n × after numbers; the view is the n in the middle.

    Flattened pictures are channels × pixels: a layer behind them has `after` pixels for each of n
    channels. Heads may have an axis of their own, or share it with what is in them.

    Args:
        axes: one, or several neighbours that count as one.
        before: the number of entries outside n along them.
        after: the number inside.
    """

    axes: tuple[int, ...]
    before: int = 1
    after: int = 1

    def length(self, shape: tuple[int, ...]) -> int:
        """The length n, for an array of this shape."""
        return math.prod(shape[axis] for axis in self.axes) // (self.before * self.after)

    def rows(self, leaf: Array) -> Array:
        """The array as (n, everything else)."""
        front = jnp.moveaxis(leaf, self.axes, range(len(self.axes)))
        parts = front.reshape(self.before, self.length(leaf.shape), self.after, -1)
        return jnp.moveaxis(parts, 1, 0).reshape(parts.shape[1], -1)

    def with_rows(self, rows: Array, leaf: Array) -> Array:
        """The leaf with its rows replaced."""
        front = jnp.moveaxis(leaf, self.axes, range(len(self.axes)))
        parts = rows.reshape(len(rows), self.before, self.after, -1)
        back = jnp.moveaxis(parts, 0, 1).reshape(front.shape)
        return jnp.moveaxis(back, range(len(self.axes)), self.axes).astype(leaf.dtype)

    def spread(self, values: Array, shape: tuple[int, ...]) -> Array:
        """The n numbers, shaped to broadcast against an array of this shape."""
        lengths = [shape[axis] for axis in self.axes]
        whole = jnp.broadcast_to(values[:, None], (self.before, len(values), self.after))
        full = [1] * len(shape)
        for axis, length in zip(self.axes, lengths):
            full[axis] = length
        return whole.reshape(lengths).reshape(full)


def as_view(axis: "int | View", num_axes: int) -> View:
    """The view of an axis given by its number; a view as it is."""
    if isinstance(axis, View):
        return axis
    if not isinstance(axis, int | np.integer) or not -num_axes <= axis < num_axes:
        raise ValueError(
            f"axes: got {axis!r} for a leaf of {num_axes} axes, expected an integer from "
            f"{-num_axes} to {num_axes - 1}; name the axis over which the product sums."
        )
    return View((int(axis) % num_axes,))
