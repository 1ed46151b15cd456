"""Reading a point out of a checkpoint."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._errors import shapes_of
from manifoldflow._journal._contents import unpacked
from manifoldflow._journal._stores import Place, store_of
from manifoldflow._signatures import shown
from manifoldflow._types import Point

_KINDS = "`solve`, `simulate` or `minimize`"


@shown
def load_checkpoint(path: Place, point: Point) -> tuple[Array, Point]:
    """The time and the point of the last save in a checkpoint.

    Args:
        path: the file, or the `orbax.checkpoint.CheckpointManager`, that was given as
            `checkpoint` to `solve`, `simulate` or `minimize`, whose times are steps.
        point: any point of the same kind, for its structure.

    Returns:
        The time, a scalar array, and the point.

    Raises:
        ValueError: the file is damaged, is none of these, or holds a point of another kind.
        OSError: there is no such file, or it cannot be read; or the manager has no checkpoint.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> flow = mf.GradientFlow(mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2))
        >>> start = jnp.array([1.0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "walk.npz"
        ...     walk = mf.solve(flow, start, end_time=1.0, checkpoint=file)
        ...     time, point = mf.load_checkpoint(file, start)
        >>> print(time, point.round(3))
        1.0 [0.368]
    """
    coordinates, remainder = _tree.split(point)
    leaves, treedef = jax.tree.flatten(coordinates)
    store = store_of("path", path)
    name = store.name()
    arrays = unpacked(name, store.read(_KINDS), _KINDS)[1]
    stored = [arrays[name] for name in sorted(arrays, key=_number) if name.startswith("point_")]
    shapes = [column.shape[1:] for column in stored]
    if shapes != [leaf.shape for leaf in leaves]:
        raise ValueError(
            f"The checkpoint {name} holds a point of another structure: leaves of shapes "
            f"{shapes}; got {shapes_of(coordinates)}. Give a point like the one that was moved."
        )
    last = [jnp.asarray(column[-1]) for column in stored]
    return jnp.asarray(arrays["times"][-1]), _tree.join(
        jax.tree.unflatten(treedef, last), remainder
    )


def _number(name: str) -> int:
    return int(name.removeprefix("point_")) if name.startswith("point_") else -1
