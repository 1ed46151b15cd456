"""Label-noise SGD on a two-layer network meets its limit at first order in the learning rate.

The observable is tr∇²L∘Φ at the limit time 1 [LiWangArora2022, Theorem 4.6]. Φ takes away the
fluctuations around the manifold, so that some hundred runs show the bias.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most
from quick import long_jit

RATES = np.array([0.1, 0.05, 0.025, 0.0125])
END_TIME, NUM_RUNS, SEED = 1.0, 500, 1
STEPS = 100  # to the end at the largest rate


def two_layer(weights, x):
    """Three neurons with activation z + z³/3."""
    return jnp.sum((lambda z: z + z**3 / 3)(weights @ x))


LOSS = mf.LeastSquares(
    np.array([[0.8, 0.6], [-0.5, 0.85]]), np.array([1.5, -1.0]), predict=two_layer, scale=0.5
)
NOISE = mf.LabelNoise(1.0)


def sharpness_after_landing(point):
    return LOSS.trace_gauss_newton(mf.limit_map(LOSS, point, throw=False))


@long_jit
def ends(start, rate, num_parts, keys):
    """Of SGD in so many parts of `STEPS` steps, for every key: one program for all rates."""

    def run(key, start, rate, num_parts):
        def part(number, point):
            walk = mf.simulate(
                LOSS, NOISE, optax.sgd, point, learning_rate=rate, num_steps=STEPS,
                key=jr.fold_in(key, number), throw=False,
            )  # fmt: skip
            return walk.final

        return jax.lax.fori_loop(0, num_parts, part, start)

    return mf.ensemble(run, keys, start, rate, num_parts)


@pytest.fixture(scope="module")
def errors():
    """The weak error at every rate, with its standard error."""
    manifold = mf.ZeroLossManifold(LOSS)
    start = manifold.project(jnp.array([[1.2, 0.2], [-0.8, 0.5], [0.3, -0.9]]))
    flow = mf.LimitDiffusion(manifold, NOISE)
    limit = mf.solve(flow, start, end_time=END_TIME)
    reference = LOSS.trace_gauss_newton(limit.final)
    landed = jax.jit(jax.vmap(sharpness_after_landing))
    keys = mf.member_keys(jr.key(SEED), NUM_RUNS)
    found = []
    for rate in RATES:
        num_parts = mf.LimitClock().num_steps(rate, END_TIME) // STEPS
        found.append(mf.ensembles.weak_error(landed(ends(start, rate, num_parts, keys)), reference))
    assert sum(int(error.num_failed) for error in found) == 0
    return np.array([(error.error, error.standard_error) for error in found])


def test_the_weak_error_falls_with_the_learning_rate(errors):
    """Over three halvings with slope 1 (at least 0.8 is promised), each error being seen."""
    order = mf.ensembles.weak_order(RATES, errors[:, 0], errors[:, 1])
    at_least(f"errors in standard errors, seed {SEED}", np.min(-errors[:, 0] / errors[:, 1]), 10)
    at_least("weak order", order.value, 0.8)
    at_most("|weak order − 1|", abs(order.value - 1), 0.2)
    at_most("its standard error", order.standard_error, 0.05)


def test_richardson_extrapolation_meets_the_limit(errors):
    """The errors at η → 0, with the terms of first and second order taken out."""
    left = mf.ensembles.extrapolate(RATES, errors[:, 0], errors[:, 1], num_terms=2)
    miss = abs(float(left.value)) / float(left.standard_error)
    at_most(f"what is left, {left.value:.1e}, in standard errors, seed {SEED}", miss, 4)
    at_most(
        "its standard error against the smallest error",
        left.standard_error,
        0.1 * abs(errors[-1, 0]),
    )
