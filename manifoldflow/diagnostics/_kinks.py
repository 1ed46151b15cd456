"""The kinks of a model's outputs among its examples, read off its program and its values."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._types import Point
from manifoldflow.losses import AbstractExampleLoss

# So many examples are looked at.
_EXAMPLES = 32
# What has no derivative: what comes after it only is no matter.
_FLAT = {"stop_gradient", "floor", "ceil", "round", "sign", "argmax", "argmin"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
_LOOPS = {"scan", "while", "cond"}
# Elementwise choices: they matter where both ways are taken. Others choose among many numbers.
_CHOICES = {"max", "min", "abs", "clamp", "select_n"}
_AMONG_MANY = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "sort",
               "cummax", "cummin", "top_k"}  # fmt: skip


def kinks_of(loss: AbstractExampleLoss, point: Point) -> tuple[str, ...]:
    """The choices by which the outputs have kinks near these examples; () for a smooth model.

    A choice that falls out the same for every one of some examples, as max(variance, 0) does,
    is none. Functions with a derivative of their own, as softmax, count as smooth, but for a
    plain maximum (ReLU). In loops and branches every choice counts.
    """
    few = loss.select(slice(_EXAMPLES))
    names, is_there = _choices(few, point)
    return tuple(sorted({name for name, both in zip(names, is_there) if bool(both)}))


@eqx.filter_jit
def _choices(loss: AbstractExampleLoss, point: Point) -> tuple[tuple[str, ...], list[Array]]:
    coordinates, remainder = loss.split(point)
    inputs = _tree.cast_floats(loss.inputs, _tree.dtype_of(coordinates))
    leaves = jax.tree.leaves(coordinates)
    treedef = jax.tree.structure(coordinates)
    names: list[str] = []

    def of_example(x: Any) -> list[tuple[Array, Array]]:
        def run(leaves: list[Array], x: Any) -> Array:
            return loss.example_output(
                _tree.join(jax.tree.unflatten(treedef, leaves), remainder), x
            )

        program = jax.make_jaxpr(run)(leaves, x)
        given = [*leaves, *jax.tree.leaves(x)]
        moves = [True] * len(leaves) + [False] * (len(given) - len(leaves))
        look = _Look()
        look.at(program, given, moves)
        names[:] = look.names
        return look.sides

    sides = jax.vmap(of_example)(inputs)
    return tuple(names), [jnp.any(one) & jnp.any(other) for one, other in sides]


class _Look:
    """Runs a program and writes down which ways its choices go."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sides: list[tuple[Array, Array]] = []

    def at(self, program: Any, arguments: list[Any], moves: list[bool]) -> tuple[list, list]:
        """The outputs, and which of them the coordinates move."""
        body, constants = program.jaxpr, program.consts
        # A choice that no output depends on with a derivative, as of an argmax, is no kink.
        smooth = _with_derivative(body)
        env: dict[Any, tuple[Any, bool]] = {}
        env.update(zip(body.constvars, ((c, False) for c in constants), strict=True))
        env.update(zip(body.invars, zip(arguments, moves, strict=True), strict=True))
        read = lambda v: (v.val, False) if isinstance(v, jex.Literal) else env[v]
        for index, eqn in enumerate(body.eqns):
            values, moved = zip(*map(read, eqn.invars)) if eqn.invars else ((), ())
            name, inner = eqn.primitive.name, _inside(eqn)
            outputs, out_moves = None, [any(moved) and name not in _FLAT] * len(eqn.outvars)
            if index in smooth and any(moved):
                if inner is not None and (name in _CALLS or _is_plain_maximum(eqn)):
                    outputs, out_moves = self.at(inner, list(values), list(moved))
                else:
                    self._note(eqn, values, moved)
            if outputs is None:
                pairs = zip(eqn.invars, values, strict=True)
                given = {v: x for v, x in pairs if not isinstance(v, jex.Literal)}
                one = body.replace(
                    eqns=[eqn], invars=list(given), outvars=eqn.outvars, constvars=[]
                )
                outputs = jex.jaxpr_as_fun(jex.ClosedJaxpr(one, ()))(*given.values())
            env.update(zip(eqn.outvars, zip(outputs, out_moves), strict=True))
        found = [read(v) for v in body.outvars]
        return [value for value, _ in found], [moved for _, moved in found]

    def _note(self, eqn: Any, values: tuple, moved: tuple) -> None:
        name = eqn.primitive.name
        if name in _LOOPS:
            for within in sorted(_within(eqn) & (_CHOICES | _AMONG_MANY)):
                self._add(within, True, True)
        elif name in _AMONG_MANY:
            self._add(name, True, True)
        elif name == "select_n" and moved[0] and values[0].dtype == bool:
            self._add(name, jnp.any(values[0]), jnp.any(~values[0]))
        elif name in ("max", "min"):
            self._add(name, jnp.any(values[0] > values[1]), jnp.any(values[0] < values[1]))
        elif name == "abs":
            self._add(name, jnp.any(values[0] > 0), jnp.any(values[0] < 0))
        elif name == "clamp":
            low, x, high = values
            self._add(name, jnp.any((x > low) & (x < high)), jnp.any((x < low) | (x > high)))

    def _add(self, name: str, one: Any, other: Any) -> None:
        self.names.append(name)
        self.sides.append((jnp.asarray(one), jnp.asarray(other)))


def _inside(eqn: Any) -> Any:
    """The program within an equation that does nothing but run it."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if inner is None or not hasattr(getattr(inner, "jaxpr", inner), "eqns"):
        return None
    inner = inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ())
    return inner if len(inner.jaxpr.invars) == len(eqn.invars) else None


def _is_plain_maximum(eqn: Any) -> bool:
    """ReLU has a derivative of its own, and is a maximum within."""
    return eqn.primitive.name == "custom_jvp_call" and _names(_inside(eqn)) - _CALLS == {"max"}


def _names(program: Any) -> set[str]:
    """The names of all operations in a program, and in the programs that it runs."""
    if program is None:
        return set()
    eqns = getattr(program, "jaxpr", program).eqns
    return {eqn.primitive.name for eqn in eqns}.union(*(_names(_inside(eqn)) for eqn in eqns))


def _within(eqn: Any) -> set[str]:
    """The names in the bodies of a loop or a branch, functions with their own derivatives aside."""
    names: set[str] = set()
    parts = itertools.chain.from_iterable(
        value if isinstance(value, tuple | list) else [value] for value in eqn.params.values()
    )
    for part in parts:
        for inner in getattr(getattr(part, "jaxpr", part), "eqns", ()):
            is_own = inner.primitive.name.startswith("custom_")
            if not is_own or _is_plain_maximum(inner):
                names |= {inner.primitive.name} | _within(inner)
    return names


def _with_derivative(body: Any) -> set[int]:
    """The equations that outputs depend on with a derivative."""
    is_live = lambda v: not isinstance(v, jex.Literal) and jnp.issubdtype(v.aval.dtype, jnp.inexact)
    live, found = {v for v in body.outvars if is_live(v)}, set()
    for index, eqn in reversed(list(enumerate(body.eqns))):
        if eqn.primitive.name not in _FLAT and any(v in live for v in eqn.outvars):
            found.add(index)
            live |= {v for v in eqn.invars if is_live(v)}
    return found
