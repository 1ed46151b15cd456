"""The data of a loss over several devices."""

from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

from manifoldflow import _mesh
from manifoldflow._boundary import checked
from manifoldflow._errors import is_traced
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

    Returns:
        A loss of the same kind, whose data lie on the devices of the mesh.

    Raises:
        ValueError: no mesh at all; several axes, or N is not divisible.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> with mf.mesh(examples=1):
        ...     spread = mf.shard_examples(loss)
        >>> print(spread.inputs.sharding.num_devices, spread(jnp.zeros(2)))
        1 0.5
    """
    leaves = jax.tree.leaves(loss.data)
    if mesh is None and is_traced(leaves):
        _mesh.check_axis("shard_examples", len(leaves[0]))
        return _with_data(loss, _mesh.cut(leaves))
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(
            "shard_examples needs a mesh; got none. Call it within `with manifoldflow.mesh():`, or "
            "hand over a jax.sharding.Mesh with one axis."
        )
    num_examples, shape = len(leaves[0]), dict(mesh.shape)
    if len(shape) != 1:
        raise ValueError(
            f"shard_examples needs a mesh with one axis, for {num_examples} examples; got "
            f"{shape}. Make one by `with manifoldflow.mesh():`."
        )
    if num_examples % mesh.size:
        raise ValueError(
            "shard_examples needs a mesh with one axis whose size divides the number of "
            f"examples; got {shape} and {num_examples} examples. Drop "
            f"{num_examples % mesh.size} of them, or use fewer devices."
        )
    # With Explicit axes JAX asks for the sharding of every intermediate array.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))
    return _with_data(loss, [_mesh.placed(leaf, mesh, is_split=True) for leaf in leaves])


def _with_data(loss: Loss, leaves: list[Array]) -> Loss:
    found = dict(zip(map(id, jax.tree.leaves(loss.data)), leaves))
    return jax.tree.map(lambda leaf: found.get(id(leaf), leaf), loss)
