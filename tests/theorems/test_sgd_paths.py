"""The paths of SGD converge in law, not only its points [LiWangArora2022, Theorem B.9].

Exit times of a compact set and running maxima, against their closed laws, from a start off the
manifold.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax

import manifoldflow as mf
from checks import at_least, at_most, close, in_window
from circle_noise import (
    angle,
    DRIFT,
    exit_law,
    kolmogorov_distance,
    LOSS,
    maximum_law,
    mean_of,
    NOISE,
    OFF,
    radial_flow,
    RADIUS,
    VARIANCE,
)
from richardson import agrees, at_rates

RATES, NUM_RUNS, SEED = np.array([0.1, 0.05]), 3000, 1
END_TIME, NUM_STEPS = 1.0, (100, 400)
LEFT, RIGHT, LAST = 1.0, 0.4, 2.0
# P(√n D > 2.28) = 6·10⁻⁵ for the distance D of n values from their law, as for 4 standard errors.
NOISY = 2.28 / np.sqrt(NUM_RUNS)


def simulated(rate, key, num_steps, **options):
    return mf.simulate(
        LOSS, NOISE, optax.sgd, OFF, learning_rate=rate, num_steps=num_steps, key=key, throw=False,
        **options,
    )  # fmt: skip


def test_the_oracle_is_the_limit():
    """The drift of the angle and its variance, from `LimitDiffusion`; Φ from gradient flow."""
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(LOSS), NOISE)
    here, tangent = jnp.array([0.6, 0.8]), jnp.array([-0.8, 0.6])
    close("drift of the angle", flow.drift(here) @ tangent, DRIFT, 1e-10)
    close("it is the mixed part", flow.mixed_regularisation(here) @ tangent, DRIFT, 1e-10)
    noise = flow.diffusion(here).T.mv(tangent)
    close("variance of the angle", noise @ noise, VARIANCE, 1e-12)
    close("Φ", mf.limit_map(LOSS, RADIUS * here), here, 1e-6)


# --- exit times ----------------------------------------------------------------------------


def is_out(x):
    """Whether x has left the compact set {½ ≤ |x| ≤ 2, −1 ≤ angle ≤ 0.4}."""
    radius = jnp.linalg.norm(x)
    return (angle(x) > RIGHT) | (angle(x) < -LEFT) | (radius < 0.5) | (radius > 2)


def test_exit_times_converge_in_law():
    """Their distribution at two rates, and the mean of the exit time capped at T."""
    num_steps = round(LAST / RATES[1] ** 2)

    def exit_time(rate, key):
        return simulated(rate, key, num_steps, until=is_out).times[-1]

    times = at_rates(exit_time, RATES, NUM_RUNS, SEED)
    law = functools.partial(exit_law, left=LEFT, right=RIGHT)
    without_drift = functools.partial(law, drift=1e-9)
    for rate, found in zip(RATES, times):
        bound = NOISY + rate / 2
        at_most(
            f"distance in law at η = {rate}, seed {SEED}",
            kolmogorov_distance(found, law, LAST),
            bound,
        )
        wrong = kolmogorov_distance(found, without_drift, LAST)
        at_least(f"without the mixed part, η = {rate}, seed {SEED}", wrong, 1.3 * bound)
    agrees("mean exit time", np.minimum(times, LAST), mean_of(law, LAST), SEED)


# --- running maxima, with the fast phase taken off -----------------------------------------


@functools.cache
def paths():
    """X and Y = X − φ(X₀, Aₙ) + Φ(X₀), at both rates up to t = 1, (runs, steps + 1, 2)."""
    walk = lambda rate, key: simulated(rate, key, NUM_STEPS[1], num_saves=NUM_STEPS[1]).points
    points = at_rates(walk, RATES, NUM_RUNS, SEED)
    found = []
    for rate, count, x in zip(RATES, NUM_STEPS, points):
        x = x[:, : count + 1]
        fast = radial_flow(RADIUS, rate * np.arange(count + 1)) - 1
        found.append((x, x - np.stack([fast, 0 * fast], axis=1)))
    return found


def test_running_maxima_converge_in_law():
    highest = np.stack([np.unwrap(angle(y)).max(axis=1) for _, y in paths()])
    law = functools.partial(maximum_law, time=END_TIME)
    without_drift = functools.partial(law, drift=1e-9)
    for rate, found in zip(RATES, highest):
        distance, bound = kolmogorov_distance(found, law), NOISY + rate / 2
        at_most(f"distance in law at η = {rate}, seed {SEED}", distance, bound)
        wrong = kolmogorov_distance(found, without_drift)
        at_least(f"without the mixed part, η = {rate}, seed {SEED}", wrong, 1.3 * bound)
    agrees("mean of the running maximum", highest, mean_of(law, 3.0), SEED)


def test_paths_converge_from_the_start():
    """Y comes near the circle at all times alike, as √η with logarithms; X does not at t = 0."""

    def falls(what, distances):
        (x, y), (x_half, y_half) = ([np.mean(found) for found in both] for both in distances)
        at_least(f"{what}: X at either rate, seed {SEED}", min(x, x_half), RADIUS - 1)
        in_window(f"{what}: Y at half the rate over Y, seed {SEED}", y_half / y, 0.65, 0.88)

    off = lambda x: np.abs(np.linalg.norm(x, axis=-1) - 1).max(axis=1)
    falls("farthest from the circle", [map(off, both) for both in paths()])
    early = [
        [np.linalg.norm(x[:, : round(2 / rate)] - [1, 0], axis=-1).max(axis=1) for x in both]
        for rate, both in zip(RATES, paths())
    ]
    falls("farthest from Φ(X₀) in the first 2/η steps", early)


def test_it_starts_from_phi_of_the_start():
    """Y(0) = Φ(x(0)); Theorem 4.6 has x(0), where the limit would keep its distance for ever."""
    radii = np.stack([np.linalg.norm(x[:, -1], axis=-1) for x, _ in paths()])
    error = agrees("radius at the end", radii, 1.0, SEED)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(LOSS), NOISE)
    drift, kick = flow.drift(OFF), flow.diffusion(OFF).as_matrix()
    # d|x|² = 2x·dx + |σ|²dt: nothing leads back from there.
    growth = 2 * OFF @ drift + jnp.sum(kick**2)
    at_most("change of |Y|² if it starts from x(0)", abs(growth), 1e-9 * jnp.sum(kick**2))
    at_most("and its noise", jnp.max(jnp.abs(OFF @ kick)), 1e-9 * float(jnp.max(jnp.abs(kick))))
    at_least("the radius it would keep, in standard errors", (RADIUS - 1) / error, 20)
    angles = np.stack([angle(x[:, -1]) for x, _ in paths()])
    agrees("angle at the end", angles, DRIFT * END_TIME, SEED)
