"""The devices over which examples and parameters are spread: JAX's own mesh, as it is in force.

Arrays that are spread without a word of ours keep what XLA finds for them: for a Gram matrix that
is hundreds of small messages. Here is the word: which arrays are cut along their examples, which
along their widths, and which are whole on every device.

The axis "examples" cuts arrays along their examples. The axis "parameters" cuts them along their
longest other axis. Parameters and tangents, which have no examples, are cut along both; where a
layer is used, its parameters are gathered along "examples" alone, and its factors along
"parameters" alone. So a device never holds a whole layer, nor all examples of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._mesh._axes import axes_in_force, EXAMPLES, num_devices, num_shares, PARAMETERS

Tree = TypeVar("Tree", bound=PyTree[Any])

# Below this, what counts is the number of messages; above, that products go on meanwhile.
_ONE_MESSAGE = 2**23
# Arrays of fewer bytes take no longer to send than to announce: they are not cut along widths.
_SMALL = 2**16


def _names(array: Any, sizes: dict[str, int], *, first: int = 0) -> list[tuple[str, ...]]:
    """The cuts of parameters: an axis of the mesh goes to the longest part that it divides.

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
            # An axis may be cut twice, so that a bias, which has one axis, is spread over all
            # devices too.
            names[longest] += (name,)
            parts[longest] //= sizes[name]
    return names


def spec_of(array: Any, sizes: dict[str, int], *, first: int = 0) -> PartitionSpec:
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
    sizes = axes_in_force()
    if PARAMETERS not in sizes:
        return tree
    alone = {PARAMETERS: sizes[PARAMETERS]}
    return _constrained(tree, lambda x: spec_of(x, alone, first=1))


def over_all(tree: Tree) -> Tree:
    """Every array along its leading axis, over all devices."""
    return _constrained(tree, lambda x: PartitionSpec(tuple(axes_in_force())))


def in_blocks(matrix: Array) -> Array:
    """Rows over the axis of examples, columns over that of parameters."""
    return _constrained(matrix, lambda x: PartitionSpec(_examples(x), _name(PARAMETERS)))


def spread(tree: Tree) -> Tree:
    """Parameters or tangents as they are kept: cut over all devices, small ones whole."""
    sizes = axes_in_force()
    return _constrained(tree, lambda x: spec_of(x, sizes))


def at_work(tree: Tree) -> Tree:
    """Parameters or tangents as a layer uses them: whole along the axis of examples."""
    sizes = axes_in_force()
    if PARAMETERS not in sizes:
        return tree
    # Spread before, for the sake of the transpose: what comes back is cut up at once.
    return _constrained(spread(tree), lambda x: PartitionSpec(*_names_at_work(x, sizes)))


def _names_at_work(array: Any, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    return [tuple(name for name in at if name != EXAMPLES) for at in _names(array, sizes)]


def in_turn(before: Any, tree: Tree) -> Tree:
    """The tree, once what comes before is there: so that layers are gathered one by one."""
    if PARAMETERS not in axes_in_force() or not jax.tree.leaves(before):
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
    sizes = axes_in_force()
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
    if num_devices() == 1 or (place is rows_cut and PARAMETERS not in axes_in_force()):
        return tree  # All of a row is there.
    leaves, treedef = jax.tree.flatten(tree)
    # A weight and its bias share a factor.
    distinct = {id(leaf): leaf for leaf in leaves}
    arrays = list(distinct.values())
    if not fits_one_message(arrays):
        return tree
    found = dict(zip(distinct, _in_one(place, arrays)))
    return jax.tree.unflatten(treedef, [found[id(leaf)] for leaf in leaves])


def fits_one_message(arrays: list[Array]) -> bool:
    is_small = sum(array.nbytes for array in arrays) <= _ONE_MESSAGE
    return is_small and len({array.dtype for array in arrays}) <= 1


def _in_one(place: Callable[[Any], Any], arrays: list[Array]) -> list[Array]:
    """Those that are cut along widths in one message, all others in another."""
    sizes = axes_in_force()
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
    return (axis,) if axis in axes_in_force() else ()


def _examples(array: Any) -> tuple[str, ...]:
    return (EXAMPLES,) if num_shares(array.shape[0]) > 1 else ()
