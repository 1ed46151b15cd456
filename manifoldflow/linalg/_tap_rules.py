"""How each primitive uses a parameter: keep the alias, end it with a tap, or look inside."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from manifoldflow.linalg._kernels import Kernel, slabs
from manifoldflow.linalg._views import ints, is_selection, View
from manifoldflow.linalg._walk import (
    body_of,
    closed,
    is_differentiable,
    Rule,
    Site,
    times,
    Value,
    Walk,
)

# Rules that keep an alias: the output is still the leaf, rearranged or scaled.


def _rearranged(step: Callable[[Any, Any], tuple[Any, ...]]) -> Callable[..., Any]:
    def rule(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
        if len(inputs) != 1:  # dynamic shapes
            return None
        (value,) = inputs
        (output,) = walk.plain(eqn, inputs)
        if not jnp.issubdtype(jnp.result_type(output.array), jnp.floating):
            # Taps are real; a leaf that becomes complex has its rows from JAX itself.
            return None if is_differentiable(output.array) else [output]
        new = step(eqn.params, output.array.shape)
        alias = value.alias._replace(view=value.alias.view + new)
        return [Value(output.array, alias)]

    return rule


def _broadcast_step(params: Any, shape: tuple[int, ...]) -> View:
    return (("broadcast", ints(shape), ints(params["broadcast_dimensions"])),)


def _reshape_steps(params: Any, shape: tuple[int, ...]) -> View:
    unknown = set(params) - {"new_sizes", "dimensions", "sharding"}
    if unknown:
        raise ValueError(f"reshape has parameters that no rule knows: {unknown}")
    order = params.get("dimensions")  # in which `lax.reshape` reads the axes
    steps = () if order is None else (("transpose", ints(order)),)
    return (*steps, ("reshape", ints(shape)))


def _slice_step(params: Any, shape: tuple[int, ...]) -> View:
    starts, limits = ints(params["start_indices"]), ints(params["limit_indices"])
    strides = params["strides"]
    return (("slice", starts, limits, None if strides is None else ints(strides)),)


def _split(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value]:
    (value,), axis = inputs, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    outputs = []
    for output, end in zip(walk.plain(eqn, inputs), ends, strict=True):
        low, high = [0] * value.array.ndim, list(value.array.shape)
        low[axis], high[axis] = end - output.array.shape[axis], end
        view = value.alias.view + (("slice", ints(low), ints(high), None),)
        outputs.append(Value(output.array, value.alias._replace(view=view)))
    return outputs


def _broadcast(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    # Adding axes of size one is a reshape, which the matrix rules can look through.
    shape = eqn.outvars[0].aval.shape
    grows = inputs[0].array.size != np.prod(shape)
    step = _broadcast_step if grows else lambda _, new: (("reshape", ints(new)),)
    return _rearranged(step)(walk, eqn, inputs)


def _negative(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value]:
    (output,), alias = walk.plain(eqn, inputs), inputs[0].alias
    return [Value(output.array, alias._replace(scale=times(alias.scale, -1)))]


def _constant(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value]:
    return walk.plain(eqn, inputs)  # no derivative passes


# Rules that end an alias: a tap on the output.


def _sum(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value]:
    (output,) = walk.plain(eqn, inputs)
    z = output.array
    signs = (None, -1 if eqn.primitive.name == "sub" else None)
    for value, sign in zip(inputs, signs, strict=True):
        if value.alias is not None:
            alias = value.alias._replace(scale=times(value.alias.scale, sign))
            z = walk.tap(z, alias, "sum", None, (), alias.view)
    return [Value(z)]


def _product(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """z = x ⊙ g. A number times a leaf is still that leaf, scaled."""
    (output,), z = walk.plain(eqn, inputs), None
    divides = eqn.primitive.name == "div"
    if divides and inputs[1].alias is not None:
        return None
    for value, other in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
        if value.alias is None:
            continue
        factor = 1 / other.array if divides else other.array
        if jnp.ndim(factor) == 0 and jnp.ndim(value.array) > 0:
            walk.give_up([other])
            alias = value.alias._replace(scale=times(value.alias.scale, factor))
            return [Value(output.array, alias)]
        z = output.array if z is None else z
        z = walk.tap(z, value.alias, "product", factor, (), value.alias.view)
    return [Value(z)]


def _selections(inputs: Sequence[Value]) -> bool:
    return all(value.alias is None or is_selection(value.alias.view) for value in inputs)


def _dot_general(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    if not _selections(inputs):
        return None
    (output,) = walk.plain(eqn, inputs)
    z = output.array
    if all(value.alias is not None for value in inputs):
        # A product of two weights: its taps are as large as itself, rows may be smaller.
        walk.give_up([value for value in inputs if value.array.size <= z.size])
    for side in (0, 1):
        value, other = inputs[side], inputs[1 - side]
        if value.alias is not None:
            dims = _dot_dims(eqn.params["dimension_numbers"], side, value.array, other.array)
            view = value.alias.view + dims[0]
            z = walk.tap(z, value.alias, "dot", other.array, dims[1:], view)
    return [Value(z)]


def _dot_dims(numbers: Any, side: int, weight: Array, other: Array) -> tuple[Any, ...]:
    """How to bring weight, factor and output to (B, F, C), (T, B, C) and (T, B, F).

    B are batch axes, C is contracted, F is free in the weight, T are the positions at which
    the weight is applied.
    """
    contracting, batch = numbers
    w_contract, x_contract = ints(contracting[side]), ints(contracting[1 - side])
    w_batch, x_batch = ints(batch[side]), ints(batch[1 - side])
    w_free = _others(weight.ndim, w_contract + w_batch)
    x_free = _others(other.ndim, x_contract + x_batch)
    num_batch, num_w, num_x = len(w_batch), len(w_free), len(x_free)
    free = ints(np.arange(num_batch, num_batch + num_w + num_x))
    z_free, z_positions = (
        (free[:num_w], free[num_w:]) if side == 0 else (free[num_x:], free[:num_x])
    )
    sizes = {
        "B": int(np.prod([weight.shape[axis] for axis in w_batch], dtype=int)),
        "F": int(np.prod([weight.shape[axis] for axis in w_free], dtype=int)),
        "C": int(np.prod([weight.shape[axis] for axis in w_contract], dtype=int)),
        "T": int(np.prod([other.shape[axis] for axis in x_free], dtype=int)),
    }
    shapes = [tuple(sizes[name] for name in names) for names in ("BFC", "TBC", "TBF")]
    perms = [
        w_batch + w_free + w_contract,
        x_free + x_batch + x_contract,
        z_positions + tuple(range(num_batch)) + z_free,
    ]
    return tuple(
        (("transpose", perm), ("reshape", shape)) for perm, shape in zip(perms, shapes, strict=True)
    )


def _others(ndim: int, used: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in used)


def _convolution(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """A convolution is a matrix product at every output place, with patches as factors."""
    params, (image, kernel) = eqn.params, inputs
    groups, (o, i, *window) = params["feature_group_count"], params["dimension_numbers"].rhs_spec
    is_plain = params["batch_group_count"] == 1 and window
    if image.alias is not None or not is_plain or not _selections(inputs):
        return None
    (output,) = walk.plain(eqn, inputs)
    z, shape = output.array, kernel.array.shape
    batch, feature, *places = params["dimension_numbers"].out_spec
    last = (
        ("transpose", ints((batch, *places, feature))),
        ("reshape", (z.size // z.shape[feature], groups, shape[o] // groups)),
    )
    kernel_view = (
        ("transpose", ints((o, *window, i))),
        ("reshape", (groups, shape[o] // groups, int(np.prod(shape)) // shape[o])),
    )
    sizes = [shape[axis] for axis in window]
    first = (sizes[0], params["window_strides"][0], params["rhs_dilation"][0])
    dims = (Kernel(*first, groups, shape[i]), last)
    view = kernel.alias.view + kernel_view
    factor = slabs(image.array, sizes, params)
    return [Value(walk.tap(z, kernel.alias, "convolution", factor, dims, view))]


def _look_up(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Rows of a table by integer index (`gather`, or `dynamic_slice` for a single row)."""
    table, shape = inputs[0], inputs[0].array.shape
    sizes = ints(eqn.params["slice_sizes"])
    numbers = eqn.params["dimension_numbers"] if eqn.primitive.name == "gather" else None
    batched = numbers is not None and numbers.operand_batching_dims
    if not shape or sizes != (1, *shape[1:]) or batched or not _selections(inputs[:1]):
        return None
    (output,) = walk.plain(eqn, inputs)
    z = output.array
    offsets = tuple(range(len(shape))) if numbers is None else ints(numbers.offset_dims)
    # The same look-up in a table of row numbers says which rows were taken; where a shifted
    # table gives no other answer, the index was out of bounds and JAX filled in a constant.
    names = lax.broadcasted_iota(np.int32, shape, 0)
    taken, shifted = (walk.plain(eqn, [Value(x), *inputs[1:]])[0].array for x in (names, names + 1))
    index = jnp.where(shifted == taken, -1, taken)
    index = index[tuple(0 if axis in offsets else slice(None) for axis in range(z.ndim))]
    width = int(np.prod(shape[1:], dtype=int))
    dims = (
        ("transpose", _others(z.ndim, offsets) + offsets),
        ("reshape", (index.size, width)),
    )
    view = table.alias.view + (("reshape", (1, shape[0], width)),)
    return [Value(walk.tap(z, table.alias, "look-up", index.reshape(-1), (dims,), view))]


# Rules that look inside: only where an alias enters, and only bodies without own derivatives.


def _call(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return None if body is None else walk.run(closed(body), inputs)


def _scan(walk: Walk, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Leaves that every step of a scan uses: taps ride along as inputs, factors as outputs."""
    # All is read before the sites are listed: a name that is not there then costs no other leaf.
    body, length, reverse = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    unroll = eqn.params.get("unroll", 1)  # a matter of speed alone
    num_consts, num_carry = _scan_counts(eqn, body_of(body))
    walk.give_up(inputs[num_consts:])
    consts = inputs[:num_consts]
    plain = [value.array for value in inputs[num_consts:]]
    carry, xs = plain[:num_carry], plain[num_carry:]

    def step(inner: Walk, carry: Any, xs: Any) -> Any:
        values = inner.run(body, consts + [Value(x) for x in (*carry, *xs)])
        inner.give_up(values)
        arrays = [value.array for value in values]
        return arrays[:num_carry], (arrays[num_carry:], inner.records)

    listing = walk.within()
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    jax.eval_shape(lambda c, x: step(listing, c, x), carry, first)
    walk.opaque |= listing.opaque
    taps = walk.register([_stacked(site, length) for site in listing.sites])
    if walk.taps is None:
        walk.records += [None] * len(taps)
        return walk.plain(eqn, inputs)

    def tapped(carry: Any, xs_taps: Any) -> Any:
        return step(walk.within(xs_taps[1]), carry, xs_taps[0])

    carry, (ys, records) = lax.scan(tapped, carry, (xs, taps), length, reverse, unroll)
    walk.records += records
    return [Value(x) for x in (*carry, *ys)]


def _scan_counts(eqn: Any, body: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried.

    Read from the ranks, since the parameters that tell are others in other versions of JAX:
    what is scanned over, or stacked, has one axis more outside than inside.
    """

    def num_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        stacked = [out.aval.ndim > val.aval.ndim for out, val in pairs]
        if stacked != sorted(stacked):
            raise ValueError(f"a scan's stacked values must come last, got {stacked}")
        return sum(stacked)

    num_carry = len(eqn.outvars) - num_stacked(eqn.outvars, body.outvars)
    num_scanned = num_stacked(eqn.invars, body.invars)
    return len(eqn.invars) - num_scanned - num_carry, num_carry


def _stacked(site: Site, length: int) -> Site:
    tap = jax.ShapeDtypeStruct((length, *site.tap.shape), site.tap.dtype)
    return site._replace(tap=tap, steps=(length, *site.steps))


RULES: dict[str, Rule] = {
    "transpose": _rearranged(lambda p, _: (("transpose", ints(p["permutation"])),)),
    "reshape": _rearranged(_reshape_steps),
    "squeeze": _rearranged(lambda _, shape: (("reshape", ints(shape)),)),
    "convert_element_type": _rearranged(lambda *_: ()),
    "copy": _rearranged(lambda *_: ()),
    "copy_p": _rearranged(lambda *_: ()),
    "slice": _rearranged(_slice_step),
    "split": _split,
    "broadcast_in_dim": _broadcast,
    "neg": _negative,
    "stop_gradient": _constant,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _product,
    "div": _product,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _look_up,
    "dynamic_slice": _look_up,
    "scan": _scan,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "call": _call,
    "checkpoint": _call,
    "remat2": _call,
}
