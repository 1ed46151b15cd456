"""The identity of a run, in parts, so that a refusal can name what changed."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._journal._programs import array_text, digest, program
from manifoldflow._types import Coordinates, Point

_SIMPLE = bool | int | float | complex | str | None


class Identity(eqx.Module):
    """All that the result of a run depends on, as texts under names.

    Attributes:
        values: numbers and arrays, bit by bit: "key", "noise.std", "learning rate".
        functions: digests of functions that stand by themselves: "until", "optimizer".
        chain: the same for functions each of which calls those before it, so that only the first
            that differs tells something.
        versions: of what computes and of this format.
    """

    values: dict[str, str]
    functions: dict[str, str]
    chain: dict[str, str]
    versions: dict[str, str] = eqx.field(default_factory=lambda: versions())

    def as_dict(self) -> dict[str, dict[str, str]]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def other_versions(self, there: dict[str, dict[str, str]]) -> str | None:
        """The words on the versions that a file was written with, if they are others."""
        found = _differences(there["versions"], self.versions)
        return " and ".join(f"{name} {old}, not {new}" for name, old, new in found) or None

    def other_values(self, there: dict[str, dict[str, str]]) -> str | None:
        return _said(_differences(there["values"], self.values))

    def other_functions(self, there: dict[str, dict[str, str]]) -> str | None:
        found = _differences(there["functions"], self.functions)
        return _said(found + _differences(there["chain"], self.chain)[:1])


def versions() -> dict[str, str]:
    """The versions of the libraries that make the steps.

    Another version may round otherwise, or print its programs in another way.
    """
    names = "jax", "equinox", "diffrax", "optax"
    found = {name: importlib.metadata.version(name) for name in names}
    found["jax_threefry_partitionable"] = str(
        getattr(jax.config, "jax_threefry_partitionable", None)
    )
    return found


def parts_of(name: str, value: PyTree[Any], whole: bool = False) -> dict[str, str]:
    """The numbers in a module or any PyTree, static ones included, each under its own name.

    Functions are left out: `program` tells what they do.

    Args:
        name: of the value.
        value: to be told apart.
        whole: all of it under the one name.
    """
    parts = dict(_parts(name, value))
    if not whole or len(parts) <= 1:
        return parts
    return {name: digest(sorted(parts.items()))}


def start_of(coordinates: Coordinates, remainder: Point) -> dict[str, str]:
    """The starting point of a run, as texts."""
    frozen = parts_of("frozen part of the point", remainder, whole=True)
    return {**parts_of("start", coordinates, whole=True), **frozen}


def observables_of(observe: Mapping[str, Callable[..., Any]], point: Point) -> dict[str, str]:
    """The functions that are asked at each save."""
    return {f"observable {name!r}": program(fn, point) for name, fn in observe.items()}


def _parts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, _tree.Static):
        value = value.tree
    if eqx.is_array(value) or isinstance(value, np.ndarray | np.generic):
        yield name, array_text(value)
    elif isinstance(value, _SIMPLE):
        yield name, repr(value)
    elif isinstance(value, dict):
        # The order of a dict's keys is no part of what it says.
        for key in sorted(value, key=str):
            yield from _parts(f"{name}[{key!r}]", value[key])
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _parts(f"{name}[{index}]", part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Two classes may have the same fields: noises differ by their class alone.
        yield name, type(value).__qualname__
        for field in dataclasses.fields(value):
            yield from _parts(f"{name}.{field.name}", getattr(value, field.name, None))
    else:
        leaves = [leaf for leaf in jax.tree.leaves(value) if eqx.is_array(leaf)]
        if leaves:
            yield name, digest(leaves)


def _differences(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str, str]]:
    names = [*new, *(name for name in old if name not in new)]
    return [
        (name, old.get(name, "none"), new.get(name, "none"))
        for name in names
        if old.get(name) != new.get(name)
    ]


def _said(differences: list[tuple[str, str, str]]) -> str | None:
    """`another noise.std (0.5 in the file, 0.6 here) and another key`; None for none."""
    shown = []
    for name, old, new in differences[:3]:
        is_short = "sha256:" not in old + new and len(old + new) < 80
        shown.append(f"another {name}" + (f" ({old} in the file, {new} here)" if is_short else ""))
    more = len(differences) - len(shown)
    return " and ".join([*shown, *([f"{more} more"] if more else [])]) or None
