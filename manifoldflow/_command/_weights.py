"""Weights of a trained network, read from a file into the network as it is built."""

import pathlib
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow._command._examples import some
from manifoldflow._command._npz import arrays_of

_MAGIC = b"\x93NUMPY"


class _Stored(NamedTuple):
    names: list[str] | None  # None where the file has only an order
    arrays: list[np.ndarray]


def with_weights(path: pathlib.Path, model: Any, place: str) -> Any:
    """The model with the leaves that a file holds, in the model's own precision.

    Args:
        path: .eqx or .npz.
        model: as `place` builds it.
        place: `module:function`, for messages.

    Raises:
        ValueError: no such file, or one of another model; says which leaves differ, and how.
    """
    suffix = path.suffix.lower()
    if suffix not in (".eqx", ".npz"):
        raise ValueError(
            f"the network must be a .eqx file of equinox.tree_serialise_leaves or a .npz file of "
            f"arrays; got {path}."
        )
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    if suffix == ".eqx":
        stored = _read_eqx(path)
    else:
        arrays = arrays_of(path, lambda names: names)
        stored = _Stored(list(arrays), list(arrays.values()))
    if stored.names is None:
        # Equinox writes plain numbers as well, unless the arrays alone were handed to it.
        choices = (eqx.is_array_like, eqx.is_array, eqx.is_inexact_array)
    else:
        choices = (eqx.is_array, eqx.is_inexact_array)
    for is_stored in choices:
        named = _leaves(model, is_stored)
        if len(named) == len(stored.arrays):
            break
    else:
        raise _of_another_number(path, place, stored, _leaves(model, eqx.is_array))
    arrays = _in_order(path, stored, list(named))
    _check(path, place, dict(zip(named, arrays)), named)
    return _filled(model, is_stored, [_like(a, leaf) for a, leaf in zip(arrays, named.values())])


def _leaves(model: Any, is_stored: Callable[[Any], bool]) -> dict[str, Any]:
    """Leaves by their paths, as layers.0.weight."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, is_stored))
    return {_words(jax.tree_util.keystr(path)) or "the model": leaf for path, leaf in leaves}


def _words(path: str) -> str:
    """['a'][0].b, .a[0].b and a/0/b are all called a.0.b."""
    return ".".join(re.findall(r"\w+", path))


def _read_eqx(path: pathlib.Path) -> _Stored:
    """One array after the other; perhaps a line of hyperparameters before them."""
    arrays = []
    with open(path, "rb") as file:
        if not _at_an_array(file):
            file.readline()
        while _at_an_array(file):
            try:
                arrays.append(np.load(file))
            except (ValueError, EOFError, OSError):
                raise ValueError(
                    f"{path} is damaged after {len(arrays)} arrays; save it again."
                ) from None
        is_whole = not file.read(1)
    if not arrays or not is_whole:
        raise ValueError(
            f"{path} is no .eqx file; write it by equinox.tree_serialise_leaves(file, model)."
        )
    return _Stored(None, arrays)


def _at_an_array(file: BinaryIO) -> bool:
    here = file.tell()
    is_one = file.read(len(_MAGIC)) == _MAGIC
    file.seek(here)
    return is_one


def _in_order(path: pathlib.Path, stored: _Stored, names: list[str]) -> list[np.ndarray]:
    """The arrays in the order of the model's leaves: by their names, or by their numbers."""
    if stored.names is None:
        return stored.arrays
    by_name = {_words(name): array for name, array in zip(stored.names, stored.arrays)}
    if set(by_name) == set(names):
        return [by_name[name] for name in names]
    numbers = [re.fullmatch(r"\D*(\d+)", name) for name in stored.names]
    found = [int(number[1]) for number in numbers if number]
    if sorted(found) != list(range(min(found, default=0), len(names) + min(found, default=0))):
        raise ValueError(
            f"{path}: arrays must be called as the leaves of the model, {some(names)}, or by "
            f"numbers in their order, arr_0, arr_1, …; got {some(stored.names)}."
        )
    return [array for _, array in sorted(zip(found, stored.arrays), key=lambda pair: pair[0])]


def _check(
    path: pathlib.Path, place: str, stored: dict[str, np.ndarray], named: dict[str, Any]
) -> None:
    wrong = [name for name, leaf in named.items() if stored[name].shape != np.shape(leaf)]
    if wrong:
        shown = ", ".join(
            f"{name} is {stored[name].shape} in the file and {np.shape(named[name])} in the model"
            for name in wrong[:4]
        ) + (f", and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(
            f"{path} is of another model than {place} builds: {shown}. Build the model with the "
            "sizes that it was trained with."
        )
    for name, leaf in named.items():
        kind, expected = stored[name].dtype, jnp.asarray(leaf).dtype
        is_raw = kind.kind == "V" and kind.itemsize == expected.itemsize
        if not is_raw and not np.can_cast(kind, expected, casting="same_kind"):
            raise ValueError(
                f"{path} is of another model than {place} builds: {name} holds {kind} in the file "
                f"and {expected} in the model."
            )
        if not is_raw and not np.isfinite(stored[name]).all():
            raise ValueError(
                f"{path}: {name} is not finite; the training has diverged, or was saved too late."
            )


def _of_another_number(
    path: pathlib.Path, place: str, stored: _Stored, named: dict[str, Any]
) -> ValueError:
    shapes = [str(array.shape) for array in stored.arrays]
    if stored.names is not None:
        shapes = [f"{name} {shape}" for name, shape in zip(stored.names, shapes)]
    expected = [f"{name} {np.shape(leaf)}" for name, leaf in named.items()]
    return ValueError(
        f"{path} is of another model than {place} builds: {len(shapes)} arrays in the file, "
        f"{some(shapes)}; {len(expected)} in the model, {some(expected)}. Build the model that "
        "was trained."
    )


def _like(array: np.ndarray, leaf: Any) -> Any:
    """The array in the type and the precision of the leaf."""
    if not eqx.is_array(leaf):
        return array.item()
    if array.dtype.kind == "V":  # bfloat16 has no name in NumPy's files
        array = array.view(leaf.dtype)
    array = array.astype(leaf.dtype)
    return jnp.asarray(array) if isinstance(leaf, jax.Array) else array


def _filled(model: Any, is_stored: Callable[[Any], bool], leaves: list[Any]) -> Any:
    chosen, rest = eqx.partition(model, is_stored)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(chosen), leaves), rest)
