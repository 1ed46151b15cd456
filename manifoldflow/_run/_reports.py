"""The output of a long run on its way: observables, progress meters, reports."""

from collections.abc import Callable, Mapping
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow._errors import is_traced
from manifoldflow._results import Observables
from manifoldflow._types import Coordinates, Point, Scalar

Report = Callable[[Any, Coordinates, PyTree[Array]], None]
"""What is called at every save: time, coordinates, observables."""


def checked_observables(observe: Observables | None) -> dict[str, Callable[[Point], Any]]:
    if observe is not None and not isinstance(observe, Mapping):
        raise ValueError(f"observe must map names to functions of a point; got {observe!r}.")
    observe = dict(observe or {})
    for name, fn in observe.items():
        if not callable(fn):
            raise ValueError(
                f"observe maps names to functions of a point; got {fn!r} for {name!r}."
            )
    return observe


def observed(observe: Observables, point: Point) -> dict[str, PyTree[Array]]:
    """The observables at a point."""
    return {name: jax.tree.map(jnp.asarray, fn(point)) for name, fn in observe.items()}


def announce(name: str, progress: Any, given: Any) -> None:
    """Say that a run begins, whose first percentage comes when its program is compiled."""
    # Within another program this line would be printed when that one is traced, and never again.
    if progress is True and not is_traced(given):
        print(f"{name}: compiling, and running …", flush=True)


def meter_of(progress: Any) -> dfx.AbstractProgressMeter:
    is_known = isinstance(progress, bool | dfx.AbstractProgressMeter) or callable(progress)
    if not is_known:
        raise ValueError(
            f"progress must be a bool, a Diffrax progress meter or a function; got {progress!r}."
        )
    if progress is True:
        return dfx.TextProgressMeter()
    return progress if isinstance(progress, dfx.AbstractProgressMeter) else dfx.NoProgressMeter()


def show(reports: tuple[Report, ...], time: Any, coordinates: Coordinates, seen: Any) -> None:
    """Report from inside a program."""
    for report in reports:
        # Not ordered: an ordered effect would keep the program from running on several devices.
        jax.debug.callback(report, time, coordinates, seen)


def tell(reports: tuple[Report, ...], time: Any, coordinates: Coordinates, seen: Any) -> None:
    """The same between programs, at once; what is raised says where it came from."""
    for report in reports:
        try:
            report(time, coordinates, seen)
        except Exception as error:
            error.add_note(f"This came from the callback `progress` at time {float(time):.6g}.")
            raise


def share_of_decades(first: Scalar, least: Scalar, wanted: Scalar) -> Scalar:
    """The share of the decimal places that a number has to fall which it has fallen."""
    # 0/0 where the start is good enough already.
    return jnp.nan_to_num(jnp.log(first / least) / jnp.log(first / wanted))


def row_reports(progress: Any) -> tuple[Report, ...]:
    is_fn = callable(progress) and not isinstance(progress, dfx.AbstractProgressMeter)
    fn: Any = progress
    return (_RowReport(fn),) if is_fn else ()


class _RowReport(eqx.Module):
    """Calls a user's function with one dict for each save."""

    fn: Callable[[dict[str, Any]], None]

    def __call__(self, time: Any, coordinates: Coordinates, observables: Any) -> None:
        self.fn({"time": time, "coordinates": coordinates, **observables})
