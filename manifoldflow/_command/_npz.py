"""Arrays as .npz, under the names that are in use."""

import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from manifoldflow._command._examples import Examples, some

PAIRS = [
    ("inputs", "targets"), ("X", "y"), ("x", "y"), ("X", "Y"), ("data", "target"),
    ("features", "labels"),
]  # fmt: skip


def read_npz(path: pathlib.Path, target: str | None, dropped: list[str]) -> Examples:
    """One array of inputs and one of targets; inputs of any shape are flattened."""
    found = arrays_of(path, lambda names: _names(path, names, target))
    names, (inputs, targets) = list(found), found.values()
    for name, array in found.items():
        if array.ndim == 0:
            raise ValueError(f"{path}: {name} is one number; it must have a row for each example.")
    if len(inputs) != len(targets):
        raise ValueError(
            f"{path}: {len(inputs)} rows in {names[0]}, but {len(targets)} in {names[1]}; they "
            "must be as many."
        )
    shape = () if dropped else inputs.shape[1:]
    inputs = _finite(path, names[0], inputs).reshape(len(inputs), -1)
    columns = [str(i + 1) for i in range(inputs.shape[1])]
    kept = [i for i, column in enumerate(columns) if column not in dropped]
    unknown = [name for name in dropped if name not in columns]
    if unknown:
        raise ValueError(
            f"--drop {unknown[0]}: columns of {path} have numbers, from 1 to {len(columns)}."
        )
    targets = _labels(path, names[1], targets)
    return Examples(inputs[:, kept], targets, [columns[i] for i in kept], shape)


def arrays_of(
    path: pathlib.Path, choose: Callable[[list[str]], Sequence[str]]
) -> dict[str, np.ndarray]:
    """The arrays that are chosen among the names of a file, in that order.

    Raises:
        ValueError: the file is no .npz file, or holds something else than arrays.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file; write it by numpy.savez.")
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in choose(list(stored.files))}
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError):
        raise ValueError(f"{path} is no .npz file; write it by numpy.savez.") from None
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError(
            f"{path} holds Python objects; it must hold arrays of numbers. Convert them, e.g. by "
            "astype(float), and save again."
        ) from None


def _names(path: pathlib.Path, names: list[str], target: str | None) -> tuple[str, str]:
    if target is not None and target not in names:
        raise ValueError(f"--target {target}: {path} has no such array; it has {some(names)}.")
    for first, second in PAIRS:
        if first in names and (second in names if target is None else first != target):
            return first, second if target is None else target
    others = [name for name in names if name != target]
    if target is not None and len(others) == 1:
        return others[0], target
    known = "; ".join(f"{first} and {second}" for first, second in PAIRS)
    raise ValueError(f"{path} needs two arrays called {known}; it has {some(names)}. Rename them.")


def _finite(path: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    is_real = np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
    if not is_real and array.dtype != bool:
        raise ValueError(f"{path}: {name} must be real numbers; got an array of {array.dtype}.")
    array = array.astype(float)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        index = ", ".join(str(i + 1) for i in bad[0])
        raise ValueError(
            f"{path}: {name} is not finite in {len(bad)} places, first in row (and column) "
            f"{index}, counted from 1; fill or delete such rows."
        )
    return array


def _labels(path: pathlib.Path, name: str, targets: np.ndarray) -> np.ndarray:
    if targets.ndim > 1:
        targets = targets.reshape(len(targets), -1)
        targets = targets[:, 0] if targets.shape[1] == 1 else targets
    if targets.dtype.kind in "US" and targets.ndim == 1:
        return targets.astype(str)
    return _finite(path, name, targets)
