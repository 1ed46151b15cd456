"""Half of a Gram matrix over devices: each makes as many square tiles of the upper triangle.

With 2E strips of rows for E devices the triangle has E(2E + 1) tiles, 2E + 1 for each device. All
are of one size, so that all devices run one program, and none waits for another.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _mesh

# Smaller tiles than the matrix units of accelerators would leave these idle.
_SMALLEST = 128


def has_tiles(num_examples: int, num_rows: int) -> bool:
    """True where examples alone are spread, over devices that get tiles of full size."""
    sizes = _mesh.axes_in_force()
    num_strips = 2 * sizes.get(_mesh.EXAMPLES, 1)
    is_spread = num_strips > 2 and _mesh.PARAMETERS not in sizes and num_examples % num_strips == 0
    return is_spread and num_rows // num_strips >= _SMALLEST


def tiles(
    product: Callable[[PyTree[Array], PyTree[Array]], Float[Array, "tile tile"]],
    rows: PyTree[Array],
) -> Float[Array, "tiles tile tile"]:
    """The tiles of the products of all rows, of which each device has its own.

    Args:
        product: of two strips of the rows.
        rows: arrays with a leading axis of examples, whole on each device.
    """
    size = len(jax.tree.leaves(rows)[0]) // _num_strips()
    cut = lambda array, number: jax.lax.dynamic_slice_in_dim(array, number * size, size)
    strip = lambda rows, number: jax.tree.map(lambda array: cut(array, number), rows)

    def of_device(rows: PyTree[Array], numbers: Int[Array, "tiles 2"]) -> Array:
        # A loop, whose program does not grow with the number of devices.
        return jax.lax.map(lambda at: product(strip(rows, at[0]), strip(rows, at[1])), numbers)

    whole, own = PartitionSpec(), PartitionSpec(_mesh.EXAMPLES)
    return jax.shard_map(
        of_device, in_specs=(whole, own), out_specs=own, axis_names={_mesh.EXAMPLES}
    )(rows, jnp.asarray(np.stack(np.triu_indices(_num_strips()), axis=1)))


def triangle(tiles: Float[Array, "tiles tile tile"]) -> Float[Array, "rows rows"]:
    """The matrix, whole on each device, with zeros below the tiles on the diagonal."""
    num_strips = _num_strips()
    # Below the diagonal the number of a tile that is not there.
    places = np.full((num_strips, num_strips), len(tiles))
    places[np.triu_indices(num_strips)] = np.arange(len(tiles))
    found = _mesh.whole(tiles).at[places].get(mode="fill", fill_value=0)
    return found.swapaxes(1, 2).reshape(num_strips * tiles.shape[1], -1)


def _num_strips() -> int:
    return 2 * _mesh.axes_in_force()[_mesh.EXAMPLES]
