"""Rounding of the weights, and its cost in the loss."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key, Point, Scalar
from manifoldflow.losses import AbstractLoss
from manifoldflow.walks._objectives import AbstractObjective, with_examples

# Stands in for max|w|, which has no derivative where the two largest weights tie: a walk that
# lowers the largest comes to such ties, and stays there. It is above the largest of m equal
# weights by m^(1/32), 16 % for 100.
_ORDER = 32


class Rounding(AbstractObjective):
    """The mean rise of the loss when weights are rounded to a grid of 2^`bits` − 1 values.

    With the steps Δ = max|w|/(2^(`bits` − 1) − 1) of the grids and independent errors that are
    uniform in a step, it is to second order

        F = ½ Σⱼ (Δⱼ²/12)·Gⱼⱼ,

    G the Gauss-Newton matrix, at a point where the gradient of the loss is zero. Both Δ and G are
    differentiated: a walk lowers large weights as well as the curvature. For F and its derivatives,
    max|w| is the norm of order 32 of the weights of a grid.

    Leaves with two axes or more are rounded. Vectors, such as biases, stay as they are.

    Args:
        bits: for each weight, from 2 to 16.
        per: which weights of a leaf share a grid: "row" those with one index on the first axis
            (outputs in Equinox and PyTorch), "channel" those with one index on the last axis
            (outputs in Flax and Haiku), "tensor" all.

    Raises:
        ValueError: bits or `per` out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> grid = mf.walks.Rounding(bits=3)
        >>> print(grid.rounded(jnp.array([[1.0, 0.3]])).round(3))
        [[1.    0.333]]
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones((2, 1)), predict=lambda w, x: w @ x)
        >>> print(f"{grid(loss, jnp.array([[1.0, 0.3]])):.6f}")
        0.004630
    """

    levels: Scalar
    per: Literal["row", "channel", "tensor"] = eqx.field(static=True)

    @checked
    def __init__(self, bits: int = 4, per: Any = "row"):
        bits = checked_count("Rounding: bits", bits)
        if not 2 <= bits <= 16:
            raise ValueError(f"Rounding: bits must be from 2 to 16; got {bits}.")
        if per not in ("row", "channel", "tensor"):
            raise ValueError(f"Rounding: per must be 'row', 'channel' or 'tensor'; got {per!r}.")
        self.levels, self.per = jnp.asarray(2.0 ** (bits - 1) - 1, float), per

    @property
    def name(self) -> str:
        return "loss by rounding"

    def __call__(self, loss: AbstractLoss, point: Point) -> Scalar:
        root = with_examples(self, loss).gauss_newton_root(point)
        weights = jax.tree.leaves(loss.split(point)[0])
        curvatures = jax.tree.leaves(root.column_norms_squared())
        terms = [
            jnp.sum(self._step(self._smooth_size(w), w) ** 2 * g)
            for w, g in zip(weights, curvatures, strict=True)
            if w.ndim > 1
        ]
        # ½·1/12: an error that is uniform in a step Δ has the variance Δ²/12.
        return sum(terms, jnp.zeros((), _tree.dtype_of(weights))) / 24

    @checked
    def rounded(self, point: Point, key: Key | None = None) -> Point:
        """The point with rounded weights.

        Args:
            point: any; its inexact arrays with two axes or more are rounded.
            key: for a random offset of every grid, uniform in a step; by default 0 is on the grid.
                Means over keys are free of the luck of one grid.
        """
        arrays, rest = eqx.partition(point, eqx.is_inexact_array)
        leaves, treedef = jax.tree.flatten(arrays)
        keys = [None] * len(leaves) if key is None else jr.split(key, len(leaves))
        found = [
            self._rounded_leaf(w, k) if w.ndim > 1 else w for w, k in zip(leaves, keys, strict=True)
        ]
        return eqx.combine(jax.tree.unflatten(treedef, found), rest)

    def _rounded_leaf(self, w: Array, key: Key | None) -> Array:
        size = jnp.max(jnp.abs(w), axis=self._axes(w), keepdims=True)
        # Weights that are all zero have the grid {0}.
        step = _tree.where(size > 0, self._step(size, w), 1)
        offset = 0 if key is None else jr.uniform(key, step.shape, w.dtype)
        return (jnp.round(w / step + offset) - offset) * step

    def _step(self, size: Array, w: Array) -> Array:
        return size / self.levels.astype(w.dtype)

    def _smooth_size(self, w: Array) -> Array:
        axes = self._axes(w)
        # In units of the largest weight, since 32nd powers leave the range of float32. The unit
        # cancels in the value and needs no derivative.
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axis=axes, keepdims=True))
        is_there = size > 0
        unit = _tree.where(is_there, size, 1)
        total = jnp.sum((w / unit) ** _ORDER, axis=axes, keepdims=True)
        # The root has no derivative at 0, where there is nothing to round.
        return unit * _tree.where(is_there, _tree.where(is_there, total, 1) ** (1 / _ORDER), 0)

    def _axes(self, w: Array) -> tuple[int, ...]:
        kept = {"row": 0, "channel": w.ndim - 1, "tensor": None}[self.per]
        return tuple(axis for axis in range(w.ndim) if axis != kept)
