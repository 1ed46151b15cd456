"""Cholesky factors in blocks, of matrices whose rows are cut over all devices of a mesh.

The unknowns are eliminated in blocks, one of each device in turn, which relabels them and moves
nothing: all devices stay busy to the end. A block column of the factor is what is left of the
matrix less products with the rows of the factor that belong to the block: each step sends these
rows to all devices, in one message, and the block on the diagonal in another. A loop over the
steps makes the program, which does not grow with n. Blocks on the diagonal are kept inverted: a
triangular solve takes a compiler for TPUs as long as ten products.
"""

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from manifoldflow import _mesh, _precision
from manifoldflow._types import Flag
from manifoldflow.linalg._lapack import cho_solve, cholesky

_BLOCK = 128
# XLA's own factorisation for TPUs is written out in full. At this size it compiles as long as one
# in blocks, to three times the code; at twice the size it takes twice as long, then 49 s.
_LARGE = 512
# So many tiles along a share of rows, and as many along the columns. Products are made of those
# that the factor fills so far: a third of all, and a little more.
_TILES = 8


def all_axes() -> tuple[str, ...]:
    """The axes of the mesh in force over which arrays can be spread."""
    return tuple(_mesh.axes_in_force())


def distributes(num_rows: int) -> bool:
    """True where a matrix with this many rows can be cut over several devices here."""
    return _mesh.num_devices() > 1 and num_rows % _mesh.num_devices() == 0


@dataclasses.dataclass(frozen=True)
class _Layout:
    """n numbers in blocks, `num_own` for every device, filled up with some more.

    Step s eliminates block s // num_shares of device s % num_shares. This is the *order of
    elimination*; columns and vectors are in it, while rows stay where they are.
    """

    axes: tuple[str, ...]
    num_shares: int
    share: int  # numbers of one device
    num_own: int
    block: int
    num_tiles: int  # of the blocks of one device

    @classmethod
    def of(cls, size: int, axes: tuple[str, ...], block: int = _BLOCK) -> "_Layout":
        """For the devices along some axes of the mesh in force, or for one by itself."""
        shape = jax.sharding.get_abstract_mesh().shape
        num_shares = math.prod(shape[axis] for axis in axes)
        share = size // num_shares
        num_tiles = min(_TILES, -(-share // block))
        num_own = -(-share // (block * num_tiles)) * num_tiles
        # Blocks may be smaller than asked for: so next to nothing is filled up.
        return cls(axes, num_shares, share, num_own, -(-share // num_own), num_tiles)

    @property
    def num_steps(self) -> int:
        return self.num_own * self.num_shares

    @property
    def num_own_rows(self) -> int:
        return self.num_own * self.block

    def here(self) -> Array | int:
        """The number of this device."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def sum(self, array: Array) -> Array:
        return jax.lax.psum(array, self.axes) if self.axes else array

    def from_owner(self, array: Array, owner: Array) -> Array:
        """The part that one device has, on all devices."""
        # A sum to which all others give zeros. By `where`, since 0·NaN would be NaN.
        return self.sum(jnp.where(self.here() == owner, array, 0)) if self.axes else array

    def blocks(self, array: Array) -> Float[Array, "... own device row"]:
        """The last axis in the order of elimination, filled up with zeros."""
        lead = array.shape[:-1]
        shares = _filled(array.reshape(*lead, self.num_shares, self.share), self.num_own_rows)
        return shares.reshape(*lead, self.num_shares, self.num_own, self.block).swapaxes(-3, -2)

    def flat(self, blocks: Float[Array, "own device row"]) -> Float[Array, " n"]:
        """`blocks` undone."""
        shares = blocks.swapaxes(0, 1).reshape(self.num_shares, self.num_own_rows)
        return shares[:, : self.share].reshape(-1)


def _filled(array: Array, length: int) -> Array:
    """With zeros behind, along the last axis."""
    missing = length - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


class DistributedFactor(eqx.Module):
    """L with L Lᵀ = A in the order of elimination, NaN from where A is not positive definite on."""

    rows: Float[Array, "filled filled"]  # over all devices; inverse blocks on the diagonal
    inverses: Float[Array, "steps block block"]  # these blocks, on each
    layout: _Layout = eqx.field(static=True)

    @classmethod
    def nothing(cls, matrix: Float[Array, "n n"], block: int = _BLOCK) -> "DistributedFactor":
        """The result of a factorisation of the matrix that failed."""
        layout = _Layout.of(len(matrix), all_axes(), block)
        size = layout.num_steps * layout.block
        rows = _mesh.over_all(jnp.full((size, size), jnp.nan, matrix.dtype))
        shape = layout.num_steps, layout.block, layout.block
        return cls(rows, jnp.full(shape, jnp.nan, matrix.dtype), layout)

    @property
    def has_failed(self) -> Flag:
        # A block that fails makes all later ones NaN, so that the last number tells.
        return ~jnp.isfinite(self.inverses[-1, -1, -1])

    def solve(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        """A⁻¹w, of whole vectors; NaN all over if A is not positive definite."""
        spread, whole = PartitionSpec(all_axes()), PartitionSpec()
        solve = jax.shard_map(
            partial(_solve, self.layout),
            in_specs=(spread, whole, whole),
            out_specs=whole,
            axis_names=set(all_axes()),
        )
        return self.layout.flat(solve(self.rows, self.inverses, self.layout.blocks(right)))


def distributed_cholesky(
    matrix: Float[Array, "n n"],
    scale: Float[Array, " n"],
    shift: Float[Array, " n"],
    block: int = _BLOCK,
) -> DistributedFactor:
    """The factor of diag(scale)·matrix·diag(scale) + diag(shift), whose rows are over all devices.

    Args:
        matrix: symmetric in both triangles; the number of devices divides n.
        scale: whole on every device.
        shift: whole on every device.
        block: rows at a time, at most.
    """
    layout = _Layout.of(len(matrix), all_axes(), block)
    spread, whole = PartitionSpec(all_axes()), PartitionSpec()
    factorise = jax.shard_map(
        partial(_factorise, layout),
        in_specs=(spread, whole, whole),
        out_specs=(spread, whole),
        axis_names=set(all_axes()),
    )
    # What fills the last blocks up has ones on the diagonal.
    is_filled_in = layout.blocks(jnp.ones_like(shift)) == 0
    shifts = jnp.where(is_filled_in, 1, layout.blocks(shift))
    rows, inverses = factorise(_mesh.over_all(matrix), layout.blocks(scale), shifts)
    return DistributedFactor(rows, inverses, layout)


def dense_cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """As `cholesky`, for `dense_cho_solve`; on TPUs large ones in blocks, by one device alone.

    There XLA writes its own factorisation out: 49 s to compile at n = 2,048, and four times that
    for twice as many rows. In blocks, those on the diagonal are inverted.
    """
    if len(matrix) < _LARGE:
        return cholesky(matrix)
    # Not by `jax.default_backend()`: programs for TPUs are compiled on machines without one.
    return jax.lax.platform_dependent(matrix, tpu=_cholesky_alone, default=cholesky)


def dense_cho_solve(factor: Float[Array, "n n"], right: Float[Array, " n"]) -> Float[Array, " n"]:
    """As `cho_solve`; on TPUs large ones in blocks as well."""
    if len(factor) < _LARGE:
        return cho_solve(factor, right)
    return jax.lax.platform_dependent(factor, right, tpu=_solve_alone, default=cho_solve)


def _cholesky_alone(matrix: Array) -> Array:
    layout = _Layout.of(len(matrix), ())
    ones = jnp.ones(len(matrix), matrix.dtype)
    blocks = layout.blocks(ones)
    # `_factorise` reads both triangles, callers of `cholesky` fill the lower one only.
    symmetric = jnp.tril(matrix) + jnp.tril(matrix, -1).T
    rows, inverses = _factorise(layout, symmetric, blocks, jnp.where(blocks == 0, 1, 0.0))
    # With one device the order of elimination is that of the rows, and what fills up is behind.
    lower = rows[: len(matrix), : len(matrix)]
    # As LAPACK: NaN all over.
    return jnp.where(jnp.isfinite(inverses[-1, -1, -1]), lower, jnp.nan)


def _solve_alone(factor: Array, right: Array) -> Array:
    layout = _Layout.of(len(factor), ())
    missing = layout.num_own_rows - len(factor)
    ones = jnp.pad(jnp.zeros_like(right), (0, missing), constant_values=1)
    rows = jnp.pad(factor, (0, missing)) + jnp.diag(ones)
    steps, block = layout.num_steps, layout.block
    numbers = jnp.arange(steps)
    # On the diagonal of the factor stand inverse blocks already, see `_factorise`.
    inverses = rows.reshape(steps, block, steps, block)[numbers, :, numbers]
    return layout.flat(_solve(layout, rows, inverses, layout.blocks(right)))


def _factorise(layout: _Layout, matrix: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    """The work of one device on its rows of the matrix; columns in the order of elimination.

    With block columns Aₖ of the matrix and Lₖ of the factor, step k is

        Aₖ − Σ_{j<k} Lⱼ (row k of Lⱼ)ᵀ  =: Cₖ,    L_kk = chol(row k of Cₖ),    Lₖ = Cₖ L_kk⁻ᵀ.
    """
    block, width = layout.block, layout.block * layout.num_own // layout.num_tiles
    here, from_owner = layout.here(), layout.from_owner
    flat = lambda blocks: blocks.reshape(*blocks.shape[:-3], -1)
    own = lambda blocks: blocks[:, here].reshape(-1)
    num_own, num_all = layout.num_own_rows, layout.num_steps * block
    position = own(jnp.arange(num_all).reshape(layout.num_own, layout.num_shares, block))

    matrix = _filled(flat(layout.blocks(matrix)).T, num_own).T * flat(scale)
    on_diagonal = jnp.arange(num_all) == position[:, None]
    start = own(scale)[:, None] * matrix + jnp.where(on_diagonal, own(shift)[:, None], 0)

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, inverses = state
        index, owner = number // layout.num_shares, number % layout.num_shares
        tile = index // (layout.num_own // layout.num_tiles)
        mine = jax.lax.dynamic_slice_in_dim(rows, index * block, block)
        panel = from_owner(mine, owner)
        # From here on the columns still hold the matrix, and not the factor.
        panel = jnp.where(jnp.arange(num_all) < number * block, panel, 0)

        def below(down: Array, column: Array) -> Array:
            def across(along: Array, left: Array) -> Array:
                at = (down * width, along * width * layout.num_shares)
                size = (width, width * layout.num_shares)
                factor = jax.lax.dynamic_slice(rows, at, size)
                other = jax.lax.dynamic_slice_in_dim(panel, at[1], size[1], 1)
                # Rows above block k meet inverses on the diagonal here, and come out wrong. They
                # are set to zero below.
                return left - _precision.matmul(factor, other.T)

            left = jax.lax.dynamic_slice_in_dim(column, down * width, width)
            left = jax.lax.fori_loop(0, tile + 1, across, left)
            return jax.lax.dynamic_update_slice_in_dim(column, left, down * width, 0)

        column = jax.lax.dynamic_slice_in_dim(rows, number * block, block, 1)
        # Tiles above are done, and those to the right are zero in `panel`: bounds that are traced
        # save two thirds of the products, and forbid reverse mode, which nobody needs: callers
        # differentiate the solves.
        column = jax.lax.fori_loop(tile, layout.num_tiles, below, column)
        square = jax.lax.dynamic_slice_in_dim(column, index * block, block)
        factor = cholesky(from_owner(square, owner))
        inverse = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        column = _precision.matmul(column, inverse.T)
        column = jnp.where(position[:, None] >= (number + 1) * block, column, 0)
        own = jax.lax.dynamic_slice_in_dim(column, index * block, block)
        own = jnp.where(here == owner, inverse, own)
        column = jax.lax.dynamic_update_slice_in_dim(column, own, index * block, 0)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, column, number * block, 1)
        return rows, inverses.at[number].set(inverse)

    identity = jnp.eye(block, dtype=start.dtype)
    inverses = jnp.zeros((layout.num_steps, block, block), start.dtype)
    return jax.lax.fori_loop(0, layout.num_steps, step, (start, inverses))


def _solve(layout: _Layout, rows: Array, inverses: Array, right: Array) -> Array:
    """The work of one device on its rows of the factor; `right` in the order of elimination."""
    block, here = layout.block, layout.here()
    column = lambda number: jax.lax.dynamic_slice_in_dim(rows, number * block, block, 1)

    def forward(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, found = state  # of our rows, of all
        index, owner = number // layout.num_shares, number % layout.num_shares
        part = layout.from_owner(left[index], owner)
        part = _precision.matmul(inverses[number], part)
        left = left - _precision.matmul(column(number), part).reshape(left.shape)
        return left, found.at[number].set(part)

    # With Lᵀ a block of the result needs the rows of all devices: each adds up its own, and these
    # sums are sent, which are as small as the parts that go round in `forward`.
    def backward(back: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        own, found = state
        number = layout.num_steps - 1 - back
        index, owner = number // layout.num_shares, number % layout.num_shares
        part = layout.sum(_precision.matmul(own.reshape(-1), column(number)))
        part = _precision.matmul(found[number] - part, inverses[number])
        own = own.at[index].set(jnp.where(here == owner, part, own[index]))
        return own, found.at[number].set(part)

    found = right.reshape(layout.num_steps, block)
    own = right[:, here]
    _, found = jax.lax.fori_loop(0, layout.num_steps, forward, (own, found))
    _, found = jax.lax.fori_loop(0, layout.num_steps, backward, (jnp.zeros_like(own), found))
    return found.reshape(right.shape)
