"""The operations that a leaf passes through unchanged: rearrangements, and programs inside."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from manifoldflow.linalg.jacobian._displacement import displaced
from manifoldflow.linalg.jacobian._interpreter import (
    closed,
    Interpreter,
    is_differentiable,
    times,
    Value,
)
from manifoldflow.linalg.jacobian._use import function_use, is_call_of, met, rule
from manifoldflow.linalg.jacobian._views import ints, View


def _rearranged(step: Callable[[Any, Any], tuple[Any, ...]]) -> Callable[..., Any]:
    def passed_on(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value] | None:
        if len(inputs) != 1:  # dynamic shapes
            return None
        (value,) = inputs
        (output,) = interpreter.plain(eqn, inputs)
        if not jnp.issubdtype(jnp.result_type(output.array), jnp.floating):
            # Taps are real; a leaf that becomes complex has its rows from JAX itself.
            return None if is_differentiable(output.array) else [output]
        new = step(eqn.params, output.array.shape)
        alias = value.alias._replace(view=value.alias.view + new)
        return [Value(output.array, alias)]

    return passed_on


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


@rule("split")
def _split(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value]:
    (value,), axis = inputs, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])
    outputs = []
    for output, end in zip(interpreter.plain(eqn, inputs), ends, strict=True):
        low, high = [0] * value.array.ndim, list(value.array.shape)
        low[axis], high[axis] = end - output.array.shape[axis], end
        view = value.alias.view + (("slice", ints(low), ints(high), None),)
        outputs.append(Value(output.array, value.alias._replace(view=view)))
    return outputs


@rule("broadcast_in_dim")
def _broadcast(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    # Adding axes of size one is a reshape, which the matrix rules can look through.
    shape = eqn.outvars[0].aval.shape
    grows = inputs[0].array.size != np.prod(shape)
    step = _broadcast_step if grows else lambda _, new: (("reshape", ints(new)),)
    return _rearranged(step)(interpreter, eqn, inputs)


@rule("neg")
def _negative(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value]:
    (output,), alias = interpreter.plain(eqn, inputs), inputs[0].alias
    return [Value(output.array, alias._replace(scale=times(alias.scale, -1)))]


@rule("stop_gradient")
def _constant(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value]:
    return interpreter.plain(eqn, inputs)  # no derivative passes


@rule("jit", "pjit", "closed_call", "core_call", "call", "checkpoint", "remat2")
def _call(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """Look inside, unless the function itself is a registered use."""
    # θ − θ₀ has the derivative of θ: no use of its own, else `linearized` would keep rows of size
    # D.
    if len(inputs) == 2 and inputs[1].alias is None and is_call_of(displaced, eqn):
        (output,), (leaf, _) = interpreter.plain(eqn, inputs), inputs
        if output.array.shape == leaf.array.shape:
            return [Value(output.array, leaf.alias)]
    kind = function_use(eqn)
    if kind is not None:
        return met(interpreter, eqn, inputs, kind, eqn.params["name"])
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return None if body is None else interpreter.run(closed(body), inputs)


rule("transpose")(_rearranged(lambda p, _: (("transpose", ints(p["permutation"])),)))
rule("reshape")(_rearranged(_reshape_steps))
rule("squeeze")(_rearranged(lambda _, shape: (("reshape", ints(shape)),)))
rule("convert_element_type", "copy", "copy_p")(_rearranged(lambda *_: ()))
rule("slice")(_rearranged(_slice_step))
