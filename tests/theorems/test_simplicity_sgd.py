"""Simplicity bias by SGD itself: from any start off Γ to the flattest fit [Gatmiry2024, Theorem 1].

SGD with label noise, and 1-SAM, both from starts with a loss, for as many steps as `theory` says
that the bounds of Theorem 3 take: first 1/η times the time of gradient flow to Γ = {L = 0}, then
the time of θ' = −P∇F, which goes δ²η² a step with label noise of variance δ² and ηρ² a step with
1-SAM of radius ρ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import theory
from quick import long_jit

INPUTS = np.array([[1.0, 0.0, 0.0], [0.2, 0.96**0.5, 0.0]])
MU = theory.coherence(INPUTS)
WIDTH = 2
NET = mf.models.TwoLayerNet(INPUTS, [0.2, -0.3], WIDTH)  # z³ + z: ϱ₁ = 1, ϱ₂ = 6, β = 16/3
BETA = 16 / 3
ASSUMED = {"coherence": MU, "slope": 1.0}
SHARP = {**ASSUMED, "normality": BETA, "third_derivative": 6.0}
FLATTEST = NET.minimizer()
LEAST = float(NET.flatness(jnp.asarray(FLATTEST) @ jnp.linalg.pinv(NET.inputs).T))
ACCURACY = 0.4
NUM_SEEDS = 100
RATE, VARIANCE = 0.05, 0.008
SAM_RATE, RADIUS = 0.01, 0.1
NUM_SAVES = round(1 / RATE)  # one save after as many steps as the clock kη would ask for


def largest_error(theta):
    return jnp.max(jnp.abs(NET.features(theta) - FLATTEST))


OBSERVED = {"loss": NET.loss, "trace": NET.loss.trace_hessian, "error": largest_error}


class Starts(NamedTuple):
    """Random weights with a loss, and the fits where gradient flow takes them."""

    points: jax.Array
    landed: jax.Array
    loss: np.ndarray
    flatness: np.ndarray  # where they land
    time: float  # of the flow of F until all features are within ε, at most
    landing: float  # of gradient flow until L ≤ 10⁻³, at most


@pytest.fixture(scope="module")
def starts():
    points = jax.vmap(lambda key: NET.initial(key, 0.6))(jr.split(jr.key(0), NUM_SEEDS))
    landed = jax.jit(jax.vmap(lambda point: mf.limit_map(NET.loss, point, throw=False)))(points)
    assert bool(jnp.all(jnp.isfinite(landed)))
    loss, flatness = np.asarray(jax.vmap(NET.loss)(points)), jax.vmap(NET.flatness)(landed)
    flatness = np.asarray(flatness)
    time = theory.simplicity_time_bound(
        flatness.max(), ACCURACY, **SHARP, least_flatness=LEAST, halved=True
    )
    landing = theory.landing_time_bound(loss.max(), 1e-3, width=WIDTH, **ASSUMED)
    return Starts(points, landed, loss, flatness, time, landing)


def fraction(found):
    """Of the runs with L ≤ ε, tr ∇²L ≤ inf + ε and all features within ε; its standard error.

    With two more of either kind: else there were no error where all runs agree.
    """
    is_there = (found["loss"] <= ACCURACY) & (found["trace"] <= 2 * LEAST + ACCURACY)
    is_there &= found["error"] <= ACCURACY
    likely = (np.sum(is_there) + 2) / (is_there.size + 4)
    return np.mean(is_there), np.sqrt(likely * (1 - likely) / (is_there.size + 4))


def runs(starts, noise, update, rate, num_steps):
    """One run from each start, each with its own key: what is seen at all saves."""

    def run(point, key):
        return mf.simulate(
            NET.loss, noise, update, point, learning_rate=rate, num_steps=num_steps, key=key,
            num_saves=NUM_SAVES, observe=OBSERVED, throw=False,
        )  # fmt: skip

    found = long_jit(jax.vmap(run))(starts.points, jr.split(jr.key(1), NUM_SEEDS))
    assert np.all(np.asarray(found.stats["diverged_at"]) < 0)
    return {name: np.asarray(values) for name, values in found.observables.items()}


def at_save(found, save):
    return {name: values[:, save] for name, values in found.items()}


def holds(what, found):
    """With probability at least 1 − ε, by four standard errors."""
    share, error = fraction(found)
    at_least(f"{what}: of {NUM_SEEDS} runs {share} ± {error:.3f}", share - 4 * error, 1 - ACCURACY)


def fails(what, found):
    share, error = fraction(found)
    at_most(f"{what}: of {NUM_SEEDS} runs {share} ± {error:.3f}", share + 4 * error, 1 - ACCURACY)


# --- Theorem 1 --------------------------------------------------------------------------------


def test_sgd_gets_from_any_start_to_the_flattest_fit(starts):
    """L ≤ ε, tr ∇²L ≤ inf + ε, |θⱼᵀxᵢ − φ⁻¹(yᵢ/m)| ≤ ε, all with probability ≥ 1 − ε.

    Of the three the trace is the last to arrive: it feels the fluctuations of the loss.
    Neither gradient flow is enough, nor as many steps on its clock, t/(δ²η) for t/(δ²η²).
    """
    at_least("losses at the start, median", np.median(starts.loss), ACCURACY)
    at_least("F where they land over its least, median", np.median(starts.flatness) / LEAST, 1.2)
    num_steps = theory.label_noise_num_steps(
        starts.time, learning_rate=RATE, label_variance=VARIANCE, landing_time=starts.landing
    )
    noise = mf.LabelNoise(VARIANCE**0.5)
    found = runs(starts, noise, mf.updates.SGD(), RATE, num_steps)
    holds(f"SGD after {num_steps} steps", at_save(found, -1))
    at_most("the largest of all errors", np.max(found["error"][:, -1]), ACCURACY / 4)
    fails("gradient flow", {name: jax.vmap(fn)(starts.landed) for name, fn in OBSERVED.items()})
    at_most("by the clock kη it has landed: loss, median", np.median(found["loss"][:, 1]), 0.01)
    fails("SGD by the clock kη", at_save(found, 1))


def test_sharpness_aware_minimisation_gets_there_too(starts):
    """1-SAM, with one example in a batch and no noise on the labels, on the clock kηρ²."""
    num_steps = theory.sharpness_aware_num_steps(
        starts.time, learning_rate=SAM_RATE, radius=RADIUS, landing_time=starts.landing
    )
    noise, update = mf.MinibatchNoise(1), mf.updates.SAM(RADIUS)
    found = runs(starts, noise, update, SAM_RATE, num_steps)
    holds(f"1-SAM after {num_steps} steps", at_save(found, -1))
    at_most("the largest of all errors", np.max(found["error"][:, -1]), ACCURACY / 8)


# --- The clocks -------------------------------------------------------------------------------


def spread(theta):
    """How far the two neurons are apart on either example, with its sign."""
    z = NET.features(theta)
    return z[0] - z[1]


def test_the_clock_of_sgd_is_that_of_the_flow():
    """Means over SGD from one start with a loss, extrapolated to η → 0, meet the flow from Φ.

    As many steps as `label_noise_num_steps` says; with another factor of 2 they would not.
    """
    start, time, variance, slow = jnp.array([[0.9, 0.1, 0.3], [-0.5, 0.6, 0.0]]), 0.06, 0.02, 0.02
    num_steps = theory.label_noise_num_steps(time, learning_rate=slow, label_variance=variance)

    @long_jit
    def means(rate):
        def run(key):
            found = mf.simulate(
                NET.loss, mf.LabelNoise(variance**0.5), optax.sgd, start, learning_rate=rate,
                num_steps=num_steps, num_saves=4, observe={"spread": spread}, key=key,
            )  # fmt: skip
            return found.observables["spread"]

        return jax.vmap(run)(jr.split(jr.key(3), NUM_SEEDS))

    # Twice the learning rate: a quarter of the steps.
    fine, coarse = np.asarray(means(slow))[:, 4], np.asarray(means(2 * slow))[:, 1]
    found = 2 * fine.mean(0) - coarse.mean(0)
    error = np.sqrt((4 * fine.var(0, ddof=1) + coarse.var(0, ddof=1)) / NUM_SEEDS)
    flow = mf.RiemannianGradientFlow(NET.manifold, NET.flatness)
    landed = mf.limit_map(NET.loss, start)
    walk = mf.solve(flow, landed, end_time=2 * time, num_saves=4, observe={"spread": spread})
    early, there, late = np.asarray(walk.observables["spread"])[[1, 2, 4]]
    # What the extrapolation leaves is of second order in the step from coarse to fine.
    bias = np.max(np.abs(fine.mean(0) - coarse.mean(0))) / 2
    at_most(f"{found} − {there}", np.max(np.abs(found - there) - 4 * error), bias)
    for wrong in (early, late):
        gap = np.max(np.abs(found - wrong) - 4 * error)
        at_least(f"at half or twice the time, {wrong}", gap, 2 * bias)


# --- Landing ----------------------------------------------------------------------------------


def test_where_gradient_flow_lands(starts):
    """‖Φ − θ‖ ≤ 2√(L/C) [(32)] and F(Φ) ≤ Σφ'² + Σᵢ maxⱼ(…) [Lemma 11], from every start."""
    farthest = [theory.landing_distance_bound(x, width=WIDTH, **ASSUMED) for x in starts.loss]
    moved = np.linalg.norm(starts.landed - starts.points, axis=(1, 2))
    at_most("distance over its bound", np.max(moved / farthest), 1.0)
    at_least("it is not idle", np.max(moved / farthest), 0.3)
    features = np.asarray(jax.vmap(NET.features)(starts.points[:12]))
    bounds = [
        theory.landed_flatness_bound(z, loss, NET.activation, **ASSUMED)
        for z, loss in zip(features, starts.loss)
    ]
    at_most("F over its bound", np.max(starts.flatness[:12] / bounds), 1.0)
    at_least("it is not idle", np.max(starts.flatness[:12] / bounds), 0.3)


def test_the_bounds_by_hand():
    """C = 4mμϱ₁² = 4·3·½·2² = 24; √m R = √3·2√(6/24)."""
    like = {"coherence": 0.5, "slope": 2.0}
    close("time", theory.landing_time_bound(6.0, 0.1, width=3, **like), np.log(60) / 24, 1e-12)
    assert theory.landing_time_bound(0.1, 0.1, width=3, **like) == 0.0
    assert theory.landing_time_bound(0.0, 0.1, width=3, **like) == 0.0
    distance = theory.landing_distance_bound(6.0, 0.2, width=3, **like)
    close("distance", distance, np.exp(-2.4), 1e-12)
    z = np.array([[0.0, 0.5], [1.0, -0.5], [-2.0, 0.1]])
    squares = lambda z: (3 * z**2 + 2) ** 2
    bound = theory.landed_flatness_bound(z, 6.0, lambda z: z**3 + 2 * z, **like)
    rise = squares(np.array([2.0, 0.5]) + 3**0.5) - squares(np.array([2.0, 0.5]))
    close("flatness", bound, np.sum(squares(z)) + np.sum(rise), 1e-12)
    sharp = {**like, "normality": 3.0, "third_derivative": 6.0}
    time = theory.stationarity_time_bound(5.0, 0.1, **sharp)
    close("(16)", time, 5 / 4.5 + np.log(4.5 / 0.01) / 6, 1e-12)
    time = theory.stationarity_time_bound(5.0, 0.1, **sharp, least_flatness=2.0, halved=True)
    close("what holds", time, 3 / 4.5 + np.log(4.5 / 0.01) / 12, 1e-12)
    close("coarse", theory.stationarity_time_bound(5.0, 9.0, **sharp), 5 / 4.5, 1e-12)


def test_numbers_of_steps_by_hand():
    steps = {"learning_rate": 0.1, "landing_time": 0.25}
    assert theory.label_noise_num_steps(0.5, label_variance=0.01, **steps) == 3 + 5000
    half = theory.label_noise_num_steps(0.5, label_variance=0.01, batch_fraction=0.5, **steps)
    assert half == 3 + 2500
    assert theory.sharpness_aware_num_steps(0.5, radius=0.2, **steps) == 3 + 125
    with refused(ValueError, "expected B/N, at most 1"):
        theory.label_noise_num_steps(0.5, label_variance=0.01, batch_fraction=2, **steps)
    with refused(ValueError, "the number of steps is infinite"):
        theory.label_noise_num_steps(0.5, label_variance=1e-300, learning_rate=1e-100)
    with refused(ValueError, "square is in the range of floats"):
        theory.landing_time_bound(1.0, 0.1, width=2, coherence=1.0, slope=1e-200)
    with refused(ValueError, "at most the flatness at the start"):
        theory.simplicity_time_bound(1.0, 0.1, **SHARP, least_flatness=2.0)


def test_the_batch_fraction_is_that_of_the_drift():
    """The limit of SGD with batches of B of N goes N/B times as fast: c = 2δ²N/B."""
    point = NET.manifold.project(jnp.array([[0.9, 0.1, 0.3], [-0.5, 0.6, 0.0]]))
    downhill = mf.riemannian_gradient(NET.manifold, NET.flatness, point)
    for size in (1, 2):
        drift = mf.LimitDiffusion(NET.manifold, mf.LabelNoise(0.3, size)).drift(point)
        steps = theory.label_noise_num_steps(
            1.0, learning_rate=1e-3, label_variance=0.09, batch_fraction=size / 2
        )
        close(f"batches of {size}", steps * 1e-6 * drift, -downhill, 1e-6)
