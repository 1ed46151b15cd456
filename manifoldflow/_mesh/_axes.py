"""The axes of the mesh in force, and over how many devices they spread what."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count

EXAMPLES, PARAMETERS = "examples", "parameters"


@checked
def mesh(
    *, examples: int | None = None, parameters: int | None = None
) -> AbstractContextManager[Mesh]:
    """A context in which examples are spread over devices, with few and large messages.

    It is `jax.set_mesh` for a mesh with the axis `"examples"`; any mesh with an axis of that name
    and of type Auto will do. Each device makes the rows of the Jacobian for its share of the
    examples. It gets the factors of the others in one message, and makes an equal part of the Gram
    matrix's upper triangle, which is then put together on all of them.

    With `parameters` there is a second axis, `"parameters"`. Then no device holds all parameters,
    tangents or factors of the Jacobian: large leaves are cut over all devices, where
    `manifoldflow.shard_parameters` puts them, and the Gram matrix is made in blocks.

    ```python
    with mf.mesh(examples=4, parameters=2):
        loss = mf.shard_examples(loss)
        model = mf.shard_parameters(model)
        walk = mf.solve(mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise), model, end_time=1.0)
    ```

    Args:
        examples: how many devices share the examples; by default all, of all processes, divided
            by `parameters`.
        parameters: how many devices share the widths of layers; by default none do, and every
            device holds all parameters.

    Raises:
        ValueError: more devices than there are.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=jnp.dot)
        >>> with mf.mesh(examples=1) as devices:
        ...     value = mf.shard_examples(loss)(jnp.zeros(2))
        >>> print(dict(devices.shape), value)
        {'examples': 1} 0.5
    """
    devices = jax.devices()
    names = (EXAMPLES,) if parameters is None else (EXAMPLES, PARAMETERS)
    wide = 1 if parameters is None else checked_count("mesh: parameters", parameters)
    many = len(devices) // wide if examples is None else checked_count("mesh: examples", examples)
    if many * wide > len(devices) or many == 0:
        asked = f"{many}" if parameters is None else f"examples={examples}, parameters={wide}"
        what = "mesh: examples" if parameters is None else "mesh: examples × parameters"
        raise ValueError(
            f"{what} must be at most the number of devices, {len(devices)}; got {asked}. "
            "On CPUs, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of them."
        )
    grid = np.array(devices[: many * wide]).reshape((many, wide)[: len(names)])
    return _in_force(Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names)))


@contextmanager
def _in_force(mesh: Mesh) -> Iterator[Mesh]:
    # Called without `with`, `jax.set_mesh` is in force from then on.
    with jax.set_mesh(mesh):
        yield mesh


def axes_in_force() -> dict[str, int]:
    """The axes in force that are ours, with their sizes, in the order of the mesh."""
    here = jax.sharding.get_abstract_mesh()
    # Within `shard_map` our axes are of type Manual, and a constraint that names one is an error.
    # There everything counts as on one device.
    return {n: here.shape[n] for n in here.axis_names if n in ours(here.auto_axes)}


def ours(names: Sequence[Any]) -> list[str]:
    return [name for name in names if name in (EXAMPLES, PARAMETERS)]


def num_devices() -> int:
    """Over how many devices arrays are spread here, 1 without a mesh."""
    return int(np.prod(list(axes_in_force().values()), dtype=int))


def num_shares(num_examples: int) -> int:
    """Over how many devices so many examples are spread here; 1 where they cannot be."""
    size = axes_in_force().get(EXAMPLES, 1)
    return size if num_examples % size == 0 else 1


def is_spread(num_examples: int) -> bool:
    """True where arrays of this many examples are cut here, along them or along widths."""
    return num_examples % axes_in_force().get(EXAMPLES, 1) == 0 and num_devices() > 1


def share_of(num_bytes: int) -> int:
    """The bytes of the factors of a Jacobian that one device keeps.

    Without an axis of parameters it gets those of all examples for a Gram matrix.
    """
    return num_bytes // num_devices() if PARAMETERS in axes_in_force() else num_bytes


def check_axis(name: str, num_examples: int) -> None:
    """Raise unless a mesh is in force over which so many examples can be spread."""
    here = jax.sharding.get_abstract_mesh()
    if EXAMPLES not in here.auto_axes or num_examples % here.shape[EXAMPLES]:
        raise ValueError(
            f"{name} needs a mesh in force whose axis {EXAMPLES!r} divides the {num_examples} "
            f"examples; got {dict(here.shape)}. Call it within `with manifoldflow.mesh():`."
        )
