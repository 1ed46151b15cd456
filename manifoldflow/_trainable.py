"""The leaves of a point that are weights, where nobody says so.

All floating-point arrays are, but for what the model's own library knows to be something else: the
running averages of batch normalisation. Flax need not be there: its classes are known by the names
of their modules.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax
from jaxtyping import PyTree

Kind = Literal["param", "variable", "nnx", "state", "mapping", "other"]


@functools.lru_cache(maxsize=4096)
def _kind(cls: type) -> Kind:
    if issubclass(cls, eqx.nn.State | eqx.nn.StateIndex):
        return "state"
    # By name, so that Flax is neither needed nor imported.
    names = {base.__name__ for base in cls.__mro__ if base.__module__.startswith("flax.nnx")}
    if "Variable" in names:
        return "param" if "Param" in names else "variable"
    if names & {"Module", "State", "Object", "Pytree"}:
        return "nnx"
    return "mapping" if issubclass(cls, Mapping) else "other"


def _is_collections(node: Any) -> bool:
    """The variables of a Linen module: `params`, and other collections beside it."""
    if _kind(type(node)) != "mapping" or "params" not in node or len(node) < 2:
        return False
    return all(isinstance(collection, Mapping) for collection in node.values())


def _is_special(node: Any) -> bool:
    return _kind(type(node)) not in ("other", "mapping") or _is_collections(node)


def _is_variable(node: Any) -> bool:
    return _kind(type(node)) in ("param", "variable")


def _in_nnx(node: Any) -> list[bool]:
    """The leaves of a module, a state or a variable, with True for those in a Param."""
    parts = jax.tree.leaves(node, is_leaf=_is_variable)
    return [_kind(type(p)) == "param" for p in parts for _ in jax.tree.leaves(p)]


def _in_collections(node: Any) -> list[bool]:
    def is_weight(path: Any, leaf: Any) -> bool:
        del leaf
        return getattr(path[0], "key", None) == "params"

    return jax.tree.leaves(jax.tree_util.tree_map_with_path(is_weight, node))


def _in_state(node: Any) -> list[bool]:
    if any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(node)):
        raise ValueError(
            f"The point holds an equinox.nn.{type(node).__name__}, whose running averages are no "
            "weights and would move as if they were. Take it out: model, state = "
            "eqx.nn.make_with_state(Model)(…); model = eqx.nn.inference_mode(model); and give "
            "the loss predict=lambda model, x: model(x, state)[0]. The point is the model alone."
        )
    return [False for _ in jax.tree.leaves(node)]


def weights_of(point: PyTree[Any]) -> list[bool] | None:
    """A flag for each leaf that is True for weights; None if all floating-point arrays are.

    Raises:
        ValueError: the point holds the state of Equinox's stateful layers.
    """
    nodes = jax.tree.leaves(point, is_leaf=_is_special)
    if not any(map(_is_special, nodes)):
        return None
    flags: list[bool] = []
    for node in nodes:
        kind = _kind(type(node))
        if kind == "state":
            flags += _in_state(node)
        elif kind in ("nnx", "param", "variable"):
            flags += _in_nnx(node)
        elif _is_collections(node):
            flags += _in_collections(node)
        else:
            flags.append(True)
    _mention(point, flags)
    return flags


_mentioned: set[str] = set()


def _mention(point: PyTree[Any], flags: list[bool]) -> None:
    """Says once for every kind of model which leaves stay as they are."""
    paths = jax.tree_util.tree_leaves_with_path(point)
    frozen = [
        jax.tree_util.keystr(path).removesuffix(".value")
        for (path, leaf), is_weight in zip(paths, flags, strict=True)
        if eqx.is_inexact_array(leaf) and not is_weight
    ]
    names = ", ".join(frozen[:8]) + (f" and {len(frozen) - 8} more" if len(frozen) > 8 else "")
    if frozen and names not in _mentioned:
        _mentioned.add(names)
        warnings.warn(
            f"Of this point {names} stay as they are: in Flax only an nnx.Param, or the collection "
            "'params' of Linen, is a weight. Say trainable=True to move all floating-point arrays, "
            "or trainable=… for others. This is said once.",
            stacklevel=2,
        )
