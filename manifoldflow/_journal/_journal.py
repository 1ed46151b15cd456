"""The journal of a run: its saves so far, and the state from which it goes on bit by bit."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow._journal._contents import packed, unpacked
from manifoldflow._journal._files import because
from manifoldflow._journal._identity import Identity
from manifoldflow._journal._stores import AbstractStore, Place, store_of

_SHARE_OF_TIME = 0.1
_NOUNS = {"solve": "solve", "simulate": "run", "minimize": "search"}


class Journal:
    """The saves of a run, in memory and in a store.

    Stored are the columns `steps`, `times`, `point_i`, one for each observable and one for each
    number that steps go on with, with a row for each save; the leaves of the state after `step`
    steps; and what tells this run from others.

    Args:
        kind: "solve", "simulate" or "minimize".
        identity: tells this run from others.
        row_like: a save: coordinates, observables, and numbers that steps go on with.
        state: the rest that steps go on from, beside the last save.
        wanted: the steps after which to save, and the times of these saves. None where nobody
            knows them: then the first save and the last one are kept.
        time_tolerance: the relative difference that times of the same save may have.
    """

    def __init__(
        self,
        kind: str,
        identity: Identity,
        row_like: tuple[PyTree[Any], PyTree[Any], PyTree[Any]],
        state: PyTree[Any],
        wanted: dict[int, float] | None,
        time_tolerance: float = 0.0,
    ):
        self.step = 0
        self._kind, self._identity = kind, identity
        self._wanted, self._time_tolerance = wanted, time_tolerance
        self._steps: list[int] = []
        self._times: list[float] = []
        leaves, self._treedef = jax.tree.flatten(row_like)
        self._likes = dict(zip(_names(*row_like), leaves, strict=True))
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in self._likes}
        self._states, self._state_treedef = jax.tree.flatten(state)
        self._written_at, self._write_seconds = -np.inf, 0.0

    @property
    def num_done(self) -> int:
        """The number of saves so far."""
        return len(self._steps)

    @contextlib.contextmanager
    def opened(self, checkpoint: Place | None) -> Iterator[AbstractStore | None]:
        """The store to write to, kept from others meanwhile; None where nothing is written."""
        if checkpoint is None:
            yield None
            return
        store = store_of("checkpoint", checkpoint)
        per_save = sum(_num_bytes(like) for like in self._likes.values()) + 16
        fixed = sum(map(_num_bytes, self._states)) + 2**13
        num_saves = 2 if self._wanted is None else len(self._wanted)
        with store.opened(num_saves * per_save + fixed):
            yield store

    def add(self, row: PyTree[Array], step: int, time: Any) -> None:
        """Take in the save after so many steps."""
        for column, leaf in zip(self._columns.values(), jax.tree.leaves(row), strict=True):
            self._append(column, np.asarray(leaf))
        self._append(self._steps, step)
        self._append(self._times, float(time))
        self.step = step

    def _append(self, column: list[Any], value: Any) -> None:
        # Without saves that were asked for, as in `minimize`, the start and the last one are kept.
        if self._wanted is None:
            del column[1:]
        column.append(value)

    def rows(self) -> Any:
        """All saves, as one row with a leading axis."""
        columns = [
            jnp.asarray(np.stack(column) if column else np.zeros((0, *like.shape), like.dtype))
            for column, like in zip(self._columns.values(), self._likes.values())
        ]
        return jax.tree.unflatten(self._treedef, columns)

    def last(self) -> Any:
        """The last save."""
        leaves = [jnp.asarray(column[-1]) for column in self._columns.values()]
        return jax.tree.unflatten(self._treedef, leaves)

    def write(self, store: AbstractStore, state: PyTree[Array], must: bool) -> None:
        """Rewrite what is stored, unless that would cost more than a tenth of the time.

        Raises:
            OSError: it could not be written; what was there before is whole.
        """
        # Not the time of day, which may be set back during a run.
        began = time.monotonic()
        if not must and began - self._written_at < self._write_seconds / _SHARE_OF_TIME:
            return
        arrays: dict[str, Any] = {"step": self.step, "steps": np.asarray(self._steps)}
        arrays["times"] = np.asarray(self._times)
        arrays |= {name: np.stack(column) for name, column in self._columns.items()}
        arrays |= {f"state_{i}": _plain(x) for i, x in enumerate(jax.tree.leaves(state))}
        try:
            store.write(packed(self._kind, self._identity.as_dict(), arrays), self.step)
        except OSError as error:
            raise OSError(
                f"The checkpoint {store.name()} could not be written: {because(error)}. What was "
                "written before is whole: make room, then call the same again to go on from it."
            ) from error
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - began

    def read(self, store: AbstractStore) -> tuple[PyTree[Array], int]:
        """Takes over what is stored; returns the state, and the number of its steps.

        They are more than `step` where the file has gone further than this run is to go.

        Raises:
            ValueError: nothing is stored, something damaged, or another run; says in what it
                differs.
        """
        path, kind = store.name(), f"`{self._kind}`"
        if not store.has_any():
            raise ValueError(f"There is no checkpoint {path} to resume from.")
        about, arrays = unpacked(path, store.read(kind), kind)
        self._check(path, about, arrays)
        step, stored_steps = int(arrays["step"]), arrays["steps"].tolist()
        due = [save for save in self._wanted or stored_steps if save <= step]
        missing = sorted(set(due) - set(stored_steps))
        if missing:
            raise ValueError(
                f"The checkpoint {path} has saves after {_some(stored_steps)} steps, but not after "
                f"{_some(missing)}, as this run asks for. Choose num_saves so that they meet, or "
                "give this run another file."
            )
        rows = [stored_steps.index(wanted) for wanted in due]
        for name in self._likes:
            self._columns[name] = [arrays[name][row] for row in rows]
        stored_times = dict(zip(stored_steps, arrays["times"].tolist()))
        self._times = [(self._wanted or stored_times)[step] for step in due]
        self._steps, self.step = due, min(step, max(self._wanted or [step]))
        leaves = [_restored(arrays[f"state_{i}"], like) for i, like in enumerate(self._states)]
        return jax.tree.unflatten(self._state_treedef, leaves), step

    def _check(self, path: str, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        if about["kind"] != self._kind:
            raise ValueError(
                f"{path} is a checkpoint of `{about['kind']}`, not a checkpoint of "
                f"`{self._kind}`. Give another file."
            )
        there, own, noun = about["identity"], self._identity, _NOUNS[self._kind]
        versions = own.other_versions(there)
        if versions is not None:
            raise ValueError(
                f"The checkpoint {path} was written with other versions: {versions}. A {noun} "
                "goes on bit by bit only with the same ones: install them, or delete the file."
            )
        differences = self._other_structure(arrays), own.other_values(there)
        what = (
            " and ".join(filter(None, differences))
            or self._other_times(arrays)
            or self._other_names(arrays)
            or own.other_functions(there)
        )
        if what:
            raise ValueError(
                f"The checkpoint {path} belongs to a {noun} with {what}. Delete it, or give this "
                f"{noun} another file."
            )

    def _other_structure(self, arrays: dict[str, np.ndarray]) -> str | None:
        states = {name: array.shape for name, array in arrays.items() if name.startswith("state_")}
        own = {f"state_{i}": _plain(leaf).shape for i, leaf in enumerate(self._states)}
        return None if states == own else "a point or an optimizer of another structure"

    def _other_times(self, arrays: dict[str, np.ndarray]) -> str | None:
        stored = zip(arrays["steps"].tolist(), arrays["times"].tolist(), strict=True)
        own = self._wanted or {}
        apart = [abs(t - own.get(step, t)) / (t or 1) for step, t in stored]
        if max(apart) <= self._time_tolerance:
            return None
        is_solve = self._kind == "solve"
        return "other save times" if is_solve else "another learning rate or momentum"

    def _other_names(self, arrays: dict[str, np.ndarray]) -> str | None:
        stored = {name for name in arrays if name.startswith("observed")}
        own = {name for name in self._likes if name.startswith("observed")}
        return None if stored == own else f"other observables, {sorted(stored)}"


def _names(coordinates: PyTree[Any], observables: PyTree[Any], numbers: PyTree[Any]) -> list[str]:
    points = [f"point_{i}" for i in range(len(jax.tree.leaves(coordinates)))]
    flat, _ = jax.tree_util.tree_flatten_with_path(observables)
    observed = ["observed" + jax.tree_util.keystr(path) for path, _ in flat]
    return points + observed + [f"number_{i}" for i in range(len(jax.tree.leaves(numbers)))]


def _num_bytes(like: Any) -> int:
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return like.size * (16 if is_key else like.dtype.itemsize)


def _plain(leaf: Any) -> np.ndarray:
    """The array in a form that NumPy can store: random keys as their words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jr.key_data(leaf)
    return np.asarray(leaf)


def _restored(array: np.ndarray, like: Array) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(like))
    return jnp.asarray(array)


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (" …" if len(steps) > 6 else "")
