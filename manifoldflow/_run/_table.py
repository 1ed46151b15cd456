"""The live table: a row for each save of a run, as it comes."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from manifoldflow._errors import checked_positive, described

_WIDTH = 9


class LiveTable:
    """A table of a run that grows while it runs: for `progress` of `solve`, `simulate`, `minimize`.

    It prints a row for every report: the time and every observable that is one number. With the end
    time of the run, a bar says how far it is. The rows are kept as well.

    Args:
        columns: name of an observable → (title, format) of its column; by default all of them.
            "time" names that of the time.
        end_time: of the run, positive; None for no bar.
        file: where to print; by default standard output.

    Attributes:
        rows: a dict for every report so far, "time" and the observables as numbers.

    Raises:
        ValueError: columns of another form, an end time that is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
        >>> flow = mf.RiemannianGradientFlow(circle, lambda p: p[1])
        >>> table, observe = mf.LiveTable(), {"height": lambda p: p[1]}
        >>> start = jnp.array([0.6, 0.8])
        >>> _ = mf.solve(flow, start, end_time=9.0, observe=observe, progress=table)
             time    height
                0       0.8
                9        -1
    """

    def __init__(
        self,
        columns: Any = None,
        *,
        end_time: Any = None,
        file: Any = None,
    ):
        columns = None if columns is None else _checked_columns(columns)
        self._time = ("time", ".4g") if columns is None else columns.pop("time", ("time", ".4g"))
        self._columns = columns
        self._end_time = (
            None if end_time is None else float(checked_positive("LiveTable: end_time", end_time))
        )
        self._file = file
        self.rows: list[dict[str, Any]] = []

    def __call__(self, row: dict[str, Any]) -> None:
        numbers = {k: np.asarray(v) for k, v in row.items() if k != "coordinates"}
        numbers = {name: float(value) for name, value in numbers.items() if value.ndim == 0}
        if self._columns is None:
            self._columns = {name: (name, ".4g") for name in numbers if name != "time"}
        if not self.rows:
            self._print(self._time[0], [title for title, _ in self._columns.values()])
        self.rows.append(numbers)
        missing = self._columns.keys() - numbers.keys()
        if missing:
            raise ValueError(
                f"LiveTable: columns must be among the observables {sorted(numbers)}; got "
                f"{sorted(missing)}."
            )
        cells = [f"{numbers[name]:{form}}" for name, (_, form) in self._columns.items()]
        self._print(f"{numbers['time']:{self._time[1]}}", cells, numbers["time"])

    def _print(self, time: str, cells: list[str], at: float | None = None) -> None:
        assert self._columns is not None
        widths = [max(_WIDTH, len(title)) for title, _ in self._columns.values()]
        line = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        bar = "" if self._end_time is None else f"{_bar(at, self._end_time):12} "
        width = max(_WIDTH, len(self._time[0]))
        print(f"{bar}{time:>{width}} {line}", file=self._file or sys.stdout, flush=True)


def _checked_columns(columns: Any) -> dict[str, tuple[str, str]]:
    form = "LiveTable: columns must map names of observables to (title, format)"
    if not isinstance(columns, Mapping):
        raise ValueError(f"{form}; got {described(columns)}.")
    for name, pair in columns.items():
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not is_pair or not all(isinstance(word, str) for word in pair):
            raise ValueError(f"{form}, e.g. ('tr∇²L', '.3f'); got {pair!r} for {name!r}.")
    return dict(columns)


def _bar(time: float | None, end_time: float) -> str:
    if time is None:
        return ""
    done = min(10, max(0, round(10 * time / end_time)))
    return f"[{'█' * done}{'·' * (10 - done)}]"
