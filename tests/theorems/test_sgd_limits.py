"""SGD goes where the theorems say: stationary covariances, label-noise and SAM limits."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close


def standard_errors(values, expected):
    """How many standard errors the mean of the values is off; one entry for each column."""
    error = np.std(values, axis=0) / np.sqrt(len(values))
    return np.abs(np.mean(values, axis=0) - expected) / error


def test_stationary_covariance_of_label_noise_on_a_linear_model():
    """S = ηc(2I − ηH)⁻¹P⊥, exactly at any η; what J does not see stays where it was."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    inputs = np.array([[1.0, 0, 0], [0, 0.7, 0]]) @ rotation.T
    loss = mf.LeastSquares(inputs, np.zeros(2), predict=jnp.dot, scale=1.0)
    noise, rate = mf.LabelNoise(0.3), 0.5

    def end(key):
        start = jnp.asarray(rotation[:, 2])
        run = {"learning_rate": rate, "num_steps": 80}
        return mf.simulate(loss, noise, optax.sgd, start, key=key, throw=False, **run).final

    ends = np.asarray(jax.jit(jax.vmap(end))(jr.split(jr.key(1), 4000))) @ rotation
    at_most("the null direction, seed 1", np.max(np.abs(ends[:, 2] - 1)), 1e-12)
    curvatures = np.array([1.0, 0.49])
    expected = np.diag(rate * 0.3**2 / (2 - rate * curvatures))
    products = ends[:, :2, None] * ends[:, None, :2]
    errors = standard_errors(products, expected)
    at_most("entries of the covariance in standard errors, seed 1", errors.max(), 4)
    slow = expected / np.array([2 - rate, 2 - rate * 0.49]) * 2  # the limit of small η
    at_least("and the limit of small η is rejected", standard_errors(products, slow).max(), 4)


# --- xy = 1 --------------------------------------------------------------------------------

PRODUCT = mf.LeastSquares(np.ones(1), np.ones(1), predict=lambda p, x: p[0] * p[1] * x)
START = jnp.array([2.0, 0.5])
CHARGE = 3.75  # u² − v² at the start
NOISE = mf.LabelNoise(0.7)
C = 0.49


def conserved(point):
    """q = u² − v², which gradient flow keeps: it is the same at a point and at its Φ.

    tr H = u² + v² on uv = 1, and −(c/4)P∇tr H makes q' = −cq.
    """
    return point[0] ** 2 - point[1] ** 2


def heavy_ball(rate):
    return optax.sgd(rate, momentum=0.5)


def nesterov(rate):
    return optax.sgd(rate, momentum=0.5, nesterov=True)


def charges(optimizer, seed, num_seeds, **options):
    """q at the end of many runs, and the standard error of its mean."""

    def end(key):
        run = {"key": key, "throw": False, **options}
        return conserved(mf.simulate(PRODUCT, NOISE, optimizer, START, **run).final)

    values = np.asarray(jax.jit(jax.vmap(end))(jr.split(jr.key(seed), num_seeds)))
    return np.mean(values), np.std(values) / np.sqrt(num_seeds)


@pytest.mark.parametrize("optimizer, beta", [(optax.sgd, None), (heavy_ball, 0.5), (nesterov, 0.5)])
def test_label_noise_sgd_follows_its_limit(optimizer, beta):
    rate = 0.05 if beta is None else 0.05 * (1 - beta)
    mean, error = charges(optimizer, 2, 1000, learning_rate=rate, end_time=1.0, momentum=beta)
    limit = CHARGE * np.exp(-C)
    # The bias is of first order in η: see the next test.
    at_most("mean of q, seed 2", abs(mean - limit), 4 * error + 0.13)
    at_least("a clock twice as fast is rejected", abs(mean - CHARGE * np.exp(-2 * C)), 0.5)


def test_a_finite_learning_rate_regularises_more():
    """(c/4) tr H becomes −(c/2η) tr ln(1 − ηH/2), so that q' = −cq/(1 − ηH/2)."""
    rate, end_time, num_steps = 0.1, 1.0, 10_000
    mean, error = charges(optax.sgd, 3, 4000, learning_rate=rate, end_time=end_time)
    refined = CHARGE
    for _ in range(num_steps):
        curvature = np.sqrt(refined**2 + 4)
        refined -= end_time / num_steps * C * refined / (1 - rate * curvature / 2)
    at_most("refined, seed 3", abs(mean - refined), 4 * error + 0.02)
    at_least("unlike the limit", abs(mean - CHARGE * np.exp(-C)), 0.1)


# --- sharpness-aware minimisation ----------------------------------------------------------

PAIRS = mf.LeastSquares(
    np.arange(2), np.ones(2), predict=lambda p, i: p["a"][i] * p["b"][i], scale=0.5
)
# A little off: Optax divides by the gradient's norm, which is zero on the manifold.
PAIR_START = {"a": jnp.array([2.01, 1.51]), "b": jnp.array([0.5, 1 / 1.5])}
RATE, RADIUS, NUM_STEPS = 0.0125, 0.04, 10000
ONE, ALL = mf.MinibatchNoise(1), mf.MinibatchNoise(2)


def optax_sam(rate):
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
    return optax.contrib.sam(optax.sgd(rate), climb, opaque_mode=True)


@pytest.mark.parametrize(
    "noise, optimizer, rates",
    [
        (ONE, optax_sam, [1, 1]),
        (mf.SAMGradient(ONE, RADIUS), optax.sgd, [1, 1]),
        (ALL, optax_sam, [1, 0]),
        (mf.SAMGradient(ALL, RADIUS), optax.sgd, [1, 0]),
    ],
)
def test_sam_follows_its_limit(noise, optimizer, rates):
    """−½P∇tr H for one example at a time, −½P∇λ_max for whole batches, on kηρ².

    H has the blocks ½(aᵢ² + bᵢ²), so that qᵢ = aᵢ² − bᵢ² falls as e^{−t}; under λ_max only
    the first one, which is the largest, does.
    """
    run = {"learning_rate": RATE, "num_steps": NUM_STEPS, "key": jr.key(0)}
    walk = mf.simulate(PAIRS, noise, optimizer, PAIR_START, **run)
    end_time = float(walk.times[-1]) * RADIUS**2 / RATE
    start, end = (point["a"] ** 2 - point["b"] ** 2 for point in (PAIR_START, walk.final))
    expected = start * np.exp(-end_time * np.array(rates))
    close(f"q at time {end_time}: {end}, {expected}", end, expected, 0.02)
    at_least("the limit has moved", np.max(start - expected), 0.5)


# --- the k-phase motor ---------------------------------------------------------------------


def test_sgd_turns_the_motor():
    """At the angular speed (D−2)/8 of the limit, within 4 standard errors and the O(η) bias."""
    motor, rate, end_time = mf.models.KPhaseMotor(3), 0.05, 2.0

    def speed(key):
        run = {"learning_rate": rate, "end_time": end_time, "num_saves": 20, "throw": False}
        walk = mf.simulate(motor.loss, motor.noise, optax.sgd, motor.point(0.0), key=key, **run)
        angles = jnp.unwrap(jnp.arctan2(walk.points[:, 1], walk.points[:, 0]))
        return (angles[-1] - angles[10]) / (end_time / 2)

    speeds = np.asarray(jax.jit(jax.vmap(speed))(jr.split(jr.key(4), 1000)))
    error = np.std(speeds) / np.sqrt(len(speeds))
    gap = abs(np.mean(speeds) - motor.angular_speed)
    # 0.03 is the bias measured at twice this rate.
    at_most(f"angular speed {np.mean(speeds):.4f} ± {error:.4f}, seed 4", gap, 4 * error + 0.03)
    at_least("it turns anticlockwise", np.mean(speeds) / error, 10)
