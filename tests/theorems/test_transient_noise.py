"""How SGD spreads about a minimum before it has forgotten its start [Ma2022, section 9.5].

The law at every time, of the steps and of the diffusion; along directions in which the Hessian
vanishes it is that of Brownian motion.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import theory

RNG = np.random.default_rng(0)
FRAME = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
SIGMA = np.diag([1.0, 2.0, 0.5, 0.1]) + 0.3
START, ETA = np.array([1.0, -2.0, 0.5, 0.3]), 0.2
SPECTRA = {
    "minimum": [3.0, 1.0, 0.5, 0.2],
    "flat directions": [3.0, 1.0, 0.0, 0.0],
    "nearly flat": [3.0, 1.0, 1e-9, 1e-17],
    "saddle": [3.0, 1.0, 0.0, -0.4],
    "too long a step": [12.0, 5.0, 1.0, 0.0],  # 1 − ηλ = −1.4, and 0
}


def law(hessian, times, **options):
    return theory.ornstein_uhlenbeck_law(
        hessian, SIGMA, START, time=times, learning_rate=ETA, **options
    )


def hessian_of(name):
    return FRAME @ np.diag(SPECTRA[name]) @ FRAME.T


@pytest.mark.parametrize("name", SPECTRA)
def test_the_law_of_the_steps_is_that_of_the_recursion(name):
    """Step by step: mean ← (I − ηH)mean, C ← (I − ηH)C(I − ηH) + η²Σ, and (I − ηH)^lag C."""
    hessian, times = hessian_of(name), np.array([0, 1, 2, 7, 40])
    step, found = np.eye(4) - ETA * hessian, law(hessian, times, discrete=True, lag=3)
    assert isinstance(found, theory.OrnsteinUhlenbeckLaw)
    mean, covariance = START, np.zeros((4, 4))
    for k in range(times[-1] + 1):
        if k in times:
            at = list(times).index(k)
            # Eigenvalues of H have an error of rounding, and 40 steps of growth 1.4² magnify it.
            close(f"mean, {k} steps", found.mean[at], mean, 1e-11)
            close(f"covariance, {k} steps", found.covariance[at], covariance, 1e-11)
            later = np.linalg.matrix_power(step, 3) @ covariance
            close(f"autocovariance, {k} steps", found.autocovariance[at], later, 1e-11)
        mean, covariance = step @ mean, step @ covariance @ step + ETA**2 * SIGMA
    scalar = law(hessian, 7, discrete=True)
    close("one time", scalar.covariance, found.covariance[3], 1e-14)
    close("no lag", scalar.autocovariance, scalar.covariance, 1e-14)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_law_of_the_diffusion_is_that_of_its_moments(name):
    """m' = −ηHm and C' = −η(HC + CH) + η²Σ by a solver, and e^{−ηH·lag}C."""
    hessian, times = hessian_of(name), np.array([0.0, 0.7, 5.0, 30.0])
    found = law(hessian, times, lag=2.5)

    def moments(t, flat):
        mean, covariance = flat[:4], flat[4:].reshape(4, 4)
        half = -ETA * hessian @ covariance
        return np.r_[-ETA * hessian @ mean, np.ravel(half + half.T + ETA**2 * SIGMA)]

    solved = solve_ivp(
        moments, (0, 30.0), np.r_[START, np.zeros(16)], t_eval=times, rtol=1e-11, atol=1e-14
    ).y.T
    close("mean", found.mean, solved[:, :4], 1e-8)
    close("covariance", found.covariance, solved[:, 4:].reshape(-1, 4, 4), 1e-8)
    later = expm(-2.5 * ETA * hessian) @ found.covariance
    close("autocovariance", found.autocovariance, later, 1e-12)


@pytest.mark.parametrize("discrete", [False, True])
def test_flat_directions_are_brownian(discrete):
    """η²Σt exactly, however long: nothing is lost to 0/0, nor at eigenvalues of rounding."""
    times = np.array([1.0, 1e3, 1e9])
    for size in (0.0, 1e-25):
        found = law(size * np.eye(4), times, discrete=discrete)
        close("η²Σt", found.covariance / times[:, None, None], [ETA**2 * SIGMA] * 3, 1e-12)
        close("mean", found.mean, [START] * 3, 1e-12)


@pytest.mark.parametrize("discrete", [False, True])
def test_late_times_are_stationary(discrete):
    """Then the start is forgotten, and correlations fall by e^{−ηH·lag} or (I − ηH)^lag."""
    hessian = hessian_of("minimum")
    found = law(hessian, 2000, lag=4, discrete=discrete)
    stationary = theory.ornstein_uhlenbeck_covariance(
        hessian, SIGMA, learning_rate=ETA, discrete=discrete
    )
    close("covariance", found.covariance, stationary, 1e-12)
    at_most("mean", np.linalg.norm(found.mean), 1e-12)
    step = np.eye(4) - ETA * hessian
    kept = np.linalg.matrix_power(step, 4) if discrete else expm(-4 * ETA * hessian)
    close("autocovariance", found.autocovariance, kept @ stationary, 1e-12)
    other = law(hessian, 2000, lag=4, discrete=not discrete)
    at_least("the other law", np.max(np.abs(other.covariance / stationary - 1)), 0.02)


# A linear model with more parameters than examples, so that one direction is flat.
LINEAR = mf.models.LinearRegression(
    np.array([[1.5, 0.3, 0.2], [-0.4, 1.0, 0.5]]), np.array([1.0, -1.0])
)
LABELS, RATE, STEPS, LAG, MEMBERS = mf.LabelNoise(0.6), 0.5, 4, 2, 4000


def test_sgd_has_its_law_on_the_way():
    """Mean, covariance and autocovariance of runs after 4 and 6 steps; the diffusion's differ."""
    limit = jnp.asarray(LINEAR.limit())
    start = limit + jnp.array([1.0, -0.5, 0.8])
    hessian = np.asarray(LINEAR.loss.hessian(limit).as_matrix())
    sigma = np.asarray(LABELS.covariance(LINEAR.loss, limit).as_matrix())

    def run(key):
        return mf.simulate(
            LINEAR.loss, LABELS, optax.sgd, start, learning_rate=RATE, num_steps=STEPS + LAG,
            num_saves=STEPS + LAG, key=key, throw=False,
        ).points[jnp.array([STEPS, STEPS + LAG])]  # fmt: skip

    points = np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(0), MEMBERS))) - np.asarray(limit)
    early, late = points[:, 0], points[:, 1]
    steps, diffusion = (
        theory.ornstein_uhlenbeck_law(
            hessian, sigma, np.asarray(start - limit), time=STEPS, learning_rate=RATE, lag=LAG,
            discrete=d,
        )
        for d in (True, False)
    )  # fmt: skip
    centred = early - early.mean(0), late - late.mean(0)
    for name, samples in {
        "mean": early,
        "covariance": centred[0][:, :, None] * centred[0][:, None, :],
        "autocovariance": centred[1][:, :, None] * centred[0][:, None, :],
    }.items():
        mean = samples.mean(0)
        error = samples.std(0, ddof=1) / np.sqrt(MEMBERS) + 1e-14
        off = lambda expected: np.max(np.abs(mean - getattr(expected, name)) / error)
        at_most(f"{name}: standard errors off, seed 0", off(steps), 4)
        if name != "autocovariance":
            at_least(f"{name}: those of the diffusion", off(diffusion), 8)
    at_least("autocovariance: the lag counts", np.max(np.abs(mean - steps.covariance) / error), 8)


def test_bad_input():
    good = {"hessian": np.eye(2), "covariance": np.eye(2), "start": np.ones(2)}
    rest = {"time": 1.0, "learning_rate": 0.1}
    for words, wrong in {
        "whole numbers of steps": {"time": 1.5, "discrete": True},
        "time and lag": {"lag": 0.5, "discrete": True},
        "one shape": {"covariance": np.eye(3)},
        "expected a symmetric": {"hessian": np.ones((2, 3))},
        "none below 0": {"covariance": -np.eye(2)},
        "beyond the range of floats": {"hessian": -np.eye(2), "time": 1e5},
        "start: got shape": {"start": np.ones(3)},
        "all >= 0": {"time": -1.0},
    }.items():
        with refused(ValueError, words):
            theory.ornstein_uhlenbeck_law(**(good | rest | wrong))
