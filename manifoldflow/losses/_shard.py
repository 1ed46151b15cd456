"""The data of a loss over several devices."""

from typing import TypeVar

import jax
from jax.sharding import Mesh
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
    `linalg.IterativeGram` never does. `manifoldflow.shard_parameters` places the point.

    Args:
        loss: with N examples.
        mesh: with one axis of devices, or those of `manifoldflow.mesh`; the number of devices that
            share the examples divides N. By default the one that is in force.

    Returns:
        A loss of the same kind, whose data lie on the devices of the mesh.

    Raises:
        ValueError: no mesh at all; other axes, or N is not divisible.

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
        return _with_data(loss, _mesh.rows_cut(leaves))
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(_mesh.no_mesh("shard_examples"))
    num_examples, shape = len(leaves[0]), dict(mesh.shape)
    if len(shape) != 1 and set(shape) != {_mesh.EXAMPLES, _mesh.PARAMETERS}:
        raise ValueError(
            f"shard_examples needs a mesh with one axis, or with 'examples' and 'parameters', for "
            f"{num_examples} examples; got {shape}. Make one by `with manifoldflow.mesh():`."
        )
    axis = mesh.axis_names[0] if len(shape) == 1 else _mesh.EXAMPLES
    if num_examples % shape[axis]:
        raise ValueError(
            f"shard_examples needs a mesh whose axis {axis!r} divides the number of "
            f"examples; got {shape} and {num_examples} examples. Drop "
            f"{num_examples % shape[axis]} of them, or use fewer devices."
        )
    mesh = _mesh.as_auto(mesh)
    return _with_data(loss, [_mesh.placed(leaf, mesh, axis) for leaf in leaves])


def _with_data(loss: Loss, leaves: list[Array]) -> Loss:
    # By identity: `data` gathers arrays from several fields, some of them of a loss within.
    found = dict(zip(map(id, jax.tree.leaves(loss.data)), leaves))
    return jax.tree.map(lambda leaf: found.get(id(leaf), leaf), loss)
