"""Stochastic flows by fixed steps in one scan: the cheapest way for ensembles."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from manifoldflow import _tree
from manifoldflow._solution import or_nan, RESULTS, Solution
from manifoldflow._types import Coordinates, Scalar
from manifoldflow.flows._base import AbstractDiffusion, AbstractFlow
from manifoldflow.flows._landing import Start, touched_up
from manifoldflow.flows._options import Options


class _State(eqx.Module):
    coordinates: Coordinates
    time: Scalar
    result: RESULTS
    num_steps: Int[Array, ""]
    max_defect: Scalar
    meter: PyTree[Any]


@eqx.filter_jit
def walk(
    flow: AbstractFlow,
    begin: Start,
    times: Float[Array, " saves"],
    end_time: Scalar,
    first_save: Int[Array, ""],
    options: Options,
) -> Solution:
    """Projected Euler-Maruyama with equal steps between any two saves.

    The full Itô drift and a projection after every step: the projection alone would supply
    the normal part of the drift only up to an error of first order in the step. Step k of
    the whole path draws its noise from `fold_in(key, k)`, whatever the saves before it.
    """
    assert options.noise is not None and isinstance(flow, AbstractDiffusion)
    key, num_steps = options.noise.key, options.noise.num_steps
    legs = options.noise.legs(times, end_time)
    start, remainder = flow.split(begin.point)
    noise_structure = flow.diffusion(begin.point).in_structure()

    def save(t: Scalar, y: Coordinates) -> tuple[Coordinates, dict[str, PyTree[Array]]]:
        saved = y, options.observed(_tree.join(y, remainder))
        for report in options.reports:
            jax.debug.callback(report, t, *saved)
        return saved

    def step(state: _State, inputs: tuple[Array, Scalar]) -> tuple[_State, None]:
        index, size = inputs
        here = _tree.join(state.coordinates, remainder)
        drawn = _tree.random_normal_like(jr.fold_in(key, index), noise_structure)
        moved = _tree.add(state.coordinates, _tree.scale(size, flow.drift(here)))
        kick = flow.diffusion(here).mv(drawn)
        moved = _tree.add(moved, _tree.scale(jnp.sqrt(size), kick))
        landed, defect = touched_up(flow, moved, remainder)
        result = RESULTS.where(jnp.isfinite(defect), RESULTS.successful, RESULTS.not_on_manifold)
        result = RESULTS.where(_tree.all_finite(moved), result, RESULTS.nonfinite)
        is_fine = result == RESULTS.successful
        stops = options.stops_at(flow, _tree.join(landed, remainder))
        result = RESULTS.where(is_fine & stops, RESULTS.stopped_early, result)
        is_going = state.result == RESULTS.successful
        return _State(
            _tree.where(is_going, landed, state.coordinates),
            jnp.where(is_going, state.time + size, state.time),
            RESULTS.where(is_going, result, state.result),
            state.num_steps + is_going,
            jnp.where(is_going & is_fine, jnp.maximum(state.max_defect, defect), state.max_defect),
            options.meter.step(state.meter, (state.num_steps + 1) / (num_steps * len(legs[1:]))),
        ), None

    def leg(state: _State, inputs: tuple[Array, Scalar, Scalar]) -> tuple[_State, Any]:
        number, begin, end = inputs
        indices = number * num_steps + jnp.arange(num_steps)
        sizes = jnp.full(num_steps, (end - begin) / num_steps)
        state, _ = jax.lax.scan(step, state, (indices, sizes))
        # Whole legs end exactly on their save, whatever the sum of the steps is.
        is_whole = state.result == RESULTS.successful
        state = eqx.tree_at(lambda s: s.time, state, jnp.where(is_whole, end, state.time))
        lost = ~is_whole & (state.result != RESULTS.stopped_early)
        return state, (state.time, save(state.time, or_nan(state.coordinates, ~lost)))

    dtype = _tree.dtype_of(start)
    state = _State(
        start,
        times[0],
        begin.result,
        jnp.asarray(0),
        jnp.zeros((), dtype),
        options.meter.init(),
    )
    first = save(times[0], start)
    numbers = first_save + jnp.arange(len(legs) - 1)
    state, (ended, rest) = jax.lax.scan(leg, state, (numbers, legs[:-1], legs[1:]))
    options.meter.close(state.meter)
    # After the last save there may be a way to go, but nothing to be kept.
    num_rest = len(times) - 1
    points, observables = jax.tree.map(
        lambda x, y: jnp.concatenate([x[None], y[:num_rest]]), first, rest
    )
    is_early = state.result == RESULTS.stopped_early
    is_fine = is_early | (state.result == RESULTS.successful)
    final = or_nan(state.coordinates, is_fine)
    return Solution(
        times=jnp.concatenate([times[:1], jnp.where(is_early, ended[:num_rest], times[1:])]),
        points=points,
        observables=observables,
        stats={
            "num_steps": state.num_steps,
            "num_rejected": jnp.zeros_like(state.num_steps),
            "num_gradients": state.num_steps,
            "num_factorizations": 2 * state.num_steps * (flow.manifold is not None),
            "max_defect": state.max_defect,
        },
        result=state.result,
        final_coordinates=final,
        remainder=remainder,
    )
