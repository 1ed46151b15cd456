"""The cost of a drift on one device or on each of many, before it is spent."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from manifoldflow import _mesh, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count
from manifoldflow._types import Point
from manifoldflow.diagnostics._program import Message, totals
from manifoldflow.flows import AbstractFlow
from manifoldflow.losses import AbstractResidualLoss

_MB = 2**20
# How much less memory each attempt may take that looks for chunks which fit.
_LESS = 8
_ATTEMPTS = 3


class Plan(NamedTuple):
    """The cost of one drift of a flow on each device; prints as plain lines.

    Attributes:
        arguments: bytes of the point and the data that lie on each device.
        drift: bytes of temporary memory, at the peak.
        result: bytes of the drift itself.
        dense_jacobian: bytes that the n×D Jacobian alone would take, for comparison.
        num_devices: the devices of the mesh that is in force; 1 without one.
        replicated: bytes of the arguments that every device holds alike.
        cut: bytes of the arguments of which every device holds another part: its own part.
        messages: what a device receives from the others, by kind; empty for one device.
        operations: floating-point operations of each device, in matrix products and
            factorisations. A loop that runs until it has converged counts once.
        traffic: bytes that a device reads from its memory and writes to it, counted likewise.
        chunk_size: the examples whose rows are formed at a time; None where all are at once.
        num_examples: the examples of the loss; 0 where it has none.
        program: bytes of machine code, which accelerators hold as well; 0 on CPUs.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> needed = diagnostics.Plan(arguments=800, drift=4000, result=400, dense_jacobian=1600)
        >>> print(needed.total)
        5200
    """

    arguments: int
    drift: int
    result: int
    dense_jacobian: int
    num_devices: int = 1
    replicated: int = 0
    cut: int = 0
    messages: tuple[Message, ...] = ()
    operations: float = 0.0
    traffic: float = 0.0
    chunk_size: int | None = None
    num_examples: int = 0
    program: int = 0

    @property
    def total(self) -> int:
        """Bytes on each device: arguments, temporary memory, result and program."""
        return self.arguments + self.drift + self.result + self.program

    def __str__(self) -> str:
        share = (
            f"{_mb(self.replicated).strip()} alike on every device, {_mb(self.cut).strip()} its own"
        )
        is_spread = self.num_devices > 1
        lines = [
            f"on each of {self.num_devices} devices" if is_spread else "on one device",
            f"{'arguments':<16}{_mb(self.arguments)}" + (f"   {share}" if is_spread else ""),
            f"{'drift':<16}{_mb(self.drift)}   temporary, at the peak",
            f"{'result':<16}{_mb(self.result)}",
            *([f"{'program':<16}{_mb(self.program)}"] if self.program else []),
            f"{'total':<16}{_mb(self.total)}",
        ]
        for kind, count, size in self.messages:
            lines.append(f"{'messages':<16}{_mb(size)}   in {count} {kind}")
        lines.append(f"{'operations':<16}{self.operations / 1e9:>12.4g} · 10⁹")
        lines.append(f"{'traffic':<16}{_mb(int(self.traffic))}   to and from memory")
        if self.chunk_size is not None:
            lines.append(f"{'chunks':<16}{self.chunk_size:>12} of {self.num_examples} examples")
        lines.append(f"{'dense_jacobian':<16}{_mb(self.dense_jacobian)}   not built")
        return "\n".join(lines)


@checked_but("point")
def plan(flow: AbstractFlow, point: Point, *, limit: int | None = None) -> Plan:
    """The memory, operations and messages of one evaluation of a flow's drift, in advance.

    The drift is compiled for these shapes and the compiler is asked; nothing is evaluated. Arrays
    of the flow and of the point may be shapes only, `equinox.filter_eval_shape` of the function
    that makes them, so that nothing is allocated either. Within `manifoldflow.mesh` all numbers
    are those of each device. Arrays count as they lie, and shapes as their sharding says; without
    one, examples are cut as by `shard_examples`, and all else is whole on every device. The
    devices of the mesh need not be there: those of `jax.experimental.topologies` will do.

    Args:
        flow: any flow; one on the zero-loss manifold of a residual loss has chunks.
        point: the model.
        limit: bytes that one device may use in all.

    Returns:
        A `Plan`.

    Raises:
        MemoryError: the drift needs more than `limit`; says how much, and what to use.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> predict = lambda w, x: jnp.sum(jnp.sinh(w @ x))
        >>> loss = mf.LeastSquares(jnp.eye(3), jnp.ones(3), predict=predict)
        >>> flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0))
        >>> needed = mf.plan(flow, jnp.ones((2, 3)))
        >>> print(needed.num_devices, needed.messages, needed.total < 10**6)
        1 () True
    """
    needed = _plan(flow, point)
    if limit is None or needed.total <= checked_count("plan: limit", limit):
        return needed
    advice = _advice(flow, point, limit, needed.num_examples)
    raise MemoryError(
        f"One drift takes {needed.total / _MB:.4g} MB ({needed.drift / _MB:.4g} MB of them "
        f"temporary), more than the limit of {limit / _MB:.4g} MB. {advice}"
    )


def _plan(flow: AbstractFlow, point: Point) -> Plan:
    mesh = jax.sharding.get_mesh()
    arrays, static = eqx.partition((flow, point), _is_array)
    arrays = arrays if mesh.empty else _spread(mesh, *arrays)

    def drift(arrays: Any) -> Any:
        flow, point = eqx.combine(arrays, static)
        return eqx.filter(flow.drift(point), eqx.is_array)

    # What a drift does not use lies there all the same.
    compiled = jax.jit(drift, keep_unused=True).lower(arrays).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    found = totals(text)
    result = jax.eval_shape(drift, arrays)
    num_rows, num_examples, chunk_size = _rows(flow, point)
    own = [] if mesh.empty else [leaf for leaf in jax.tree.leaves(arrays) if not _is_whole(leaf)]
    cut = sum(_bytes_on_one(leaf) for leaf in own)
    return Plan(
        arguments=memory.argument_size_in_bytes,
        drift=memory.temp_size_in_bytes,
        result=memory.output_size_in_bytes,
        dense_jacobian=num_rows * sum(_bytes(leaf) for leaf in jax.tree.leaves(result)),
        num_devices=1 if mesh.empty else mesh.size,
        replicated=memory.argument_size_in_bytes - cut,
        cut=cut,
        messages=found.messages,
        operations=found.operations,
        traffic=found.traffic,
        chunk_size=chunk_size,
        num_examples=num_examples,
        program=memory.generated_code_size_in_bytes,
    )


def _rows(flow: AbstractFlow, point: Point) -> tuple[int, int, int | None]:
    """Rows of the Jacobian, examples, and how many of them are taken at a time."""
    loss = None if flow.manifold is None else flow.manifold.loss
    if not isinstance(loss, AbstractResidualLoss):
        return 0, 0, None
    rows = eqx.filter_eval_shape(lambda loss, point: loss.residual(point), loss, point)
    jacobian = eqx.filter_eval_shape(lambda loss, point: loss.jacobian(point), loss, point)
    chunk_size = jacobian.chunk_size if isinstance(jacobian, linalg.ChunkedJacobian) else None
    return rows.size, jax.tree.leaves(loss.data)[0].shape[0], chunk_size


def _advice(flow: AbstractFlow, point: Point, limit: int, num_examples: int) -> str:
    """The remedy that makes it fit: chunks of examples if the compiler says so, else another.

    The compiler is asked for smaller and smaller ones.
    """
    for power in range(_ATTEMPTS if num_examples else 0):
        memory = max(1, limit // _LESS**power)
        with linalg.device_memory(memory):
            other = _plan(flow, point)
        if other.total <= limit and other.chunk_size is None:
            # What fits is then a solver for less memory.
            return (
                "ZeroLossManifold(loss, gram=linalg.IterativeGram()) holds no n×n matrix and takes "
                f"{other.total / _MB:.4g} MB."
            )
        if other.total <= limit:
            return (
                f"`with linalg.device_memory({memory}):` takes {other.chunk_size} examples at a "
                f"time, and {other.total / _MB:.4g} MB."
            )
    return (
        "Chunks of examples do not help. Use fewer examples, more devices (`manifoldflow.mesh`), "
        "ZeroLossManifold(loss, gram=linalg.IterativeGram()) against the n×n matrix, or "
        "look at `explain(loss, point)` for leaves with dense rows."
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / _MB:>12.4g} MB"


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _spread(mesh: Mesh, flow: AbstractFlow, point: Point) -> tuple[AbstractFlow, Point]:
    """The shapes of all arrays, with where they lie.

    Arrays lie where they are, if that is on this mesh, or will be copied to every device, as jit
    does it. So do shapes that have a sharding. Other shapes of examples lie where
    `shard_examples` would put the arrays.
    """
    loss = None if flow.manifold is None else flow.manifold.loss
    data = jax.tree.leaves(getattr(loss, "data", None))
    cut = [_mesh.EXAMPLES] if data and _mesh.num_shares(data[0].shape[0]) > 1 else []
    axes = {id(leaf): cut for leaf in data}

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        lies = getattr(leaf, "sharding", None)
        is_there = isinstance(lies, NamedSharding) and lies.device_set == set(mesh.devices.flat)
        spec = PartitionSpec(*(axes.get(id(leaf), ()) if lies is None else ()))
        where = lies if is_there else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, flow), jax.tree.map(place, point)


def _is_whole(leaf: Any) -> bool:
    return leaf.sharding.is_fully_replicated


def _bytes_on_one(leaf: Any) -> int:
    part = leaf.sharding.shard_shape(leaf.shape)
    return _bytes(jax.ShapeDtypeStruct(part, leaf.dtype))


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
