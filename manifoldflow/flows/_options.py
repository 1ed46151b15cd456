"""The options of `solve`: checked, and made ready to pass through jit."""

import math
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _precision
from manifoldflow._errors import (
    checked_count,
    checked_positive,
    is_traced,
    real_numbers,
)
from manifoldflow._run import form_of, Report, stops_at, Until
from manifoldflow._types import Flag, Key, Point, Scalar
from manifoldflow.flows._base import AbstractFlow, is_stochastic


class NoiseOptions(eqx.Module):
    """The options for the steps of a stochastic flow."""

    key: Key
    num_steps: int = eqx.field(static=True)  # equal ones between any two saves
    is_adaptive: bool = eqx.field(static=True)


class Options(eqx.Module):
    """The options of a `solve`, ready to be passed through jit."""

    solver: dfx.AbstractSolver | None  # None: Euler-Maruyama in a scan
    step_size: Scalar | None
    noise: NoiseOptions | None  # None: an ordinary differential equation
    rtol: Scalar
    atol: Scalar
    adjoint: dfx.AbstractAdjoint
    observe: dict[str, Callable[[Point], PyTree[Any]]]
    until: Until | None
    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    max_steps: int = eqx.field(static=True)
    has_tail: bool = eqx.field(static=True)  # is there a way to go after the last save?

    def legs(self, times: Array, end_time: Scalar) -> Array:
        """The times between which the solve goes: the saves and the end."""
        return jnp.append(times, end_time) if self.has_tail else times

    def stops_at(self, flow: AbstractFlow, point: Point) -> Flag:
        """True where the flow is to end at this point, before its time."""
        if self.until is None:
            return jnp.asarray(False)
        return stops_at(self.until, point, flow.drift)


def save_times_of(end_time: Any, num_saves: int, save_times: Any, dtype: Any) -> Array:
    if not is_traced(end_time):
        checked_positive("end_time", end_time)
    elif jnp.ndim(end_time):
        raise ValueError(f"end_time must be one number; got {end_time!r}.")
    if save_times is None:
        num_saves = checked_count("num_saves", num_saves)
        fractions = np.arange(num_saves + 1, dtype=dtype) / np.asarray(num_saves, dtype)
        if not is_traced(end_time):
            return jnp.asarray(fractions * np.asarray(end_time, dtype))
        end = jnp.asarray(end_time, dtype)
        return jnp.minimum(fractions * end, end)  # also where XLA rounds the product up
    wanted = jnp.asarray(real_numbers("save_times", save_times), dtype)
    if wanted.ndim != 1 or wanted.size == 0:
        raise ValueError(f"save_times must be a sequence of times; got shape {wanted.shape}.")
    times = jnp.concatenate([jnp.zeros(1, dtype), wanted])
    if not is_traced((save_times, end_time)):
        # In NumPy: inside jit JAX would make tracers even of constants.
        known = np.concatenate([np.zeros(1, dtype), np.asarray(save_times, dtype)])
        if np.any(np.diff(known) < 0) or known[-1] > np.asarray(end_time, dtype):
            raise ValueError(
                f"save_times must increase from 0 to at most end_time={end_time}; got {save_times}."
            )
    return times


def has_tail(save_times: Any, end_time: Any) -> bool:
    """True where there is, or may be, a way to go after the last save."""
    if save_times is None:
        return False
    if is_traced((save_times, end_time)):
        return True
    # Not compared in the point's precision, in which the end may be rounded.
    # A tail of rounding size would cost a whole leg.
    return float(np.max(np.asarray(save_times))) < float(end_time) * (1 - 1e-6)


def tolerance(name: str, value: Any, wide: float, narrow: float, dtype: Any) -> Scalar:
    if value is None:
        value = wide if _precision.is_double(dtype) else narrow
    elif not is_traced(value):
        checked_positive(name, value)
    return jnp.asarray(value, dtype)


def noise_options(
    flow: AbstractFlow,
    key: Key | None,
    solver: Any,
    step_size: Any,
    tolerances: tuple[Any, Any],
    num_saves: int,
    save_times: Any,
    end_time: Any,
) -> NoiseOptions | None:
    """The options of a stochastic flow; None for ordinary differential equations."""
    if not is_stochastic(flow):
        return None
    name = type(flow).__name__
    if key is None:
        raise ValueError(f"{name} is stochastic: solve needs key=jax.random.key(…).")
    is_adaptive = any(value is not None for value in tolerances)
    if step_size is not None and not is_traced(step_size):
        checked_positive("step_size", step_size)
    if is_adaptive and (solver is None or step_size is not None):
        raise ValueError(
            f"rtol and atol ask for adaptive steps of {name}: name a Diffrax solver that can "
            "choose them, as solver=diffrax.HalfSolver(diffrax.EulerHeun()), and no step_size."
        )
    if is_traced((save_times, step_size)) or (
        is_traced(end_time) and not (save_times is None and step_size is None)
    ):
        raise ValueError(
            f"{name} takes a number of steps that must be known when it is compiled: give "
            "end_time, save_times and step_size as concrete numbers, or leave save_times and "
            "step_size out for 1000 steps."
        )
    if save_times is None and step_size is None:
        # −(−a // b) rounds up: no step is longer than end_time/1000.
        return NoiseOptions(key, -(-1000 // num_saves), is_adaptive)
    end_time = float(end_time)
    longest = end_time / num_saves
    if save_times is not None:
        ends = [end_time] if has_tail(save_times, end_time) else []
        longest = float(np.max(np.diff([0.0, *np.asarray(save_times, float), *ends])))
    step_size = end_time / 1000 if step_size is None else float(step_size)
    if not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be positive and finite; got {step_size}.")
    # 2.1/0.3 is above 7 in floating point, and would be rounded up to 8 steps.
    num_steps = max(1, math.ceil(longest / step_size * (1 - 1e-6)))
    return NoiseOptions(key, num_steps, is_adaptive)


def solver_of(
    flow: AbstractFlow, solver: dfx.AbstractSolver | None, step_size: Any
) -> dfx.AbstractSolver:
    solver = dfx.Tsit5() if solver is None else solver
    if isinstance(solver, type) or not isinstance(solver, dfx.AbstractSolver):
        raise ValueError(f"solver must be a Diffrax solver, as diffrax.Tsit5(); got {solver!r}.")
    if step_size is not None and not is_traced(step_size):
        checked_positive("step_size", step_size, "Leave it out for adaptive steps.")
    if is_stochastic(flow):
        form_of(solver)  # raises for solvers of ordinary differential equations
    elif step_size is None and not isinstance(solver, dfx.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} estimates no error, so it cannot choose its own steps. "
            "Pass step_size=…, or wrap it in diffrax.HalfSolver."
        )
    return solver
