"""The data of a loss over several devices."""

from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh

from manifoldflow import _mesh
from manifoldflow._boundary import checked
from manifoldflow.losses._base import AbstractExampleLoss, AbstractResidualLoss

Loss = TypeVar("Loss", bound=AbstractResidualLoss | AbstractExampleLoss)


@checked
def shard_examples(loss: Loss, mesh: Mesh | None = None) -> Loss:
    """The same loss with its examples spread over the devices of a mesh.

    Within `with manifoldflow.mesh(…)`, everything that is computed from it is spread as well, in
    few large messages. Outside of it XLA finds for itself how to spread things: the numbers are
    the same, and the messages many. A dense factorisation gathers n² numbers on every device;
    `linalg.IterativeGram` never does. The point may be replicated or sharded by `jax.device_put`,
    as for any JAX program.

    Args:
        loss: with N examples.
        mesh: with one axis of devices whose number divides N; by default the one that is in force.

    Raises:
        ValueError: no mesh at all; several axes, or N is not divisible.
    """
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    num_examples = jax.tree.leaves(loss.data)[0].shape[0]
    if mesh.empty:
        raise ValueError(
            "shard_examples needs a mesh; got none. Call it within `with manifoldflow.mesh():`, or "
            "hand over a jax.sharding.Mesh with one axis."
        )
    if len(mesh.axis_names) != 1 or num_examples % mesh.size:
        raise ValueError(
            "shard_examples needs a mesh with one axis whose size divides the number of "
            f"examples; got {dict(mesh.shape)} and {num_examples} examples. Drop "
            f"{num_examples % mesh.size} of them, or use fewer devices."
        )
    # With Explicit axes JAX asks for the sharding of every intermediate array.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    leaves = jax.tree.leaves(loss.data)
    sharded = [_mesh.placed(leaf, mesh, is_split=True) for leaf in leaves]
    return eqx.tree_at(lambda loss: jax.tree.leaves(loss.data), loss, sharded)
