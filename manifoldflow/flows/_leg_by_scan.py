"""Stochastic flows by fixed steps in one scan: the cheapest way for ensembles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

from manifoldflow import _tree
from manifoldflow._results import RESULTS
from manifoldflow._types import Coordinates, Flag, Scalar
from manifoldflow.flows._base import AbstractDiffusion
from manifoldflow.flows._here import Here
from manifoldflow.flows._start import newton_corrected
from manifoldflow.flows._task import Task


def leg_by_scan(task: Task, here: Here, number: Any, end: Scalar) -> Here:
    """The state at `end`, by projected Euler-Maruyama in equal steps.

    The full Itô drift and a projection after every step: the projection alone would supply
    the normal part of the drift only up to an error of first order in the step. Step k of
    the whole path draws its noise from `fold_in(key, k)`, whatever the saves before it.
    """
    flow, remainder, options = task.flow, task.remainder, task.options
    assert options.noise is not None and isinstance(flow, AbstractDiffusion)
    key, num_steps, begin = options.noise.key, options.noise.num_steps, here.time
    size = (end - begin) / num_steps
    noise_structure = flow.diffusion(_tree.join(here.coordinates, remainder)).in_structure()

    # Else reverse mode would keep all that is inside of every step, and not its start alone.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def landed_step(coordinates: Coordinates, index: Array) -> tuple[Coordinates, Scalar, Flag]:
        point = _tree.join(coordinates, remainder)
        # By the number of the step, not by splitting along the way: a run that is resumed, or saved
        # more often, sees the same noise.
        drawn = _tree.random_normal_like(jr.fold_in(key, index), noise_structure)
        moved = _tree.add(coordinates, _tree.scale(size, flow.drift(point)))
        kick = flow.diffusion(point).mv(drawn)
        moved = _tree.add(moved, _tree.scale(jnp.sqrt(size), kick))
        landed, defect = newton_corrected(flow, moved, remainder)
        return landed, defect, _tree.all_finite(moved)

    def step(state: Here, index: Array) -> tuple[Here, None]:
        landed, defect, is_finite = landed_step(state.coordinates, index)
        # The defect is infinite where the way back to the manifold failed.
        result = _tree.where(jnp.isfinite(defect), RESULTS.successful, RESULTS.not_on_manifold)
        result = _tree.where(is_finite, result, RESULTS.nonfinite)
        is_fine = result == RESULTS.successful
        stops = options.stops_at(flow, _tree.join(landed, remainder))
        result = _tree.where(is_fine & stops, RESULTS.stopped_early, result)
        is_going, stats = state.is_going, state.stats
        largest = jnp.maximum(stats["max_defect"], defect)
        count = stats["num_steps"] + is_going
        share = (stats["num_steps"] + 1) / (num_steps * task.num_legs)
        return Here(
            _tree.where(is_going, landed, state.coordinates),
            _tree.where(is_going, state.time + size, state.time),
            _tree.where(is_going, result, state.result),
            state.step,
            {
                "num_steps": count,
                "num_rejected": stats["num_rejected"],
                "num_gradients": count,
                "num_factorizations": 2 * count * (flow.manifold is not None),
                "max_defect": _tree.where(is_going & is_fine, largest, stats["max_defect"]),
            },
            task.meter.step(state.meter, share),
        ), None

    indices = number * num_steps + jnp.arange(num_steps)
    moved, _ = jax.lax.scan(step, here, indices)
    # Whole legs end exactly on their save, whatever the sum of the steps is.
    time = _tree.where(moved.is_going, end, moved.time)
    return Here(moved.coordinates, time, moved.result, moved.step, moved.stats, moved.meter)
