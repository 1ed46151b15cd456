"""Leaves that a loss depends on though it has no derivative in them, found in its program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point

# What has no derivative, beside all that is no floating-point number.
_FLAT = {"stop_gradient", "floor", "ceil", "round", "sign"}
# Programs within programs, with the same inputs and outputs.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
# These have derivatives of their own, whatever is within.
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class _Traced:
    """A function of a point and an example, with the shapes of a point and of all examples.

    It has a hash if the function has one.
    """

    def __init__(self, fn: Callable[..., Any], coordinates: Any, rest: PyTree[Any]):
        self.num_coordinates = len(jax.tree.leaves(coordinates))
        leaves, self.treedef = jax.tree.flatten((coordinates, fn, rest))
        self.leaves = tuple(_shape_of(leaf) for leaf in leaves)

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves, self.num_coordinates))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Traced)
            and self.treedef == other.treedef
            and self.leaves == other.leaves
        )

    def unseen(self) -> tuple[str, ...]:
        """The names of the coordinates that are used and have no derivative."""
        is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self.leaves]

        def run(arrays: list[Any]) -> Any:
            given = iter(arrays)
            leaves = [next(given) if a else x for a, x in zip(is_array, self.leaves, strict=True)]
            coordinates, fn, (remainder, data) = jax.tree.unflatten(self.treedef, leaves)
            example = jax.tree.map(lambda leaf: leaf[0], data)
            return fn(_tree.join(coordinates, remainder), example)

        arrays = [leaf for leaf, a in zip(self.leaves, is_array, strict=True) if a]
        program = jax.make_jaxpr(run)(arrays)
        outputs = [True] * len(program.jaxpr.outvars)
        # A leaf that is used, but not through anything with a derivative, would be moved unseen.
        used, seen = (_reaching(program, outputs, smooth) for smooth in (False, True))
        coordinates, _, _ = jax.tree.unflatten(self.treedef, self.leaves)
        paths = jax.tree_util.tree_leaves_with_path(coordinates)
        # Coordinates come first, and all of them are arrays.
        return tuple(
            jax.tree_util.keystr(path).removesuffix(".value") or "the point"
            for (path, _), is_used, is_seen in zip(paths, used, seen)
            if is_used and not is_seen
        )


def _shape_of(leaf: Any) -> Any:
    is_array = isinstance(leaf, jax.Array) or hasattr(leaf, "dtype")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf


def _is_smooth(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _reaching(program: Any, outputs: list[bool], smooth: bool) -> list[bool]:
    """Marks of the inputs that these outputs depend on; with `smooth`, through a derivative.

    Where a body is not looked into, all of its inputs count.
    """
    body = getattr(program, "jaxpr", program)
    is_live = lambda atom: not isinstance(atom, jex.Literal) and (_is_smooth(atom) or not smooth)
    live = {v for v, wanted in zip(body.outvars, outputs, strict=True) if wanted and is_live(v)}
    for eqn in reversed(body.eqns):
        wanted, name = [v in live for v in eqn.outvars], eqn.primitive.name
        if not any(wanted) or (smooth and name in _FLAT):
            continue
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        looked_into = name in _CALLS or (name in _CUSTOM and not smooth)
        inside = getattr(inner, "jaxpr", inner)
        if looked_into and inside is not None and len(inside.invars) == len(eqn.invars):
            needed = _reaching(inner, wanted, smooth)
        else:
            needed = [True] * len(eqn.invars)
        live |= {v for v, is_needed in zip(eqn.invars, needed) if is_needed and is_live(v)}
    return [v in live for v in body.invars]


@functools.lru_cache(maxsize=128)
def _unseen(traced: _Traced) -> tuple[str, ...]:
    return traced.unseen()


def check_reach(
    fn: Callable[..., Any], coordinates: Coordinates, remainder: Point, data: PyTree[Any]
) -> None:
    """Refuse coordinates on which fn(point, example) depends without a derivative.

    Its program is looked at once for every model; nothing is computed.

    Raises:
        ValueError: with the names of the leaves.
    """
    traced = _Traced(fn, coordinates, (remainder, data))
    try:
        hash(traced)
    except TypeError:  # something in the model has no hash
        names = traced.unseen()
    else:
        names = _unseen(traced)
    if names:
        raise ValueError(
            f"The loss depends on {', '.join(names)} but has no derivative there: stop_gradient, a "
            "rounding, a comparison or a use as whole numbers stands in between. Moving it would "
            "change outputs unseen. Freeze it by trainable=…, a PyTree like the point (or a prefix "
            "of it) that is False there and True elsewhere."
        )
