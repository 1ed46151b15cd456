"""Adam and AdamW on f = x y for second moments from much slower to faster than the descent.

1 − β₂ = bη with b from 0.1 to 30, by the update's own transform at η = 0.008 and 0.004, against
the closed curves: extrapolated to η → 0 they agree, with and without a first moment.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close
from manifoldflow import theory, updates
from quick import long_jit

START, TIME, STD, RATE, SEEDS = 0.9, 0.512, 0.8, 0.008, 400
LAGS = np.array([0.1, 0.4, 1.5, 6.0, 30.0])


@functools.partial(long_jit, static_argnames="b1")
def trained(b1, decay, rate, num_steps, key):
    """Mean of s over the seeds at the end, and its standard error, for every lag."""

    def of_lag(lag):
        transform = updates.Adam(b1, averaging=lag, weight_decay=decay).transform(rate)
        points = jnp.tile(jnp.exp(START * jnp.array([1.0, -1.0])), (SEEDS, 1))

        def step(k, carry):
            points, state = carry
            bits = jr.bits(jr.fold_in(key, k), (SEEDS,), jnp.uint8)
            noise = STD * (2.0 * (bits % 2) - 1)
            errors = points[:, 0] * points[:, 1] - 1 - noise
            change, state = transform.update(errors[:, None] * points[:, ::-1], state, points)
            return points + change, state

        ends = jax.lax.fori_loop(0, num_steps, step, (points, transform.init(points)))[0]
        # The way back to the valley leaves (x − y)/2 = sinh s as it is.
        s = jnp.arcsinh((ends[:, 0] - ends[:, 1]) / 2)
        return jnp.mean(s), jnp.std(s) / SEEDS**0.5

    return jax.vmap(of_lag)(jnp.asarray(LAGS))


@functools.cache
def extrapolated(b1, decay):
    """2 E(η/2) − E(η), E(η/2), and the standard error of the former."""
    key = jr.key(0, impl="unsafe_rbg")  # draws in a third of the time
    (coarse, first), (fine, second) = (
        map(np.asarray, trained(b1, decay, rate, round(TIME / rate**2), key))
        for rate in (RATE, RATE / 2)
    )
    return 2 * fine - coarse, fine, np.hypot(first, 2 * second)


@functools.cache
def predicted(decay):
    return np.array([
        float(theory.scalar_factorization_adam(
            START, TIME, averaging_rate=b, label_std=STD, weight_decay=decay
        )) for b in LAGS
    ])  # fmt: skip


@pytest.mark.parametrize("b1, decay", [(0.0, 0.0), (0.5, 0.0), (0.5, 0.4)])
def test_lags_over_two_decades(b1, decay):
    found, _, error = extrapolated(b1, decay)
    expected = predicted(decay)
    what = f"β₁ = {b1}, decay {decay}: {found} ± {error}, expected {expected}"
    at_most("largest standard error", np.max(error), 1e-3)
    at_most(what, np.max(np.abs(found - expected)), 3e-3)
    at_least("no lag is rejected", np.max(np.abs(found - predicted(decay)[0])), 0.1)
    at_least("no decay is rejected", np.abs(found - predicted(0.4 - decay))[0], 0.08)


def test_a_first_moment_that_outlives_the_second():
    """β₁ is not in the limit; at finite η that takes bη ≪ 1 − β₁, here 0.12 and 0.1 for b = 30."""
    _, fine, error = extrapolated(0.9, 0.0)
    gaps = np.abs(fine - predicted(0.0))
    at_most(f"b up to 1.5: {fine} ± {error}", np.max(gaps[:3]), 8e-3)
    at_least("b = 30", gaps[-1], 0.04)


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_the_flow_has_these_ends(decay):
    loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda p, x: p[0] * p[1] * x, scale=1)
    manifold, point = mf.ZeroLossManifold(loss), jnp.exp(START * jnp.array([1.0, -1.0]))

    @jax.jit
    @jax.vmap
    def end(lag):
        update = updates.Adam(averaging=lag, weight_decay=decay)
        flow = mf.LimitDiffusion(manifold, mf.LabelNoise(STD), update)
        return mf.solve(flow, point, end_time=TIME, rtol=1e-8).final

    close("s", jnp.log(end(jnp.asarray(LAGS))[:, 0]), predicted(decay), 1e-6)
