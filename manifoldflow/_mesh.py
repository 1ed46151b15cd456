"""The devices over which examples are spread: JAX's own mesh, as it is in force.

Arrays that are spread without a word of ours keep what XLA finds for them: for a Gram matrix that
is hundreds of small messages. Here is the word: which arrays are cut along their examples, and
which are whole on every device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, is_traced

Tree = TypeVar("Tree", bound=PyTree[Any])

EXAMPLES = "examples"
# Below this, what counts is the number of messages; above, that products go on meanwhile.
_ONE_MESSAGE = 2**26


@checked
def mesh(*, examples: int | None = None) -> AbstractContextManager[Mesh]:
    """A context in which examples are spread over devices, with few and large messages.

    It is `jax.set_mesh` for a mesh with the axis `"examples"`; any mesh with an axis of that name
    and of type Auto will do. Each device makes the rows of the Jacobian for its share of the
    examples. It gets the factors of the others in one message, and makes its rows of the Gram
    matrix, which is then put together on all of them.

    ```python
    with mf.mesh(examples=8):
        loss = mf.shard_examples(loss)
        walk = mf.solve(mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise), model, end_time=1.0)
    ```

    Args:
        examples: how many devices share the examples; by default all, of all processes.

    Returns:
        A context manager that gives the mesh.

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
    count = len(devices) if examples is None else checked_count("mesh: examples", examples)
    if count > len(devices):
        raise ValueError(
            f"mesh: examples must be at most the number of devices, {len(devices)}; got {count}. "
            "On CPUs, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of them."
        )
    return _in_force(Mesh(np.array(devices[:count]), (EXAMPLES,), axis_types=(AxisType.Auto,)))


@contextmanager
def _in_force(mesh: Mesh) -> Iterator[Mesh]:
    # Called without `with`, `jax.set_mesh` is in force from then on.
    with jax.set_mesh(mesh):
        yield mesh


def num_shares(num_examples: int) -> int:
    """Over how many devices so many examples are spread here; 1 where they cannot be."""
    here = jax.sharding.get_abstract_mesh()
    size = here.shape[EXAMPLES] if EXAMPLES in here.auto_axes else 1
    return size if num_examples % size == 0 else 1


def check_axis(name: str, num_examples: int) -> None:
    """Raise unless a mesh is in force over which so many examples can be spread."""
    here = jax.sharding.get_abstract_mesh()
    if EXAMPLES not in here.auto_axes or num_examples % here.shape[EXAMPLES]:
        raise ValueError(
            f"{name} needs a mesh in force whose axis {EXAMPLES!r} divides the {num_examples} "
            f"examples; got {dict(here.shape)}. Call it within `with manifoldflow.mesh():`."
        )


def cut(tree: Tree) -> Tree:
    """Every array along its leading axis of examples."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(EXAMPLES))


def whole(tree: Tree) -> Tree:
    """Every array on every device."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def gathered(tree: Tree) -> Tree:
    """`whole` for arrays with a leading axis of examples, in one message where they are small."""
    leaves, treedef = jax.tree.flatten(tree)
    # A weight and its bias share a factor.
    distinct = {id(leaf): leaf for leaf in leaves}
    arrays = list(distinct.values())
    is_small = sum(array.nbytes for array in arrays) <= _ONE_MESSAGE
    has_one_dtype = len({array.dtype for array in arrays}) == 1
    together = _in_one if is_small and has_one_dtype else whole
    found = dict(zip(distinct, together(arrays)))
    return jax.tree.unflatten(treedef, [found[id(leaf)] for leaf in leaves])


def _in_one(arrays: list[Array]) -> list[Array]:
    flat = [array.reshape(array.shape[0], -1) for array in arrays]
    ends = np.cumsum([array.shape[1] for array in flat])
    parts = jnp.split(whole(jnp.concatenate(cut(flat), axis=1)), ends[:-1], axis=1)
    return [part.reshape(array.shape) for part, array in zip(parts, arrays)]


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
