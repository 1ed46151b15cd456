"""Runs of SGD at the rates η and η/2, and what is left of their error at first order."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from checks import at_most
from quick import long_jit


def at_rates(fn, rates, num_runs, seed, *others):
    """fn(rate, …, key) for all rates and keys in one program, (rates, runs, …)."""
    over_rates, over_keys = [0] * (1 + len(others)) + [None], [None] * (1 + len(others)) + [0]
    many = long_jit(jax.vmap(jax.vmap(fn, over_keys), over_rates))
    keys = jr.split(jr.key(seed), num_runs)
    return jax.tree.map(np.asarray, many(jnp.asarray(rates), *others, keys))


def extrapolated(values):
    """The mean at η → 0 from runs at η and η/2, (2, runs, …), and its standard error."""
    means, errors = values.mean(axis=1), values.std(axis=1) / np.sqrt(values.shape[1])
    return 2 * means[1] - means[0], np.hypot(2 * errors[1], errors[0])


def agrees(what, values, expected, seed):
    """Every extrapolated mean is within four standard errors; returns these."""
    mean, error = extrapolated(values)
    worst = np.max(np.abs(mean - expected) / error)
    told = f"{what}: {mean} ± {error} for {expected}, in standard errors, seed {seed}"
    at_most(told, worst, 4)
    return error
