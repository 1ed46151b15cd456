"""The live table of a walk: it ends the announcement, and measures the way."""

from typing import Any

import numpy as np
from jax import tree

import manifoldflow as mf
from manifoldflow._command._waiting import Waiting


class WalkTable:
    """`LiveTable` with one more observable.

    Args:
        table: what is printed. The observable "walked" is the length of the way so far, in chords
            from save to save.
        waiting: the announcement that the first rows end.
    """

    def __init__(self, table: mf.LiveTable, waiting: Waiting):
        self._table, self._waiting = table, waiting
        self._before: np.ndarray | None = None
        self._walked = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        self._waiting.clear()
        if self._table.rows:
            self._waiting.__exit__()  # the start comes before what compiles for long
        self._table({**row, "walked": self._way(row["coordinates"])})

    def _way(self, coordinates: Any) -> float:
        here = np.concatenate([np.ravel(leaf) for leaf in tree.leaves(coordinates)])
        if self._before is not None:
            self._walked += float(np.linalg.norm(here - self._before))
        self._before = here
        return self._walked
