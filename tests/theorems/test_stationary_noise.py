"""How SGD spreads about the minimisers, and what that does at finite learning rates.

[Ma2022, section 9.5; Blanc2020; Damian2021]
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import manifoldflow as mf
from checks import at_least, at_most, close
from manifoldflow import theory
from quick import long_jit


def mean_and_error(values):
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / np.sqrt(len(values))


# --- The Ornstein-Uhlenbeck picture ------------------------------------------------------------

# So curved that the steps of SGD and its diffusion spread visibly differently.
LINEAR = mf.models.LinearRegression(np.array([[1.5, 0.3], [-0.4, 1.0]]), np.array([1.0, -1.0]))
NOISE, RATE, MEMBERS = mf.LabelNoise(0.6), 0.5, 4000


def test_sgd_and_its_diffusion_spread_as_predicted():
    """S = (I−ηH)S(I−ηH) + η²Σ for the steps, HS + SH = ηΣ for the diffusion, not the other way.

    A step of length η²/m of the diffusion's Euler scheme is SGD at the rate η/m with noise √m times
    larger: with m = 32 its own covariance is within 2 % of the limit.
    """
    limit = jnp.asarray(LINEAR.limit())
    hessian = np.asarray(LINEAR.loss.hessian(limit).as_matrix())
    sigma = np.asarray(NOISE.covariance(LINEAR.loss, limit).as_matrix())
    close("Σ = (δ²/n)H", sigma, 0.18 * hessian, 1e-12)
    discrete, continuous = (
        theory.ornstein_uhlenbeck_covariance(hessian, sigma, learning_rate=RATE, discrete=d)
        for d in (True, False)
    )
    steps, rate = 60, RATE

    def descended(key):
        run = {"learning_rate": rate, "num_steps": steps, "key": key, "throw": False}
        return mf.simulate(LINEAR.loss, NOISE, optax.sgd, limit, **run).final

    def diffused(key):
        flow = mf.SGDDiffusion(LINEAR.loss, NOISE, rate)
        end = {"end_time": steps * rate**2, "step_size": rate**2 / 32}
        return mf.solve(flow, limit, key=key, throw=False, **end).final

    keys = jr.split(jr.key(0), MEMBERS)
    for name, fn, expected, other in (
        ("SGD", descended, discrete, continuous),
        ("diffusion", diffused, continuous, discrete),
    ):
        ends = np.asarray(long_jit(jax.vmap(fn))(keys)) - np.asarray(limit)
        mean, error = mean_and_error(ends[:, :, None] * ends[:, None, :])
        slack = 0.02 * np.max(np.abs(expected)) if name == "diffusion" else 0.0
        misses = (np.abs(mean - expected) - slack) / error
        at_most(f"{name}: standard errors off, seed 0", np.max(misses), 4)
        at_least(f"{name}: the other law", np.max(np.abs(mean - other) / error), 8)


# --- xy = 1 at finite learning rates -----------------------------------------------------------

PRODUCT = mf.LeastSquares(np.ones(1), np.ones(1), predict=lambda p, x: p[0] * p[1] * x)
UNIT = mf.LabelNoise(1.0)  # c = 1


def imbalance(point):
    """q = x² − y², which gradient flow keeps; label noise makes q' = −cq in the limit."""
    return point[0] ** 2 - point[1] ** 2


def test_the_refined_regulariser():
    """−(c/2η) tr ln(I − ηH/2) in place of (c/4) tr H makes q' = −cq/(1 − ηλ/2), λ = √(q² + 4).

    To three digits, where the limit is 50 standard errors off.
    """
    rate, steps, start = 0.03, 556, jnp.array([2.0, 0.5])

    def end(key):
        run = {"learning_rate": rate, "num_steps": steps, "key": key, "throw": False}
        return imbalance(mf.simulate(PRODUCT, UNIT, optax.sgd, start, **run).final)

    mean, error = mean_and_error(long_jit(jax.vmap(end))(jr.split(jr.key(0), 4000)) / 3.75)
    refined, fine = 3.75, 20 * steps
    for _ in range(fine):
        refined -= steps * rate**2 / fine * refined / (1 - rate * np.sqrt(refined**2 + 4) / 2)
    at_most("standard error", error, 5e-4)
    at_most(f"{mean:.4f} against {refined / 3.75:.4f}", abs(mean - refined / 3.75), 4 * error)
    at_least("the limit", abs(mean - np.exp(-steps * rate**2)), 40 * error)


def test_label_noise_settles_where_the_regularised_loss_is_stationary():
    """L + λ tr∇²L with λ = ηc/4: balanced, x² = y², with xy = 1 − 2λ, not on the manifold."""
    rate = 0.05
    strength = rate / 4
    regularised = mf.RegularizedLoss(PRODUCT, strength, kind="hessian")
    settled = jnp.full(2, np.sqrt(1 - 2 * strength))
    close("tr∇²L", PRODUCT.trace_hessian(settled), jnp.sum(settled**2), 1e-12)
    at_most("∇(L + λ tr∇²L)", jnp.linalg.norm(regularised.gradient(settled)), 1e-12)
    other = mf.RegularizedLoss(PRODUCT, strength).gradient(settled)  # tr ∇²f = 0 here
    at_most("∇(L + λ tr G)", jnp.linalg.norm(other), 1e-12)

    def observed(key):
        run = mf.simulate(
            PRODUCT, UNIT, optax.sgd, jnp.array([1.5, 0.7]), learning_rate=rate,
            num_steps=8000, num_saves=800, key=key, throw=False,
        )  # fmt: skip
        late = run.points[400:]
        return jnp.stack([jnp.mean(jax.vmap(imbalance)(late)), jnp.mean(late[:, 0] * late[:, 1])])

    means, errors = mean_and_error(long_jit(jax.vmap(observed))(jr.split(jr.key(0), 500)))
    at_most("mean of x² − y²", abs(means[0]), 4 * errors[0] + 1e-4)
    shift = 1 - means[1]
    at_most(f"shift {shift:.4f} of xy", abs(shift - 2 * strength), 4 * errors[1] + 0.1 * rate**2)
    for wrong in (0.0, 1.0, 4.0):
        at_least(f"{wrong}λ is rejected", abs(shift - wrong * strength), 6 * errors[1])
