"""One function of a key over many keys: vectorised, in chunks, on all devices."""

import functools
import math
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from manifoldflow._boundary import checked, checked_but
from manifoldflow._errors import checked_count, shapes_of
from manifoldflow._mesh import placed
from manifoldflow._run import meter_of
from manifoldflow._types import Key
from manifoldflow.ensembles._placement import mesh_of

Progress = bool | dfx.AbstractProgressMeter | Callable[[dict[str, int]], None]


@checked
def member_keys(key: Key, num_members: int) -> Array:
    """The keys of the members of an ensemble: `fold_in(key, 0)`, `fold_in(key, 1)`, ….

    Member i gets the same key in every ensemble that has it: a larger ensemble begins with
    the smaller one.

    Args:
        key: one key, typed (`jax.random.key`) or legacy (`jax.random.PRNGKey`).
        num_members: a positive integer.

    Returns:
        (num_members,) keys of the kind of `key`.

    Raises:
        ValueError: a number of members that is not positive.

    Examples:
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> keys = mf.member_keys(jr.key(0), 3)
        >>> more = mf.member_keys(jr.key(0), 5)
        >>> print(keys.shape, bool((keys == more[:3]).all()))
        (3,) True
    """
    num_members = checked_count("num_members", num_members)
    return jax.vmap(lambda index: jr.fold_in(key, index))(jnp.arange(num_members))


@checked_but("fn", "keys", "chunk_size", "mesh", "progress")
def ensemble(
    fn: Callable[..., PyTree[Any]],
    keys: Array,
    *args: Any,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress = False,
) -> PyTree[Any]:
    """The values fn(key, *args) for every key, from one compiled program on all devices.

    The value of a member depends on its key and on `args` alone, up to rounding: not on the
    other members, the chunk or the devices. The devices never wait for one another.
    A repeated call with the same `fn` does not retrace: hand data over in `args`, or in the
    fields of an Equinox module that is called, and not in a closure made anew.

    Args:
        fn: (key, *args) → any PyTree with arrays, a `Solution` for example. Functions that must
            not stop when one member fails take `throw=False`.
        keys: one key per member, typed or legacy, as from `member_keys` or
            `jax.random.split`.
        *args: shared by all members. Arrays are traced; everything else, Python numbers
            too, is static, as for `equinox.filter_jit`.
        chunk_size: the most members that one device holds in memory at a time; by default
            all of its members.
        mesh: a `jax.sharding.Mesh` with one axis, by default of all local devices. With
            devices of several processes every process makes the same call, and the result
            is split over them: `jax.experimental.multihost_utils.process_allgather` brings
            it together.
        progress: True prints percentages, a Diffrax progress meter shows itself, a function
            is called after every chunk with a dict: done, total.

    Returns:
        The PyTree that `fn` returns, each array with a leading axis of members, split over
        the mesh. Numbers become arrays; other leaves are as one member returned them. Where
        the devices do not divide the number of members, the last ones take a few more that
        are cut off afterwards, and every device gets a copy of the result.

    Raises:
        ValueError: keys without an axis of members; keys of the implementation "rbg", whose
            draws depend on the batch, in chunks of more than one; a chunk size that is not
            positive; a mesh with several axes; an `fn` that returns no array.

    Examples:
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> sign = lambda key, size: size * jr.rademacher(key, (), float)
        >>> values = mf.ensemble(sign, mf.member_keys(jr.key(0), 100), 3.0)
        >>> print(values.shape, bool((abs(values) == 3).all()))
        (100,) True
    """
    num_members = _num_members(keys)
    if not callable(fn):
        raise ValueError(f"fn must be a function of a key and args; got {fn!r}.")
    if isinstance(fn, functools.partial):
        # A PyTree, so that what it binds is data and a new partial is no new function.
        fn = jax.tree_util.Partial(fn.func, *fn.args, **fn.keywords)
    if chunk_size is not None:
        chunk_size = checked_count("chunk_size", chunk_size)
    _check_implementation(keys, chunk_size)
    mesh = mesh_of(mesh)
    num_devices = 1 if mesh is None else mesh.size
    run = _Run(
        meter=meter_of(progress),
        report=_function_of(progress),
        num_members=num_members,
        num_local=math.ceil(num_members / num_devices),
        chunk_size=chunk_size,
        mesh=mesh,
        impl=jr.key_impl(keys) if _is_typed(keys) else None,
    )
    data = jr.key_data(keys) if _is_typed(keys) else keys
    data = _padded(data, run.num_local * num_devices)
    # Arrays in `fn` and `args` are traced, so that new data do not compile anew.
    shared, static = eqx.partition((fn, args), _is_data)
    if mesh is not None:
        data = placed(data, mesh, mesh.axis_names[0])
        shared = placed(shared, mesh, None)
    results = _compiled(run, data, shared, static)
    if len(data) == num_members:
        return results
    return jax.tree.map(lambda leaf: leaf[:num_members] if eqx.is_array(leaf) else leaf, results)


class _Run(eqx.Module):
    """The way through the members, without what they compute."""

    meter: dfx.AbstractProgressMeter
    report: Callable[[dict[str, int]], None] | None
    num_members: int = eqx.field(static=True)
    num_local: int = eqx.field(static=True)
    chunk_size: int | None = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)
    impl: Any = eqx.field(static=True)

    @property
    def num_chunks(self) -> int:
        return math.ceil(self.num_local / (self.chunk_size or self.num_local))


@eqx.filter_jit
def _compiled(run: _Run, data: Array, shared: PyTree[Any], static: PyTree[Any]) -> PyTree[Any]:
    returned = []

    def member(raw: Array, shared: PyTree[Any]) -> PyTree[Array]:
        fn, args = eqx.combine(shared, static)
        key = raw if run.impl is None else jr.wrap_key_data(raw, impl=run.impl)
        arrays, rest = _split_result(fn(key, *args))
        returned.append(rest)
        return arrays

    def device(data: Array, shared: PyTree[Any]) -> PyTree[Array]:
        return _in_chunks(run, lambda chunk: jax.vmap(member, (0, None))(chunk, shared), data)

    if run.mesh is not None:
        split, copied = PartitionSpec(*run.mesh.axis_names), PartitionSpec()
        # check_vma refuses every scan whose carry starts from a constant, so every solve.
        device = jax.shard_map(
            device,
            mesh=run.mesh,
            in_specs=(split, copied),
            out_specs=split,
            check_vma=False,
        )
    # `returned` is filled while `member` is traced: its static parts are no outputs of the program.
    return eqx.combine(device(data, shared), returned[-1])


def _in_chunks(run: _Run, batch_fn: Callable[[Array], PyTree[Array]], data: Array) -> PyTree[Array]:
    """The members of one device, chunk after chunk."""
    # Chunks of equal size, which waste less than one member per chunk.
    length = math.ceil(run.num_local / run.num_chunks)
    chunks = _padded(data, run.num_chunks * length)
    chunks = chunks.reshape(run.num_chunks, length, *data.shape[1:])

    def one_chunk(meter_state: Any, numbered: tuple[Array, Array]) -> tuple[Any, PyTree[Array]]:
        number, chunk = numbered
        results = batch_fn(chunk)
        return _reported(run, meter_state, number + 1, results), results

    meter_state = _on_first_device(run, run.meter.init)
    numbers = jnp.arange(run.num_chunks)
    if run.num_chunks == 1:
        meter_state, results = one_chunk(meter_state, (numbers[0], chunks[0]))
    else:
        meter_state, results = jax.lax.scan(one_chunk, meter_state, (numbers, chunks))
        joined = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: run.num_local]
        results = jax.tree.map(joined, results)
    _on_first_device(run, lambda: run.meter.close(meter_state))
    return results


def _reported(run: _Run, meter_state: Any, number: Array, results: PyTree[Array]) -> Any:
    """The meter's state after showing that `number` chunks are done, with their results."""
    report, meter = run.report, run.meter
    if report is None and isinstance(meter, dfx.NoProgressMeter):
        return meter_state
    # Without it XLA may report a chunk as done before it is begun.
    number, _ = jax.lax.optimization_barrier((number, results))
    if report is not None:
        call = functools.partial(_call, report, run.num_members, run.num_members / run.num_chunks)
        _on_first_device(run, lambda: jax.debug.callback(call, number))
    share = number / run.num_chunks
    return _on_first_device(run, lambda: meter.step(meter_state, share), otherwise=meter_state)


def _call(report: Callable[[Any], None], total: int, per_chunk: float, number: Any) -> None:
    report({"done": min(math.ceil(int(number) * per_chunk), total), "total": total})


def _on_first_device(run: _Run, fn: Callable[[], Any], otherwise: Any = None) -> Any:
    """The value of fn() on the first device of the mesh: one bar for all devices."""
    if run.mesh is None:
        return fn()
    if otherwise is None:
        otherwise = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn))
    is_first = jax.lax.axis_index(run.mesh.axis_names[0]) == 0
    return jax.lax.cond(is_first, fn, lambda: otherwise)


def _split_result(result: PyTree[Any]) -> tuple[PyTree[Array], PyTree[Any]]:
    is_number = lambda leaf: isinstance(leaf, bool | int | float | np.ndarray | np.generic)
    result = jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_number(leaf) else leaf, result)
    arrays, rest = eqx.partition(result, eqx.is_array)
    if not jax.tree.leaves(arrays):
        raise ValueError(
            "fn must return a PyTree with at least one array, to be stacked over the members; "
            f"got {shapes_of(result)}."
        )
    return arrays, rest


def _padded(data: Array, length: int) -> Array:
    """The last key again and again: a member that is known to be fine, and cut off later."""
    if length == len(data):
        return data
    return jnp.concatenate([data, jnp.repeat(data[-1:], length - len(data), axis=0)])


def _num_members(keys: Any) -> int:
    """The number of keys, if keys they are."""
    is_array = isinstance(keys, jax.Array | np.ndarray)
    is_typed = is_array and _is_typed(keys)
    num_axes = 1 if is_typed else 2
    if not is_array or not (is_typed or keys.dtype == np.uint32) or keys.ndim != num_axes:
        got = shapes_of(keys) if is_array else repr(keys)
        raise ValueError(
            f"keys must be an array of PRNG keys with one leading axis of members; got {got}. "
            "Make them with mf.member_keys(key, num_members) or jax.random.split."
        )
    return checked_count("the number of keys", len(keys))


def _check_implementation(keys: Array, chunk_size: int | None) -> None:
    impl = str(jr.key_impl(keys))
    if "rbg" in impl and chunk_size != 1:
        raise ValueError(
            f"Keys of the implementation {impl!r} draw other numbers under vmap, so that members "
            "would depend on their chunk. Make the keys with jax.random.key(seed, "
            'impl="threefry2x32"), or take chunk_size=1.'
        )


def _is_typed(keys: Any) -> bool:
    return jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)


def _is_data(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def _function_of(progress: Any) -> Any:
    is_meter = isinstance(progress, dfx.AbstractProgressMeter)
    return progress if callable(progress) and not is_meter else None
