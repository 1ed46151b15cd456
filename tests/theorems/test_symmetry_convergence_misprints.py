"""Time scales, convergence and starts in [Ziyin2024] as printed, beside what holds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checks import at_least, at_most, close, in_window
from manifoldflow import symmetry, theory
from symmetric_problems import (
    B,
    covariance,
    DATA,
    example_loss,
    flat,
    gradients,
    MATRICES,
    POINT,
    SYMMETRIES,
)

SIGMA2, DECAY = 0.05, 0.3


def drift_of(charge, decay=0.0):
    return float(
        symmetry.charge_drift(
            charge, example_loss, POINT, DATA, noise_scale=SIGMA2, weight_decay=decay
        )
    )


def test_the_charge_of_two_factors_moves_twice_as_fast():
    """Proposition 5.1 for C_B = tr(UBUᵀ) − tr(WᵀBW) prints σ²(Σ tr Σ_{u_i}B − Σ tr Σ_{w_j}B), B.4
    the same with η for σ²: that is the drift of half of C_B."""
    charge = lambda p: jnp.trace(p["U"] @ B @ p["U"].T) - jnp.trace(p["W"].T @ B @ p["W"])
    sigma, b = covariance(POINT), np.asarray(B)
    rows_of_u = [slice(3 * i, 3 * i + 3) for i in range(2)]
    columns_of_w = [slice(6 + j, 12, 2) for j in range(2)]
    printed = SIGMA2 * (
        sum(np.trace(sigma[r, r] @ b) for r in rows_of_u)
        - sum(np.trace(sigma[c, c] @ b) for c in columns_of_w)
    )
    found = drift_of(charge)
    close("twice what is printed", found, 2 * printed, 1e-11)
    at_least("as printed", abs(found - printed) / abs(found), 0.4)
    eta = 2 * SIGMA2  # of batches of one
    at_least("B.4 without σ²/η", abs(found - eta / SIGMA2 * 2 * printed) / abs(found), 0.4)


def test_the_decay_of_a_charge_of_two_neurons():
    """(87) prints −2γC for C = u_k·u_l − w_k·w_l; it is −4γC."""
    charge = lambda p: p["U"][:, 0] @ p["U"][:, 1] - p["W"][0] @ p["W"][1]
    decay = drift_of(charge, DECAY) - drift_of(charge)
    close("−4γC", decay, -4 * DECAY * float(charge(POINT)), 1e-11)
    at_least("−2γC", abs(decay + 2 * DECAY * float(charge(POINT))) / abs(decay), 0.4)


def test_the_sign_of_the_drift():
    """(27) has +∇C·∇L dt, against one step of descent for a C that is no charge."""
    direction = jnp.asarray(np.random.default_rng(0).normal(size=12))
    charge = lambda p: direction @ jax.flatten_util.ravel_pytree(p)[0]
    mean = np.asarray(gradients(POINT)).mean(axis=0)
    step = float(np.asarray(direction) @ (flat(POINT) - 1e-3 * mean - flat(POINT))) / 1e-3
    close("−∇C·∇L", drift_of(charge), step, 1e-9)
    at_least("+∇C·∇L", abs(drift_of(charge) + step) / abs(step), 1)


def test_what_grows_and_falls_along_an_orbit():
    """B.2: the eigenvalues of e^{λA}Ae^{λA} are a·e^{2λa} (printed a·e^{λa}), and I₁, the pull of
    the noise on the positive side, falls with λ (printed: increases)."""
    matrix = MATRICES["rotation"]
    values, vectors = np.linalg.eigh(matrix)
    stretched = (vectors * np.exp(0.4 * values)) @ vectors.T
    found = np.sort(np.linalg.eigvalsh(stretched @ matrix @ stretched))
    close("a·e^{2λa}", found, np.sort(values * np.exp(0.8 * values)), 1e-11)
    printed = np.sort(values * np.exp(0.4 * values))
    at_least("a·e^{λa}", np.linalg.norm(found - printed) / np.linalg.norm(found), 0.1)
    positive = (vectors * np.maximum(values, 0)) @ vectors.T
    along = [SYMMETRIES["rotation"].act(POINT, s) for s in np.linspace(-1, 1, 9)]
    first = [np.trace(covariance(point) @ positive) for point in along]
    assert np.all(np.diff(first) < 0), first


def test_the_time_to_equilibrium_is_inverse_to_the_noise():
    """§4.2 prints t_equi ∝ σ². One neuron under SGD: its charge halves after a time kη that
    doubles where η, and with it σ², is halved."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=20)
    y = 1.5 * x + rng.normal(size=20)

    def half_life(eta, seeds=400, steps=12000):
        u, w = np.full(seeds, 2.0), np.full(seeds, 0.75)
        start, alive = (u**2 - w**2)[0], np.full(seeds, np.nan)
        draws = rng.integers(20, size=(steps, seeds))
        for k in range(steps):
            pull = 2 * (x[draws[k]] * u * w - y[draws[k]]) * x[draws[k]]
            u, w = u - eta * pull * w, w - eta * pull * u
            halved = np.isnan(alive) & (u**2 - w**2 < start / 2)
            alive[halved] = (k + 1) * eta
            if not np.isnan(alive).any():
                break
        return alive.mean(), alive.std(ddof=1) / np.sqrt(seeds)

    (slow, slow_error), (fast, fast_error) = half_life(0.01), half_life(0.02)
    ratio = slow / fast
    error = ratio * np.hypot(slow_error / slow, fast_error / fast)
    in_window("ratio of half-lives, less its error and O(η)", ratio, 2 - 0.2 - 4 * error,
              2 + 0.2 + 4 * error)  # fmt: skip
    at_least("as printed, ½: distance over its error", abs(ratio - 0.5) / error, 20)


def test_the_bound_on_the_distance_to_a_moving_equilibrium():
    """Lemma B.5: for Ċ = −κ(C − C*) with κ = σ²c₀ and dC* = μdt + s dW, E(C − C*)² ends at
    μ²/κ² + s²/2κ; (63), (72) have s²/2κ², and no term of the start, e^{−2κt}(C₀ − C*₀)²."""
    kappa, drift, spread, step, seeds = 4.0, 0.5, 1.0, 2e-3, 4000
    rng = np.random.default_rng(2)
    gap, seen = np.full(seeds, 3.0), {}
    for k in range(1500):
        gap = gap - step * (kappa * gap + drift)
        gap -= spread * np.sqrt(step) * rng.normal(size=seeds)
        seen[k + 1] = np.mean(gap**2), np.std(gap**2, ddof=1) / np.sqrt(seeds)
    end, error = seen[1500]
    holds = drift**2 / kappa**2 + spread**2 / (2 * kappa)
    at_most("E(C − C*)² at the end", abs(end - holds), 4 * error + kappa * step * holds)
    printed = (2 * drift**2 + spread**2) / (2 * kappa**2)
    at_least("over what is printed, less its error", (end - 4 * error) / printed, 2)
    early, its_error = seen[50]  # t = 0.1
    at_least("at the start over the end", (early - 4 * its_error) / holds, 5)


def test_how_far_the_moving_equilibrium_has_gone():
    """(75) has Pr(|C*| > √t) → 1: for μ = 0 it is one number below 1 at every t; t^{3/8} does.
    (76) to (78) bound the probability from below, by 0; what holds is that it falls."""
    spread, rng = 1.0, np.random.default_rng(3)
    beyond = lambda level: math.erfc(level / (spread * math.sqrt(2)))
    times, seeds, kappa = [1e2, 1e4, 1e6], 40000, 1.0
    far, apart = [], []
    for time in times:
        ends = spread * math.sqrt(time) * rng.normal(size=seeds)
        gaps = spread / math.sqrt(2 * kappa) * rng.normal(size=seeds)
        error = 0.5 / math.sqrt(seeds)
        at_most("Pr(|C*| > √t)", abs(np.mean(np.abs(ends) > time**0.5) - beyond(1)), 4 * error)
        far.append(np.mean(np.abs(ends) > time ** (3 / 8)))
        at_most("Pr(|C*| > t^{3/8})", abs(far[-1] - beyond(time ** (-1 / 8))), 4 * error)
        apart.append(np.mean(np.abs(gaps / ends) > time ** (-1 / 8)))
        ends_near = np.mean(np.abs(gaps) > time**0.25) + np.mean(np.abs(ends) < time**0.5) - 1
        at_most("the printed bound (77)", max(0.0, ends_near), 1e-12)
    at_most("Pr(|C*| > √t), whatever t", beyond(1), 0.32)
    assert np.all(np.diff(far) > 0) and far[-1] > 0.8, far
    assert np.all(np.diff(apart) < 0) and apart[-1] < 0.01, apart


@pytest.mark.parametrize("width", [6, 3, 30])
def test_the_start_of_xavier(width):
    """After (15): "slightly smaller", ≈. With variances 1/(inputs + outputs) the start has
    max/(d + d_x) of the end's sharpness, a half at d = d_x; with Xavier's 2/(inputs + outputs)
    it is never smaller: the loss flattens."""
    size, rank = 6, min(width, 6)
    weights = theory.deep_linear_noise_equilibrium(
        np.diag(np.arange(size) < rank) * 1.0, np.eye(size), np.eye(size), widths=[width],
        key=jax.random.key(0),
    )  # fmt: skip
    end = theory.deep_linear_sharpness(weights, np.eye(size))
    close("(15), twice", end, 4 * rank * size, 1e-11)
    start = lambda share: theory.deep_linear_initial_sharpness(
        (size, width, size), (share / (size + width),) * 2, size
    )
    close("1/(in + out)", start(1) / end, max(width, size) / (width + size), 1e-11)
    at_least("2/(in + out)", start(2) / end, 1 - 1e-11)
    if width == size:
        at_most("not ≈ 1", start(1) / end, 0.5 + 1e-11)
