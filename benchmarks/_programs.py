"""How large a compiled program is, and how long its making takes; not a benchmark itself."""

import re
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)[^=]*\{$")
_CALLED = re.compile(
    r"(?:to_apply|body|condition|true_computation|false_computation|calls)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def num_instructions(text: str) -> tuple[int, int]:
    """Instructions of an HLO program: in its text, and with those of each call at each call."""
    own: dict[str, int] = {}
    calls: dict[str, list[str]] = {}
    current = entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            own[current], calls[current] = 0, []
            entry = current if header[1] else entry
        elif " = " in line and current:
            own[current] += 1
            calls[current] += _CALLED.findall(line)
            for names in _BRANCHES.findall(line):
                calls[current] += [name.strip().lstrip("%") for name in names.split(",")]
    full: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in full:
            full[name] = own[name] + sum(map(of, calls[name]))
        return full[name]

    return sum(own.values()), of(entry)


def lowered(fn: Callable[[Any], Any], argument: Any) -> tuple[Any, float, float]:
    """A function of one PyTree made ready to be compiled, and the seconds it took."""
    arrays, rest = eqx.partition(argument, eqx.is_array)

    def of_arrays(arrays: Any) -> Any:
        return eqx.filter(fn(eqx.combine(arrays, rest)), eqx.is_array)

    began = time.perf_counter()
    traced = jax.jit(of_arrays).trace(arrays)
    then = time.perf_counter()
    program = traced.lower()
    return program, then - began, time.perf_counter() - then


def size(fn: Callable[[Any], Any], argument: Any) -> tuple[int, int]:
    """`num_instructions` of a function of one PyTree, before optimisation."""
    program, _, _ = lowered(fn, argument)
    return num_instructions(program.compiler_ir("hlo").as_hlo_text())


def measured(fn: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
    """One row: the program's size, and what its making and two calls of it take."""
    program, tracing, lowering = lowered(fn, argument)
    in_text, with_calls = num_instructions(program.compiler_ir("hlo").as_hlo_text())
    arrays = eqx.filter(argument, eqx.is_array)
    clock = time.perf_counter()
    compiled = program.compile()
    seconds = {"trace s": tracing, "lower s": lowering, "compile s": time.perf_counter() - clock}
    for name in ("first s", "second s"):
        clock = time.perf_counter()
        jax.block_until_ready(compiled(arrays))
        seconds[name] = time.perf_counter() - clock
    return {"instructions": in_text, "with calls": with_calls, **seconds}
