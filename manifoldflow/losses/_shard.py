"""The data of a loss over several devices."""

from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from manifoldflow._boundary import checked
from manifoldflow.losses._base import AbstractExampleLoss, AbstractResidualLoss

Loss = TypeVar("Loss", bound=AbstractResidualLoss | AbstractExampleLoss)


@checked
def shard_examples(loss: Loss, mesh: Mesh) -> Loss:
    """The same loss with its examples spread over the devices of a mesh.

    Everything computed from it under `jit` is then spread as well, by XLA: the factors of
    the Jacobian and the rows of the Gram matrix live where their examples do. A dense
    factorisation still gathers n² numbers on every device; `linalg.IterativeGram` never does.
    The point may be replicated or sharded by `jax.device_put`, as for any JAX program.

    Args:
        loss: with N examples.
        mesh: with one axis of devices, whose number divides N, and `AxisType.Auto`:
            `jax.make_mesh((jax.device_count(),), ("examples",), axis_types=(AxisType.Auto,))`.

    Raises:
        ValueError: several axes, or N is not divisible.
    """
    num_examples = jax.tree.leaves(loss.data)[0].shape[0]
    if len(mesh.axis_names) != 1 or num_examples % mesh.size:
        raise ValueError(
            "shard_examples needs a mesh with one axis whose size divides the number of "
            f"examples; got {dict(mesh.shape)} and {num_examples} examples. Drop "
            f"{num_examples % mesh.size} of them, or use fewer devices."
        )
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    leaves, treedef = jax.tree.flatten(loss.data)
    sharded = jax.tree.unflatten(treedef, [jax.device_put(leaf, sharding) for leaf in leaves])
    return eqx.tree_at(lambda loss: jax.tree.leaves(loss.data), loss, jax.tree.leaves(sharded))
