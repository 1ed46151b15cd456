"""A convolution: a matrix product at every output place, with patches of the image as factors.

Patches are far larger than their image. Here it is cut along all axes of the window but the
first, so that rows can be summed over the places one slice of the window after the other.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow.linalg.jacobian._block import AbstractBlock, LeafView, rearranged
from manifoldflow.linalg.jacobian._use import (
    AbstractMatrixUse,
    Equation,
    Recognised,
    register_use,
)
from manifoldflow.linalg.jacobian._use_matrix_product import OuterBlock
from manifoldflow.linalg.jacobian._use_rows import RowBlock
from manifoldflow.linalg.jacobian._views import ints, View


class Kernel(NamedTuple):
    """Static: how a kernel moves along the first axis, and how its channels are grouped."""

    size: int
    stride: int
    dilation: int
    groups: int
    num_inputs: int  # channels in each group

    def patches(self, slabs: Float[Array, "batch X ... WI"]) -> Float[Array, "T G C"]:
        """The patches that the kernel sees at each of T places; C = window·channels of a group."""
        pieces = _pieces(slabs, 1, self.size, self.stride, self.dilation)
        patches = jnp.concatenate(pieces, axis=-1)
        num_places = patches.size // patches.shape[-1]
        patches = patches.reshape(num_places, -1, self.groups, self.num_inputs)
        return jnp.swapaxes(patches, 1, 2).reshape(num_places, self.groups, -1)

    def rows(
        self, slabs: Float[Array, "batch X ... WI"], delta: Float[Array, "k T G F"]
    ) -> Float[Array, "k G F C"]:
        """Σ_t δ_t ⊗ (patch at t), without the patches."""

        def along(piece: Array) -> Array:
            seen = piece.reshape(delta.shape[1], -1, self.groups, self.num_inputs)
            return _precision.einsum("ktgf,twgc->kgfwc", delta, seen)

        pieces = _pieces(slabs, 1, self.size, self.stride, self.dilation)
        rows = jnp.stack([along(piece) for piece in pieces], axis=3)
        return rows.reshape(*rows.shape[:3], -1)


def slabs(image: Array, window: list[int], params: Any) -> Float[Array, "batch X ... WI"]:
    """The image padded, with its channels last, cut along all axes but the first.

    By slices side by side: the reverse mode of `lax.conv_general_dilated_patches` is ten
    times slower on CPUs.
    """
    batch, feature, *space = params["dimension_numbers"].lhs_spec
    image = lax.transpose(image, (batch, *space, feature))
    interior = [dilation - 1 for dilation in params["lhs_dilation"]]
    margins = [(low, high, gap) for (low, high), gap in zip(params["padding"], interior)]
    # Negative padding crops, and interior padding is the dilation of the image: `lax.pad` does all
    # three.
    image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    # The last axis first: the next one's slices then stand before it, as in the kernel.
    for axis in range(len(window), 1, -1):
        of_axis = (params[name][axis - 1] for name in ("window_strides", "rhs_dilation"))
        image = jnp.concatenate(_pieces(image, axis, window[axis - 1], *of_axis), axis=-1)
    return image


def _pieces(image: Array, axis: int, size: int, stride: int, dilation: int) -> list[Array]:
    """The image as each entry of the window sees it, along one axis."""
    length = image.shape[axis] - dilation * (size - 1)
    starts = [dilation * k for k in range(size)]
    return [lax.slice_in_dim(image, start, start + length, stride, axis) for start in starts]


@register_use("conv_general_dilated")
class Convolution(AbstractMatrixUse):
    """A leaf as the kernel, with any strides, dilations, groups and layout."""

    kernel: Kernel = eqx.field(static=True)
    output_steps: View = eqx.field(static=True)  # to (T, G, F)

    @classmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        params, z = equation.params, equation.output
        image, shape = equation.operands[0], equation.operands[1].shape
        groups = params["feature_group_count"]
        o, i, *window = params["dimension_numbers"].rhs_spec
        if index != 1 or params["batch_group_count"] != 1 or not window:
            raise NotImplementedError("a convolution of a leaf, or with groups of examples")
        batch, feature, *places = params["dimension_numbers"].out_spec
        output_steps = (
            ("transpose", ints((batch, *places, feature))),
            ("reshape", (z.size // z.shape[feature], groups, shape[o] // groups)),
        )
        kernel_steps = (
            ("transpose", ints((o, *window, i))),
            ("reshape", (groups, shape[o] // groups, math.prod(shape) // shape[o])),
        )
        sizes = [shape[axis] for axis in window]
        first = (sizes[0], params["window_strides"][0], params["rhs_dilation"][0])
        use = cls(Kernel(*first, groups, shape[i]), output_steps)
        return Recognised(use, slabs(image, sizes, params), kernel_steps)

    def block(self, delta: Float[Array, "n k ..."], factor: Array, leaf: LeafView) -> AbstractBlock:
        """The rows of a kernel, or δ and the patches where these are fewer numbers."""
        delta, factor = rearranged(self.output_steps, delta, 2), factor.astype(delta.dtype)
        num_outputs, num_places = delta.shape[1:3]
        num_factors = num_places * self.kernel.size * factor.shape[-1]
        num_factors += delta.size // delta.shape[0]
        if num_outputs * math.prod(leaf.shape) > num_factors:
            return OuterBlock(delta, jax.vmap(self.kernel.patches)(factor)[:, None], leaf)
        rows = jax.vmap(self.kernel.rows)(factor, delta)
        return RowBlock(jax.vmap(jax.vmap(leaf.pull))(rows))
