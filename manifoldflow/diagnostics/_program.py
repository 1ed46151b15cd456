"""The operations of a compiled program and the messages that its devices send, from its text.

XLA's own count takes the body of a loop once. Here it counts as often as the loop says that it
runs; one that does not say, since it ends when something has converged, counts once.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_CALL = re.compile(r"\s([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}


_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id opt-barrier".split()
)


class Message(NamedTuple):
    """The messages of one kind that a device receives in one run of a program.

    Attributes:
        kind: the collective, such as "all-gather".
        count: how many of them.
        bytes: of their results on one device, all together.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> print(diagnostics.Message("all-gather", count=3, bytes=1536).bytes)
        1536
    """

    kind: str
    count: int
    bytes: int


class Totals(NamedTuple):
    """Operations of one device, the bytes that it reads and writes, and what it receives."""

    operations: float
    traffic: float
    messages: tuple[Message, ...]


class _Instruction(NamedTuple):
    opcode: str
    shape: str  # its type, as text
    rest: str  # operands and attributes


def totals(text: str) -> Totals:
    """Of the optimised HLO of a program, `compiled.as_text()`."""
    entry, computations = _parsed(text)

    @functools.cache
    def count(name: str) -> dict[tuple[str, str], float]:
        found = collections.defaultdict[tuple[str, str], float](float)
        body = computations.get(name, {})
        for instruction in body.values():
            found["", "operations"] += _operations(instruction, body)
            found["", "traffic"] += _traffic(instruction, body, computations)
            kind = instruction.opcode.removesuffix("-done")
            if re.fullmatch(KINDS, kind):
                found[kind, "count"] += 1
                found[kind, "bytes"] += _num_bytes(instruction.shape)
            trips = _TRIPS.search(instruction.rest)
            for called in _called(instruction):
                for key, number in count(called).items():
                    # What is fused into one kernel does not go through memory in between.
                    is_inside = instruction.opcode == "fusion" and key[1] == "traffic"
                    found[key] += 0 if is_inside else number * (int(trips[1]) if trips else 1)
        return found

    found = count(entry)
    kinds = sorted({kind for kind, _ in found if kind})
    messages = tuple(Message(k, int(found[k, "count"]), int(found[k, "bytes"])) for k in kinds)
    return Totals(found["", "operations"], found["", "traffic"], messages)


def _parsed(text: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
    entry, computations = "", collections.defaultdict[str, dict[str, _Instruction]](dict)
    name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
        found = None if head else _LINE.match(line)
        call = found and _CALL.search(" " + found[2])
        if found and call:
            # The type may be a tuple in parentheses: the first word before "(" is the operation.
            shape, rest = found[2][: call.start()], found[2][call.end() - 1 :]
            computations[name][found[1]] = _Instruction(call[1], shape, rest)
    return entry, dict(computations)


def _called(instruction: _Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    names = [name.strip(" %") for name in branches[1].split(",")] if branches else []
    # Of a reduction, what it applies is a sum of two numbers.
    is_small = instruction.opcode in ("reduce", "reduce-window", "all-reduce", "scatter", "sort")
    return names + ([] if is_small else _CALLED.findall(instruction.rest))


def _arrays(shape: str) -> list[tuple[str, list[int]]]:
    return [
        (kind, [int(n) for n in sizes.split(",") if n]) for kind, sizes in _ARRAY.findall(shape)
    ]


def _num_bytes(shape: str) -> int:
    def bits(kind: str) -> int:
        digits = re.search(r"\d+", kind)
        return _BITS.get(kind, int(digits[0]) if digits else 0)

    return sum(math.prod(sizes) * bits(kind) // 8 for kind, sizes in _arrays(shape))


def _operations(instruction: _Instruction, body: dict[str, _Instruction]) -> float:
    """2 for each product of a matrix product or convolution; factorisations by their orders."""
    opcode, shape, rest = instruction
    if opcode == "dot":
        left = _operand(rest, 0, body)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * _size(shape) * math.prod(left[axis] for axis in axes)
    if opcode == "convolution":
        kernel, labels = _operand(rest, 1, body), re.search(r"dim_labels=\w+_(\w+)->", rest)
        outputs = kernel[labels[1].index("o")] if labels and kernel else 1
        return 2.0 * _size(shape) * math.prod(kernel) / max(1, outputs)
    target = re.search(r'custom_call_target="(\w+)"', rest)
    if opcode == "custom-call" and target:
        sizes = max((s for _, s in _arrays(shape)), key=math.prod, default=[])
        if "potrf" in target[1]:
            return math.prod(sizes) * sizes[-1] / 3
        if "trsm" in target[1]:
            return float(math.prod(sizes)) * max(_operand(rest, 0, body)[-1:], default=1)
    return 0.0


def _traffic(
    instruction: _Instruction,
    body: dict[str, _Instruction],
    computations: dict[str, dict[str, _Instruction]],
) -> float:
    """Bytes of operands and result; of what is only cut out of or put into an array, the part."""
    opcode, shape, rest = instruction
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    names = re.findall(r"%([\w.-]+)", _operands(rest))
    sizes = [_num_bytes(body[name].shape) if name in body else 0 for name in names]
    result = _num_bytes(shape)
    inside = [opcode]
    if opcode == "fusion":
        inside = [i.opcode for name in _called(instruction) for i in computations[name].values()]
    if "dynamic-update-slice" in inside:  # in place
        small = [size for size in sizes if size < result]
        return 2.0 * sum(small)
    if "dynamic-slice" in inside or "gather" in inside:
        return result + float(sum(min(size, result) for size in sizes))
    return float(result + sum(sizes))


def _operands(rest: str) -> str:
    return rest.split("),")[0]


def _operand(rest: str, index: int, body: dict[str, _Instruction]) -> list[int]:
    """The sizes of an operand, whose type may stand before its name."""
    name = re.findall(r"%([\w.-]+)", _operands(rest))[index]
    arrays = _arrays(body[name].shape) if name in body else []
    return arrays[0][1] if arrays else []


def _size(shape: str) -> int:
    arrays = _arrays(shape)
    return math.prod(arrays[0][1]) if arrays else 0
