"""What `solve` can be asked for: checked, and made ready to pass through jit."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow._errors import checked_count, is_traced
from manifoldflow._solution import Observables
from manifoldflow._types import Coordinates, Point, Scalar

Report = Callable[[Any, Coordinates, PyTree[Array]], None]


class Stationary(eqx.Module):
    """For `solve(until=…)`: stop once the norm of the drift is at most `tolerance`."""

    tolerance: Scalar = eqx.field(converter=lambda value: jnp.asarray(value, float))


class Options(eqx.Module):
    """What `solve` was asked for, ready to be passed through jit."""

    solver: dfx.AbstractSolver
    step_size: Scalar | None
    rtol: Scalar
    atol: Scalar
    adjoint: dfx.AbstractAdjoint
    observe: dict[str, Callable[[Point], PyTree[Any]]]
    until: Callable[[Point], Any] | Stationary | None
    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)


def save_times_of(end_time: Any, num_saves: int, save_times: Any, dtype: Any) -> Array:
    if jnp.ndim(end_time) or isinstance(end_time, str):
        raise ValueError(f"end_time must be one number; got {end_time!r}.")
    if not is_traced(end_time) and not 0 < float(end_time) < math.inf:
        raise ValueError(f"end_time must be positive and finite; got {end_time}.")
    if save_times is None:
        num_saves = checked_count("num_saves", num_saves)
        fractions = jnp.arange(num_saves + 1, dtype=dtype) / num_saves
        return fractions * jnp.asarray(end_time, dtype)
    wanted = jnp.asarray(save_times, dtype)
    if wanted.ndim != 1 or wanted.size == 0:
        raise ValueError(f"save_times must be a sequence of times; got shape {wanted.shape}.")
    times = jnp.concatenate([jnp.zeros(1, dtype), wanted])
    if not is_traced((wanted, end_time)):
        increasing = bool(jnp.all(jnp.diff(times) >= 0))
        if not increasing or float(times[-1]) > float(jnp.asarray(end_time, dtype)):
            raise ValueError(
                f"save_times must increase from 0 to at most end_time={end_time}; got {save_times}."
            )
    return times


def tolerance(name: str, value: Any, wide: float, narrow: float, dtype: Any) -> Scalar:
    if value is None:
        value = wide if jnp.finfo(dtype).eps < 1e-10 else narrow
    elif not is_traced(value) and not float(value) > 0:
        raise ValueError(f"{name} must be positive; got {value}.")
    return jnp.asarray(value, dtype)


def solver_of(solver: dfx.AbstractSolver | None, step_size: Any) -> dfx.AbstractSolver:
    solver = dfx.Tsit5() if solver is None else solver
    if isinstance(solver, type) or not isinstance(solver, dfx.AbstractSolver):
        raise ValueError(f"solver must be a Diffrax solver, as diffrax.Tsit5(); got {solver!r}.")
    if not is_traced(step_size) and step_size is not None and not 0 < float(step_size) < math.inf:
        raise ValueError(
            f"step_size must be positive and finite; got {step_size}. Leave it out for "
            "adaptive steps."
        )
    if step_size is None and not isinstance(solver, dfx.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} estimates no error, so it cannot choose its own steps. "
            "Pass step_size=…, or wrap it in diffrax.HalfSolver."
        )
    return solver


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


def meter_of(progress: Any) -> dfx.AbstractProgressMeter:
    is_known = isinstance(progress, bool | dfx.AbstractProgressMeter) or callable(progress)
    if not is_known:
        raise ValueError(
            f"progress must be a bool, a Diffrax progress meter or a function; got {progress!r}."
        )
    if progress is True:
        return dfx.TextProgressMeter()
    return progress if isinstance(progress, dfx.AbstractProgressMeter) else dfx.NoProgressMeter()


def row_reports(progress: Any) -> tuple["_RowReport", ...]:
    is_fn = callable(progress) and not isinstance(progress, dfx.AbstractProgressMeter)
    fn: Any = progress
    return (_RowReport(fn),) if is_fn else ()


class _RowReport(eqx.Module):
    """Calls a user's function with one dict for each save."""

    fn: Callable[[dict[str, Any]], None]

    def __call__(self, time: Any, coordinates: Coordinates, observables: Any) -> None:
        self.fn({"time": time, "coordinates": coordinates, **observables})
