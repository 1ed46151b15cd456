"""The journal of a run: its saves so far, and the state from which it goes on bit by bit."""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow._checkpoint import flat_names
from manifoldflow.sgd._loop import Row, State
from manifoldflow.sgd._store import AbstractStore

_SHARE_OF_TIME = 0.1


class Journal:
    """The saves of a run, in memory and in a store.

    Stored are the columns `steps`, `times`, `point_i` and one for each observable, with a
    row for each save; the leaves of the state after `step` steps; and what tells this run
    from others.
    """

    def __init__(
        self,
        save_steps: np.ndarray,
        times: Float[Array, " saves"],
        identity: dict[str, Array],
        row_like: Row,
    ):
        self.step = 0
        self._wanted = {int(step): float(time) for step, time in zip(save_steps, times)}
        self._steps: list[int] = []
        self._identity = {name: np.asarray(value) for name, value in identity.items()}
        leaves, self._treedef = jax.tree.flatten(row_like)
        self._likes = dict(zip(_names(row_like), leaves))
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in self._likes}
        self._written_at, self._write_seconds = -np.inf, 0.0

    @property
    def num_done(self) -> int:
        return len(self._steps)

    def add(self, row: Row, step: int) -> None:
        for column, leaf in zip(self._columns.values(), jax.tree.leaves(row)):
            column.append(np.asarray(leaf))
        self._steps.append(step)
        self.step = step

    def rows(self) -> Row:
        columns = [jnp.asarray(np.stack(column)) for column in self._columns.values()]
        return jax.tree.unflatten(self._treedef, columns)

    def write(self, store: AbstractStore, state: State, must: bool) -> None:
        """Rewrite what is stored, unless that would cost more than a tenth of the time."""
        began = time.monotonic()
        if not must and began - self._written_at < self._write_seconds / _SHARE_OF_TIME:
            return
        arrays = {name: np.stack(column) for name, column in self._columns.items()}
        arrays |= {f"state_{i}": _plain(x) for i, x in enumerate(jax.tree.leaves(state))}
        times = [self._wanted[step] for step in self._steps]
        steps = {"step": self.step, "steps": np.asarray(self._steps), "times": np.asarray(times)}
        plain = {name: np.asarray(x) for name, x in {**self._identity, **steps, **arrays}.items()}
        store.write(plain, self.step)
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - began

    def read(self, store: AbstractStore, state: State) -> State:
        """Take over what is stored; returns the state.

        Raises:
            ValueError: nothing is stored, or another run; says in what it differs.
        """
        path = store.name()
        if not store.has_any():
            raise ValueError(f"There is no checkpoint {path} to resume from.")
        arrays = store.read()
        likes, treedef = jax.tree.flatten(state)
        self._check(path, arrays, likes)
        step, stored_steps = int(arrays["step"]), arrays["steps"].tolist()
        due = [wanted for wanted in self._wanted if wanted <= step]
        missing = sorted(set(due) - set(stored_steps))
        if missing:
            raise ValueError(
                f"The checkpoint {path} has saves after {_some(stored_steps)} steps, but not after "
                f"{_some(missing)}, as this run asks for. Choose num_saves so that they meet, or "
                "give this run another file."
            )
        rows = [stored_steps.index(wanted) for wanted in due]
        for name, like in self._likes.items():
            self._columns[name] = [_array(arrays[name], like.dtype)[row] for row in rows]
        self._steps, self.step = due, min(step, max(self._wanted))
        leaves = [_restored(arrays[f"state_{i}"], like) for i, like in enumerate(likes)]
        state = jax.tree.unflatten(treedef, leaves)
        return state if self.step == step else self._back_at_last_save(state)

    def _back_at_last_save(self, state: State) -> State:
        """The file has gone further than this run is to go."""
        last = jax.tree.map(lambda leaf: leaf[-1], self.rows())
        is_later = state.diverged_at >= self.step
        return eqx.tree_at(
            lambda s: (s.coordinates, s.diverged_at),
            state,
            (last.coordinates, jnp.where(is_later, -1, state.diverged_at)),
        )

    def _check(self, path: str, arrays: dict[str, np.ndarray], likes: list[Any]) -> None:
        if not {"step", "steps", "times", *self._identity} <= set(arrays):
            raise ValueError(f"{path} is not a checkpoint of `simulate`. Give another file.")
        key, sums = (arrays[name] for name in ("key", "fingerprint"))
        own = self._identity["fingerprint"]
        times = zip(arrays["steps"].tolist(), arrays["times"].tolist())
        states = [arrays.get(f"state_{i}") for i in range(len(likes) + 1)]
        observed = {name for name in arrays if name.startswith("observed")}
        own_observed = {name for name in self._likes if name.startswith("observed")}
        same_state = states[-1] is None and all(
            there is not None and there.shape == _plain(like).shape
            for there, like in zip(states, likes)
        )
        same_times = all(abs(t - self._wanted.get(step, t)) <= 1e-5 * t for step, t in times)
        for is_same, what in (
            (same_state, "a point or an optimizer of another structure"),
            (np.array_equal(key, self._identity["key"]), "another key"),
            (
                sums.shape == own.shape
                and np.all(np.abs(sums - own) <= 1e-3 * np.maximum(own[:, 1:], 1e-30)),
                "another start, loss, noise, optimizer or learning rate",
            ),
            (same_times, "another learning rate or momentum"),
            (observed == own_observed, f"other observables, {sorted(observed)}"),
        ):
            if not is_same:
                raise ValueError(
                    f"The checkpoint {path} belongs to a run with {what}. Delete it, or give "
                    "this run another file."
                )


def _names(row: Row) -> list[str]:
    points = [f"point_{i}" for i in range(len(jax.tree.leaves(row.coordinates)))]
    return points + list(flat_names(row.observables))


def _plain(leaf: Any) -> np.ndarray:
    """As NumPy can store it: random keys as their words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jr.key_data(leaf)
    return np.asarray(leaf)


def _restored(array: np.ndarray, like: Array) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(like))
    return jnp.asarray(_array(array, like.dtype))


def _array(array: np.ndarray, dtype: Any) -> np.ndarray:
    # NumPy stores types it does not know, such as bfloat16, as so many bytes.
    return array.view(dtype) if array.dtype.kind == "V" else array


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (" …" if len(steps) > 6 else "")
