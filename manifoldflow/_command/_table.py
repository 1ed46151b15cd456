"""The live table: a row for each save, as it comes."""

from typing import Any

import numpy as np
from jax import tree

from manifoldflow._command._waiting import Waiting

Column = tuple[str, int, str, str]


class LiveTable:
    """Prints one row for each save, with a bar of the time that is done.

    Args:
        end_time: of the walk.
        columns: title, width, format and observable of each column. The observable "walked" is
            the length of the way so far, in chords from save to save.
        waiting: the announcement that the first rows end.
    """

    def __init__(self, end_time: float, columns: list[Column], waiting: Waiting):
        self._end_time, self._columns, self._waiting = end_time, columns, waiting
        self._before: np.ndarray | None = None
        self._walked, self._num_rows = 0.0, 0
        titles = " ".join(f"{title:>{width}}" for title, width, _, _ in columns)
        print(f"{'':12} {'limit time':>10} {titles}", flush=True)

    def __call__(self, row: dict[str, Any]) -> None:
        self._num_rows += 1
        self._waiting.clear()
        if self._num_rows == 2:
            self._waiting.__exit__()  # the start comes before what compiles for long
        values = {**row, "walked": self._way(row["coordinates"])}
        cells = " ".join(f"{float(values[n]):>{w}{f}}" for _, w, f, n in self._columns)
        time = float(row["time"])
        done = min(10, round(10 * time / self._end_time))
        print(f"[{'█' * done}{'·' * (10 - done)}] {_short(time):>10} {cells}", flush=True)

    def _way(self, coordinates: Any) -> float:
        here = np.concatenate([np.ravel(leaf) for leaf in tree.leaves(coordinates)])
        if self._before is not None:
            self._walked += float(np.linalg.norm(here - self._before))
        self._before = here
        return self._walked


def _short(time: float) -> str:
    return f"{time:.2f}" if time == 0 or time >= 0.1 else f"{time:.3g}"
