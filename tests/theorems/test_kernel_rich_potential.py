"""Q_α, whose least fit gradient flow on w₊² − w₋² picks [Woodworth2020; Ma2022, section 9.3]."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize

from checks import at_least, at_most, close, refused
from manifoldflow import theory

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(4, 9))
TARGETS = INPUTS @ RNG.normal(size=9)
THETA = np.array([1.0, -0.3, 0.0, 2.0])


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1.0, 20.0])
def test_it_is_the_integral_of_arcsinh(alpha):
    """∂Q/∂θⱼ = arcsinh(θⱼ/2α²), Q(0) = 0; one α for each feature, and several θ at once."""
    # With x = 2α² sinh s, so that a quadrature sees no kink.
    parts = [
        quad(lambda s: s * 2 * alpha**2 * np.cosh(s), 0, np.arcsinh(theta / (2 * alpha**2)))[0]
        for theta in THETA
    ]
    close("Q", theory.kernel_rich_potential(THETA, scale=alpha), sum(parts), 1e-11)
    alphas = np.array([alpha, 2 * alpha, alpha, alpha / 3])
    single = [theory.kernel_rich_potential(THETA[[j]], scale=alphas[j]) for j in range(4)]
    close(
        "α of each feature", theory.kernel_rich_potential(THETA, scale=alphas), sum(single), 1e-14
    )
    both = theory.kernel_rich_potential(np.stack([THETA, 2 * THETA]), scale=alpha)
    assert both.shape == (2,)
    close("rows", both[1], theory.kernel_rich_potential(2 * THETA, scale=alpha), 1e-15)


def test_its_limits_are_the_norms():
    """4α²Q → |θ|₂² as α → ∞ and Q/log α⁻² → |θ|₁ as α → 0, without the 1/α² of (9.104).

    The second only like 1/log: Q = Σ|θⱼ|(log α⁻² + log|θⱼ| − 1) is met at once.
    """
    q = lambda alpha: theory.kernel_rich_potential(THETA, scale=alpha)
    one = np.sum(np.abs(THETA))
    used = np.abs(THETA[THETA != 0])
    for alpha in (1e2, 1e6, 1e140):
        close(f"ℓ₂, α = {alpha}", 4 * alpha * (alpha * q(alpha)), np.sum(THETA**2), 1e-7)
    for alpha in (1e-4, 1e-60, 1e-250):
        exact = np.sum(used * (np.log(used) - 1 - 2 * np.log(alpha)))
        close(f"its first two terms, α = {alpha}", q(alpha), exact, 1e-12 + alpha**2)
        share = q(alpha) / np.log(alpha**-1) / 2
        at_most(f"ℓ₁, α = {alpha}", abs(share / one - 1), 1 / np.log(1 / alpha))
    printed = one / 1e-4**2 * np.log(1e8)
    at_most("Q over the printed (9.104)", q(1e-4) / printed, 1e-7)


@pytest.mark.parametrize("alpha", [0.05, 0.7, 5.0])
def test_its_least_fit_is_the_interpolant(alpha):
    """By a general minimiser in the null space, which knows the values of Q only."""
    fit = theory.kernel_rich_interpolant(INPUTS, TARGETS, scale=alpha)
    basis = np.linalg.svd(INPUTS)[2][4:].T
    q = lambda move: theory.kernel_rich_potential(fit + basis @ move, scale=alpha) / alpha
    found = minimize(q, np.full(5, 0.5), method="Powell", options={"ftol": 1e-15, "xtol": 1e-9})
    close("argmin Q", fit + basis @ found.x, fit, 1e-5)
    other = theory.kernel_rich_interpolant(INPUTS, TARGETS, scale=3 * alpha)
    least = theory.kernel_rich_potential(fit, scale=alpha)
    rise = theory.kernel_rich_potential(other, scale=alpha) / least - 1
    at_least("the fit of another α has more", rise, 1e-9)


def test_label_noise_moves_along_its_least_fits():
    """w(t) has the least Q for αⱼ² = |uⱼvⱼ(t)|: its slope arcsinh(w/2α²) is a row of X."""
    u = RNG.uniform(0.5, 1.5, 9)
    run = {"inputs": INPUTS, "u": u, "v": u, "time": 0.4}  # no sign preferred: u = v
    weights = theory.overparametrized_linear_flow(targets=TARGETS, **run)
    alphas = np.sqrt(theory.overparametrized_linear_charges(**run))
    slope = []
    for j in range(9):
        step = np.eye(9)[j] * 1e-5
        pair = [theory.kernel_rich_potential(weights + s * step, scale=alphas) for s in (1, -1)]
        slope.append((pair[0] - pair[1]) / 2e-5)
    multipliers = np.linalg.lstsq(INPUTS.T, np.array(slope), rcond=None)[0]
    close("∇Q is a row of X", INPUTS.T @ multipliers, slope, 1e-8)


def test_bad_input():
    for words, (weights, scale) in {
        "expected (..., d), and () or (d,)": (THETA, np.ones(3)),
        "expected numbers > 0": (THETA, 0.0),
        "NaN or infinity": (THETA * np.nan, 1.0),
    }.items():
        with refused(ValueError, words):
            theory.kernel_rich_potential(weights, scale=scale)
