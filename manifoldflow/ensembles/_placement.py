"""The devices of an ensemble's members: a mesh, in one process or several."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

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
