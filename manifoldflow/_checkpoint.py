"""The saves of a running solve in a file, so that a killed run loses only its last leg."""

import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Point, Tangent

Saved = tuple[Coordinates, dict[str, PyTree[Array]]]


class Checkpoint:
    """An .npz file with all save times and, for those that are done, points and observables.

    Each save rewrites it by `write_whole`: whatever moment a run is killed at, the file is
    whole.
    """

    def __init__(
        self,
        path: str,
        times: Array,
        coordinates: Coordinates,
        velocity: Tangent,
        observables: PyTree[Any],
    ):
        """What tells this solve from others: its times, its start, the flow's drift there
        (which changes with the loss, the data and the noise), and what it observes."""
        self.path = with_suffix(path)
        self._times = np.asarray(times)
        self._start, self._treedef = jax.tree.flatten(coordinates)
        self._velocity = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(velocity)])
        self._names = set(flat_names(observables))
        self._columns: dict[str, list[np.ndarray]] = {}

    def load(self) -> int:
        """How many saves the file holds already; 0 without a file.

        Raises:
            ValueError: the file belongs to another solve; says in what it differs.
        """
        if not os.path.exists(self.path):
            return 0
        with np.load(self.path) as stored:
            columns = {name: stored[name] for name in stored.files}
        times, velocity = columns.pop("times"), columns.pop("velocity", np.zeros(0))
        same_times = times.shape == self._times.shape and np.allclose(times, self._times)
        starts = [columns.get(f"point_{i}") for i in range(len(self._start))]
        same_start = all(
            there is not None and there.shape[1:] == here.shape and np.allclose(there[0], here)
            for there, here in zip(starts, self._start)
        )
        same_flow = velocity.shape == self._velocity.shape and np.allclose(
            velocity, self._velocity, rtol=1e-3, atol=1e-3 * np.linalg.norm(self._velocity)
        )
        names = {name for name in columns if not name.startswith("point_")}
        for is_same, what in (
            (same_times, "other save times"),
            (same_start, "another start"),
            (same_flow, "another flow, loss or noise"),
            (names == self._names, f"other observables, {sorted(names)}"),
        ):
            if not is_same:
                raise ValueError(
                    f"The checkpoint {self.path} belongs to a solve with {what}. Delete it, or "
                    "give this solve another file."
                )
        self._columns = {name: list(column) for name, column in columns.items()}
        return len(self._columns["point_0"])

    def last_point(self) -> Coordinates:
        """The coordinates of the last save in the file."""
        leaves = [self._columns[f"point_{i}"][-1] for i in range(len(self._start))]
        return jax.tree.unflatten(self._treedef, [jax.numpy.asarray(leaf) for leaf in leaves])

    def write(self, time: Any, coordinates: Coordinates, observables: PyTree[Array]) -> None:
        """Take in one save and write the file."""
        row = {f"point_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(coordinates))}
        row |= flat_names(observables)
        num_done = int(np.searchsorted(self._times, np.asarray(time)))
        for name, value in row.items():
            column = self._columns.setdefault(name, [])
            del column[num_done:]
            column.append(np.asarray(value))
        columns = {name: np.stack(column) for name, column in self._columns.items()}
        write_whole(self.path, {"times": self._times, "velocity": self._velocity, **columns})

    def before(self, num_done: int, name: str) -> np.ndarray:
        """The first `num_done` entries of a column."""
        return np.stack(self._columns[name][:num_done])


def with_suffix(path: str | os.PathLike[str]) -> str:
    """The path with .npz at its end, as NumPy would write it."""
    path = os.fspath(path)
    return path if path.endswith(".npz") else path + ".npz"


def write_whole(path: str, arrays: dict[str, Any]) -> None:
    """Write an .npz file under another name and move it into place.

    So it is whole whatever moment the program is killed at. Makes the folder.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = path + ".partial"
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def flat_names(observables: PyTree[Any]) -> dict[str, Any]:
    """Observables under one name each, `loss` or `spectrum['top']`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(observables)
    return {"observed" + jax.tree_util.keystr(path): leaf for path, leaf in flat}


def load_checkpoint(path: str | os.PathLike[str], point: Point) -> tuple[Array, Point]:
    """The time and the point of the last save in a checkpoint file.

    Args:
        path: the file that was given to `solve(checkpoint=…)` or `simulate(checkpoint=…)`.
        point: any point of the same kind, for its structure.
    """
    coordinates, remainder = _tree.split(point)
    leaves, treedef = jax.tree.flatten(coordinates)
    with np.load(with_suffix(path)) as stored:
        columns = [stored.get(f"point_{i}") for i in range(len(leaves))]
        times = stored["times"]
    if any(c is None or c.shape[1:] != x.shape for c, x in zip(columns, leaves)):
        raise ValueError(f"The checkpoint {path} holds a point of another structure.")
    last = [jax.numpy.asarray(column[-1]) for column in columns]
    time = jax.numpy.asarray(times[len(columns[0]) - 1])
    return time, _tree.join(jax.tree.unflatten(treedef, last), remainder)
