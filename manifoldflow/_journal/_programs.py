"""Digests of functions by what they do, the same in every process.

A function is its jaxpr: the operations in their order, with all that they are told and the
constants that were closed over. Names of variables and functions, addresses, source lines and rules
of differentiation (which nothing here takes) do not count.
"""

import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np

# Names, and rules for derivatives and batches, none of which are taken of what is digested.
_NO_MATTER = {
    *("name", "debug_info", "rule", "in_tree", "out_tree"),
    *("jvp_jaxpr_fun", "jvp", "fwd_jaxpr_thunk", "fwd", "bwd"),
}
_MAX_DEPTH = 12


def program(fn: Callable[..., Any], *args: Any) -> str:
    """The digest of `fn` at arguments of these shapes: its jaxpr, and its arrays bit by bit."""
    jaxpr, out, _ = eqx.filter_make_jaxpr(_call)(fn, *args)
    arrays = [leaf for leaf in jax.tree.leaves(fn) if eqx.is_array(leaf)]
    return digest((jaxpr, arrays, str(jax.tree.structure(out))))


@eqx.filter_jit
def _call(fn: Callable[..., Any], *args: Any) -> Any:
    # Compiled functions are traced once: another run of the same program finds its jaxpr here.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if _is_number(leaf) else leaf, fn(*args))


def digest(value: Any) -> str:
    """The digest of a value, by its parts."""
    return "sha256:" + _Digester().of(value, 0).hex()


def array_text(array: Any) -> str:
    """An array bit by bit, with its type and shape; random keys by their words."""
    name = str(array.dtype)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jr.key_data(array)
    if getattr(array, "is_fully_addressable", True):
        pieces = [np.asarray(array)]
    else:
        pieces = [np.asarray(shard.data) for shard in array.addressable_shards]
    if array.size == 1 and np.issubdtype(array.dtype, np.number):
        return f"{name}{list(array.shape)} {pieces[0].reshape(()).item()!r}"
    sums = [hashlib.sha256(np.ascontiguousarray(piece).tobytes()).hexdigest() for piece in pieces]
    return f"{name}{list(array.shape)} sha256:{' '.join(sums)}"


class _Digester:
    """Walks through a value; jaxprs that occur many times are read once."""

    def __init__(self):
        self._programs: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any, depth: int) -> bytes:
        text = _plain_text(value)
        if text is not None:
            return _sum([text.encode()])
        if depth > _MAX_DEPTH:
            return _sum([_name(type(value)).encode()])
        down = lambda part: self.of(part, depth + 1)
        if _is_jaxpr(value):
            return self._of_jaxpr(value)
        if isinstance(value, tuple | list):
            return _sum([_name(type(value)).encode(), *map(down, value)])
        if isinstance(value, dict):
            pairs = sorted((str(key), down(key), down(part)) for key, part in value.items())
            return _sum([b"dict", *(piece for _, key, part in pairs for piece in (key, part))])
        if isinstance(value, set | frozenset):
            return _sum([b"set", *sorted(map(down, value))])
        if isinstance(value, functools.partial):
            return _sum([b"partial", *map(down, (value.func, value.args, value.keywords))])
        if isinstance(value, types.CodeType):
            return _sum([value.co_code, down(value.co_names), *map(down, value.co_consts)])
        if isinstance(value, types.FunctionType):
            return _sum([down(value.__code__), down(value.__defaults__), *map(down, _cells(value))])
        if isinstance(value, types.MethodType):
            return _sum([down(value.__func__), down(value.__self__)])
        if callable(getattr(value, "__wrapped__", None)):
            return down(value.__wrapped__)
        if dataclasses.is_dataclass(value):
            fields = [
                (field.name, _field(value, field.name)) for field in dataclasses.fields(value)
            ]
            return _sum([_name(type(value)).encode(), down(fields)])
        # Whatever else there is, by what it says of itself, without addresses.
        said = re.sub(r"\b(at |id=)?0x[0-9a-f]+", "", repr(value))
        return _sum([_name(type(value)).encode(), said.encode()])

    def _of_jaxpr(self, value: Any) -> bytes:
        known = self._programs.get(id(value))
        if known is None:
            # With the value itself: its address must not be given to another.
            known = self._programs[id(value)] = value, self._read_jaxpr(value)
        return known[1]

    def _read_jaxpr(self, value: Any) -> bytes:
        jaxpr = getattr(value, "jaxpr", value)
        numbers: dict[Any, int] = {}

        def new(variable: Any) -> bytes:
            numbers[variable] = len(numbers)
            return str(variable.aval).encode()

        def used(atom: Any) -> bytes:
            if hasattr(atom, "val"):
                return b"literal " + str(atom.aval).encode() + self.of(atom.val, 1)
            return str(numbers[atom]).encode()

        pieces = [new(variable) for variable in (*jaxpr.constvars, *jaxpr.invars)]
        pieces += [self.of(constant, 1) for constant in getattr(value, "consts", ())]
        for equation in jaxpr.eqns:
            pieces += [equation.primitive.name.encode(), *map(used, equation.invars)]
            for name in sorted(equation.params.keys() - _NO_MATTER):
                pieces += [name.encode(), self.of(equation.params[name], 1)]
            pieces += map(new, equation.outvars)
        return _sum([*pieces, b"out", *map(used, jaxpr.outvars)])


def _plain_text(value: Any) -> str | None:
    """The text of values that have no parts."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, jax.core.Tracer):
        return f"traced {value.aval}"
    if eqx.is_array(value) or isinstance(value, np.ndarray | np.generic):
        return array_text(value)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{type(value).__name__} {value!r}"
    return _name(value) if isinstance(value, type) else None


def _sum(pieces: list[bytes]) -> bytes:
    # With the length before each piece, so that no two lists read alike.
    total = hashlib.sha256()
    for piece in pieces:
        total.update(len(piece).to_bytes(8, "little") + piece)
    return total.digest()


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") and hasattr(getattr(value, "jaxpr", value), "outvars")


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _cells(function: types.FunctionType) -> list[Any]:
    """The values that a function closes over, as far as they can be told apart."""
    found = []
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # not yet filled
        known = _plain_text(value) is not None or isinstance(value, types.FunctionType)
        found.append(value if known else type(value))
    return found


def _field(value: Any, name: str) -> Any:
    return getattr(value, name, None)
