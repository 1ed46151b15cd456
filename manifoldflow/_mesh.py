"""The devices over which examples and parameters are spread: JAX's own mesh, as it is in force.

Arrays that are spread without a word of ours keep what XLA finds for them: for a Gram matrix that
is hundreds of small messages. Here is the word: which arrays are cut along their examples, which
along their widths, and which are whole on every device.

The axis "examples" cuts arrays along their examples. The axis "parameters" cuts them along their
longest other axis. Parameters and tangents, which have no examples, are cut along both; where a
layer is used, its parameters are gathered along "examples" alone, and its factors along
"parameters" alone. So a device never holds a whole layer, nor all examples of one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, is_traced

Tree = TypeVar("Tree", bound=PyTree[Any])

EXAMPLES, PARAMETERS = "examples", "parameters"
# Below this, what counts is the number of messages; above, that products go on meanwhile.
_ONE_MESSAGE = 2**26
# Arrays of fewer bytes take no longer to send than to announce: they are not cut along widths.
_SMALL = 2**16


@checked
def mesh(
    *, examples: int | None = None, parameters: int | None = None
) -> AbstractContextManager[Mesh]:
    """A context in which examples are spread over devices, with few and large messages.

    It is `jax.set_mesh` for a mesh with the axis `"examples"`; any mesh with an axis of that name
    and of type Auto will do. Each device makes the rows of the Jacobian for its share of the
    examples. It gets the factors of the others in one message, and makes its rows of the Gram
    matrix, which is then put together on all of them.

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


def _axes() -> dict[str, int]:
    """The axes in force that are ours, with their sizes, in the order of the mesh."""
    here = jax.sharding.get_abstract_mesh()
    return {n: here.shape[n] for n in here.axis_names if n in _ours(here.auto_axes)}


def _ours(names: Sequence[Any]) -> list[str]:
    return [name for name in names if name in (EXAMPLES, PARAMETERS)]


def num_devices() -> int:
    """Over how many devices arrays are spread here, 1 without a mesh."""
    return int(np.prod(list(_axes().values()), dtype=int))


def num_shares(num_examples: int) -> int:
    """Over how many devices so many examples are spread here; 1 where they cannot be."""
    size = _axes().get(EXAMPLES, 1)
    return size if num_examples % size == 0 else 1


def is_spread(num_examples: int) -> bool:
    """Whether arrays of so many examples are cut here, along these or along widths."""
    return num_examples % _axes().get(EXAMPLES, 1) == 0 and num_devices() > 1


def share_of(num_bytes: int) -> int:
    """How many bytes of the factors of a Jacobian one device keeps.

    Without an axis of parameters it gets those of all examples for a Gram matrix.
    """
    return num_bytes // num_devices() if PARAMETERS in _axes() else num_bytes


def check_axis(name: str, num_examples: int) -> None:
    """Raise unless a mesh is in force over which so many examples can be spread."""
    here = jax.sharding.get_abstract_mesh()
    if EXAMPLES not in here.auto_axes or num_examples % here.shape[EXAMPLES]:
        raise ValueError(
            f"{name} needs a mesh in force whose axis {EXAMPLES!r} divides the {num_examples} "
            f"examples; got {dict(here.shape)}. Call it within `with manifoldflow.mesh():`."
        )


def _names(array: Any, sizes: dict[str, int], *, first: int = 0) -> list[tuple[str, ...]]:
    """How parameters are cut: an axis of the mesh goes to the longest part that it divides.

    Arrays of examples are cut along these, axis 0, in any case: `first` is the first other one.
    """
    names: list[tuple[str, ...]] = [()] * array.ndim
    names[:first] = [_examples(array)] * first
    parts = [0] * first + list(array.shape[first:])
    is_large = array.size * array.dtype.itemsize > _SMALL and PARAMETERS in sizes
    for name in (n for n in (PARAMETERS, EXAMPLES) if is_large and n in sizes):
        fits = [axis for axis, part in enumerate(parts) if part and part % sizes[name] == 0]
        if fits:
            longest = max(fits, key=lambda axis: parts[axis])
            names[longest] += (name,)
            parts[longest] //= sizes[name]
    return names


def _spec(array: Any, sizes: dict[str, int], *, first: int = 0) -> PartitionSpec:
    return PartitionSpec(*_names(array, sizes, first=first))


def _constrained(tree: Tree, spec_fn: Callable[[Any], PartitionSpec]) -> Tree:
    """Every array as its spec says; nothing where there is one device."""
    if num_devices() == 1:
        return tree
    constrain = lambda x: jax.lax.with_sharding_constraint(x, spec_fn(x))
    return jax.tree.map(constrain, tree)


def whole(tree: Tree) -> Tree:
    """Every array on every device."""
    return _constrained(tree, lambda x: PartitionSpec())


def rows_cut(tree: Tree) -> Tree:
    """Every array along its leading axis of examples only."""
    return _constrained(tree, lambda x: PartitionSpec(_examples(x)))


def rows_and_widths_cut(tree: Tree) -> Tree:
    """Every array along its leading axis of examples, and large ones along another as well."""
    sizes = _axes()
    if PARAMETERS not in sizes:
        return tree
    alone = {PARAMETERS: sizes[PARAMETERS]}
    return _constrained(tree, lambda x: _spec(x, alone, first=1))


def over_all(tree: Tree) -> Tree:
    """Every array along its leading axis, over all devices."""
    return _constrained(tree, lambda x: PartitionSpec(tuple(_axes())))


def in_blocks(matrix: Array) -> Array:
    """Rows over the axis of examples, columns over that of parameters."""
    return _constrained(matrix, lambda x: PartitionSpec(_examples(x), _name(PARAMETERS)))


def spread(tree: Tree) -> Tree:
    """Parameters or tangents as they are kept: cut over all devices, small ones whole."""
    sizes = _axes()
    return _constrained(tree, lambda x: _spec(x, sizes))


def at_work(tree: Tree) -> Tree:
    """Parameters or tangents as a layer uses them: whole along the axis of examples."""
    sizes = _axes()
    if PARAMETERS not in sizes:
        return tree
    # Spread before, for the sake of the transpose: what comes back is cut up at once.
    return _constrained(spread(tree), lambda x: PartitionSpec(*_names_at_work(x, sizes)))


def _names_at_work(array: Any, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    return [tuple(name for name in at if name != EXAMPLES) for at in _names(array, sizes)]


def in_turn(before: Any, tree: Tree) -> Tree:
    """The tree, once what comes before is there: so that layers are gathered one by one."""
    if PARAMETERS not in _axes() or not jax.tree.leaves(before):
        return tree
    return _after(before, tree)


@jax.custom_jvp
def _after(before: Any, tree: Any) -> Any:
    return jax.lax.optimization_barrier((before, tree))[1]


# A barrier's own derivative is one of all tangents: weights that have none would get one, and one
# for each example.
_after.defjvp(lambda primals, tangents: (_after(*primals), tangents[1]), symbolic_zeros=True)


def layer(fn: Callable[..., Any], orders: Sequence[tuple[int, ...] | None]) -> Callable[..., Any]:
    """A function of weights that are gathered in their turn, and again for the derivative.

    Args:
        fn: of arrays.
        orders: for each of them the axes of a parameter in their order there; None if it is none.
    """
    sizes = _axes()
    has_weight = None in orders and any(order is not None for order in orders)
    if PARAMETERS not in sizes or sizes.get(EXAMPLES, 1) == 1 or not has_weight:
        return fn

    def gathered(array: Array, order: tuple[int, ...] | None, others: list[Array]) -> Array:
        if order is None or array.size * array.dtype.itemsize <= _SMALL:
            return array
        shape = [array.shape[order.index(axis)] for axis in range(array.ndim)]
        names = _names_at_work(jax.ShapeDtypeStruct(shape, array.dtype), sizes)
        spec = PartitionSpec(*(names[axis] for axis in order))
        return jax.lax.with_sharding_constraint(_after(others, array), spec)

    @jax.checkpoint
    def of_parts(*arrays: Array) -> Any:
        others = [array for array, order in zip(arrays, orders) if order is None]
        return fn(*(gathered(array, order, others) for array, order in zip(arrays, orders)))

    return of_parts


def columns_cut(tree: Tree) -> Tree:
    """Every array as the columns of a Gram matrix: whole, or along the axis of parameters."""
    return _constrained(tree, lambda x: PartitionSpec(_name(PARAMETERS)))


def in_one(place: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """`rows_cut` or `columns_cut` in one message where the arrays are small.

    Large ones are left as they are: they are sent layer by layer.
    """
    if num_devices() == 1 or (place is rows_cut and PARAMETERS not in _axes()):
        return tree  # All of a row is there.
    leaves, treedef = jax.tree.flatten(tree)
    # A weight and its bias share a factor.
    distinct = {id(leaf): leaf for leaf in leaves}
    arrays = list(distinct.values())
    is_small = sum(array.nbytes for array in arrays) <= _ONE_MESSAGE
    if not is_small or len({array.dtype for array in arrays}) > 1:
        return tree
    found = dict(zip(distinct, _in_one(place, arrays)))
    return jax.tree.unflatten(treedef, [found[id(leaf)] for leaf in leaves])


def _in_one(place: Callable[[Any], Any], arrays: list[Array]) -> list[Array]:
    """Those that are cut along widths in one message, all others in another."""
    sizes = _axes()
    packed: dict[int, list[Array]] = {}
    for array in arrays:
        packed.setdefault(_num_parts(array, sizes), []).append(array)
    found: dict[int, Array] = {}
    for num_parts, pack in packed.items():
        # The parts of a width stay where they are.
        parts = [array.reshape(array.shape[0], num_parts, -1) for array in pack]
        ends = np.cumsum([part.shape[2] for part in parts])
        at = PartitionSpec(_examples(parts[0]), _name(PARAMETERS) if num_parts > 1 else None)
        joined = jnp.concatenate(_constrained(parts, lambda _, at=at: at), axis=2)
        placed = jnp.split(place(joined), ends[:-1], axis=2)
        found |= {id(x): part.reshape(x.shape) for x, part in zip(pack, placed)}
    return [found[id(array)] for array in arrays]


def _num_parts(array: Array, sizes: dict[str, int]) -> int:
    """Over how many devices the width of rows is cut: the first axis that is longer than one."""
    names = _names(array, {n: s for n, s in sizes.items() if n == PARAMETERS}, first=1)
    axis = next((axis for axis in range(1, array.ndim) if array.shape[axis] > 1), 0)
    return sizes[PARAMETERS] if PARAMETERS in names[axis] else 1


def _name(axis: str) -> tuple[str, ...]:
    return (axis,) if axis in _axes() else ()


def _examples(array: Any) -> tuple[str, ...]:
    return (EXAMPLES,) if num_shares(array.shape[0]) > 1 else ()


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
        if not _axes():
            raise ValueError(no_mesh("shard_parameters"))
        return jax.tree.map(lambda leaf: spread(leaf) if eqx.is_array(leaf) else leaf, point)
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError(no_mesh("shard_parameters"))
    mesh = as_auto(mesh)
    sizes = {name: mesh.shape[name] for name in _ours(mesh.axis_names)}

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return leaf
        return _placed_leaf(leaf, NamedSharding(mesh, _spec(leaf, sizes)))

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
        return leaf  # Shared by all processes already: jit moves it where it is needed.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _placed_leaf(jr.key_data(leaf), sharding)
        return jr.wrap_key_data(data, impl=jr.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
