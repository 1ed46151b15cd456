"""Arrays placed on the devices of a mesh: points, and the data of losses and ensembles."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
from manifoldflow._mesh._axes import axes_in_force, ours
from manifoldflow._mesh._cuts import spec_of, spread


@checked
def shard_parameters(point: PyTree[Any], mesh: Mesh | None = None) -> PyTree[Any]:
    """The same point with its parameters spread over the devices of a mesh.

    With an axis "parameters" in the mesh, every leaf above 64 kB is cut along its longest axis
    that the number of these devices divides, and over the devices that share the examples along
    another, so that each holds its part and no more. Small leaves are on every device, and without
    such an axis all are. Tangents and results are spread in the same way.

    Args:
        point: any PyTree; of arrays, or of `jax.ShapeDtypeStruct` for programs that are compiled
            ahead of time, which then say where the arrays will be.
        mesh: by default the one that is in force, as within `with manifoldflow.mesh(…)`.

    Raises:
        ValueError: no mesh at all.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> with mf.mesh(examples=1, parameters=1):
        ...     point = mf.shard_parameters({"w": jnp.ones(3)})
        >>> point["w"].sharding.mesh.axis_names
        ('examples', 'parameters')
    """
    leaves = jax.tree.leaves(point)
    if mesh is None and is_traced(leaves):
        if not axes_in_force():
            raise ValueError(no_mesh("shard_parameters"))
        return jax.tree.map(lambda leaf: spread(leaf) if eqx.is_array(leaf) else leaf, point)
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(no_mesh("shard_parameters"))
    mesh = as_auto(mesh)
    sizes = {name: mesh.shape[name] for name in ours(mesh.axis_names)}

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return leaf
        return _placed_leaf(leaf, NamedSharding(mesh, spec_of(leaf, sizes)))

    return jax.tree.map(place, point)


def no_mesh(name: str) -> str:
    return (
        f"{name} needs a mesh; got none. Call it within `with manifoldflow.mesh():`, or hand over "
        "a jax.sharding.Mesh."
    )


def as_auto(mesh: Mesh) -> Mesh:
    """The mesh with axes of type Auto.

    With Explicit axes JAX asks for the sharding of every intermediate array.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def placed(tree: PyTree[Array], mesh: Mesh, axis: str | None) -> PyTree[Array]:
    """Concrete arrays on the devices of the mesh, split along axis 0 or copied to each.

    With devices of several processes, each process brings the whole array.
    """
    sharding = NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec())
    return jax.tree.map(lambda leaf: _placed_leaf(leaf, sharding), tree)


def _placed_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if is_traced(leaf) or sharding.is_fully_addressable:
        return leaf if is_traced(leaf) else jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # Shared by all processes already, which is so of all that is made within a mesh.
        is_here = leaf.sharding.device_set == sharding.device_set
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf) if is_here else leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # The callback below gives NumPy arrays, and there are none of keys.
        data = _placed_leaf(jr.key_data(leaf), sharding)
        return jr.wrap_key_data(data, impl=jr.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
