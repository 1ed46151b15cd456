"""Where the members of an ensemble run: a mesh of devices, one process or several."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._errors import is_traced

_AXIS = "member"


def mesh_of(mesh: Mesh | None) -> Mesh | None:
    """The mesh to spread members over; None where there is nothing to spread over.

    An axis of type Explicit, which `jax.make_mesh` makes by default, is taken as Auto: with
    Explicit axes JAX asks for the sharding of every intermediate array.
    """
    if mesh is not None:
        if not isinstance(mesh, Mesh) or len(mesh.axis_names) != 1:
            got = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else repr(mesh)
            raise ValueError(
                f"mesh must be a jax.sharding.Mesh with one axis; got {got}. Make one with "
                'jax.make_mesh((jax.device_count(),), ("member",)).'
            )
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    # An ensemble inside a member of another finds its devices taken already.
    is_inside_another = bool(jax.sharding.get_abstract_mesh().manual_axes)
    devices = jax.local_devices()
    if len(devices) == 1 or is_inside_another:
        return None
    return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def placed(tree: PyTree[Array], mesh: Mesh, *, is_split: bool) -> PyTree[Array]:
    """Concrete arrays on the devices of the mesh, split along axis 0 or copied to each.

    With devices of several processes, each process brings the whole array.
    """
    spec = PartitionSpec(*mesh.axis_names) if is_split else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: _placed_leaf(leaf, sharding), tree)


def _placed_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    if is_traced(leaf) or sharding.is_fully_addressable:
        return leaf if is_traced(leaf) else jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf  # Shared by all processes already: jit moves it where it is needed.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _placed_leaf(jr.key_data(leaf), sharding)
        return jr.wrap_key_data(data, impl=jr.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
