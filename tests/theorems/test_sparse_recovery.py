"""[LiWangArora2022, section 6.2 and D.4]: the fit of least weighted l1 norm is the sparse truth.

That it is the only such fit is certified by a dual vector; how many examples suffice for one is
Lemmas D.7 to D.9. The independent computations are linear programs, and dual vectors by hand.
"""

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import chi2

from checks import at_least, at_most, close, refused
from manifoldflow import theory

DESIGNS = ("gaussian", "boolean")


def sparse(design, n, d, sparsity, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.choice([-1.0, 1.0], (n, d)) if design == "boolean" else rng.normal(size=(n, d))
    truth = np.zeros(d)
    truth[rng.permutation(d)[:sparsity]] = rng.choice([-1.0, 1.0], sparsity) * rng.uniform(0.5, 2)
    return inputs, truth


# --- The certificate -----------------------------------------------------------------------


def other_fits(inputs, truth, costs, seed):
    """How far fits that cost no more than w* lead away from it, by linear programs."""
    one_way = np.random.default_rng(1000 + seed).normal(size=len(truth))
    rows = np.r_[costs, costs] / (costs @ np.abs(truth))
    far = 0.0
    for direction in (one_way, -one_way):
        found = linprog(
            np.r_[direction, -direction],
            A_ub=rows[None],
            b_ub=[1 + 1e-9],
            A_eq=np.hstack([inputs, -inputs]),
            b_eq=inputs @ truth,
        )
        assert found.status == 0
        plus, minus = np.split(found.x, 2)
        far = max(far, np.max(np.abs(plus - minus - truth)))
    return far


@pytest.mark.parametrize("design", DESIGNS)
def test_the_certificate_agrees_with_linear_programs(design):
    """Around the threshold, where w* is the only minimiser, one of several, or none."""
    unique = []
    for seed in range(24):
        n = 4 + seed % 8
        inputs, truth = sparse(design, n, 16, 3, seed)
        costs = np.sum(inputs**2, axis=0)
        found = theory.sparse_recovery_certificate(inputs, truth)
        assert isinstance(found, theory.RecoveryCertificate)
        far = other_fits(inputs, truth, costs, seed)
        where = f"{design}, n={n}, seed {seed}: margin {found.margin}, other fits at {far}"
        assert found.is_unique == (far < 1e-6), where
        program = theory.weighted_l1_interpolant(inputs, inputs @ truth)
        gain = costs @ (np.abs(truth) - np.abs(program)) / (costs @ np.abs(truth))
        assert (found.margin < -1e-9) == (gain > 1e-9), f"{where}, {gain} is gained"
        if found.is_unique:
            close(f"{where}; linear program", program, truth, 1e-8)
        unique.append(found.is_unique)
    assert 6 <= sum(unique) <= 18, f"{sum(unique)} of 24 are unique: not around the threshold"


@pytest.mark.parametrize("design", DESIGNS)
def test_the_dual_vector_is_a_proof(design):
    """Its equations hold, and no fit costs less than w* by more than the margin allows."""
    inputs, truth = sparse(design, 12, 24, 3, 0)
    found, costs = theory.sparse_recovery_certificate(inputs, truth), np.sum(inputs**2, axis=0)
    on, pulls = truth != 0, inputs.T @ found.dual / np.sum(inputs**2, axis=0)
    assert found.is_unique
    close("z_j' nu = c_j sign(w_j)", pulls[on], np.sign(truth[on]), 1e-12)
    close("the margin", 1 - np.max(np.abs(pulls[~on])), found.margin, 1e-12)
    columns = inputs[:, on] / np.linalg.norm(inputs[:, on], axis=0)
    close("injectivity", np.linalg.svd(columns, compute_uv=False)[-1], found.injectivity, 1e-12)
    rng, kernel = np.random.default_rng(1), np.linalg.svd(inputs)[2][12:]
    ratios = []
    for _ in range(300):
        step = rng.normal(size=12) @ kernel * 10 ** rng.uniform(-3, 1)
        excess = costs @ (np.abs(truth + step) - np.abs(truth))
        ratios.append(excess / (costs[~on] @ np.abs(step[~on])))
    at_least("excess over the cost off the support, least of 300", min(ratios), found.margin)
    assert min(ratios) < 1, "a margin of 1 would do: the fits are no test"


def test_the_margin_is_the_best_of_all_dual_vectors():
    """The dual of the minimax program, max sum_S s_j h_j with sum_off c|h| <= 1 and Zh = 0 for
    unit costs: its value is 1 - margin."""
    for seed in range(6):
        inputs, truth = sparse("gaussian", 8, 16, 3, seed)
        on, weights = truth != 0, np.random.default_rng(seed).uniform(0.5, 2, 16)
        found = theory.sparse_recovery_certificate(inputs, truth, weights=weights)
        gain, price = weights * np.sign(truth), np.where(on, 0, weights)
        program = linprog(
            np.r_[-gain, gain],
            A_ub=np.r_[price, price][None],
            b_ub=[1],
            A_eq=np.hstack([inputs, -inputs]),
            b_eq=np.zeros(8),
        )
        close(f"seed {seed}", found.margin, 1 + program.fun, 1e-7)


def test_label_noise_ends_at_what_is_certified_from_every_start():
    ends = {True: [], False: []}
    for seed in range(8):
        inputs, truth = sparse("gaussian", 6 + seed, 16, 3, 100 + seed)
        starts = np.random.default_rng(seed).normal(size=(2, 2, 16))
        flow = lambda u, v: theory.overparametrized_linear_flow(
            inputs, inputs @ truth, u, v, time=400.0
        )
        is_unique = theory.sparse_recovery_certificate(inputs, truth).is_unique
        ends[is_unique] += [np.max(np.abs(flow(*start) - truth)) for start in starts]
    at_most(f"distance of {len(ends[True])} ends, certified", max(ends[True]), 1e-6)
    at_least(f"distance of {len(ends[False])} ends, not certified", min(ends[False]), 0.01)


def test_of_two_equal_columns_none_is_preferred():
    inputs = np.array([[1.0, 1.0, 0.5], [2.0, 2.0, -1.0]])
    found = theory.sparse_recovery_certificate(inputs, np.array([1.0, 0, 0]))
    assert not found.is_unique and abs(found.margin) < 1e-12, found
    both = theory.sparse_recovery_certificate(inputs, np.array([1.0, 1.0, 0]))
    assert not both.is_unique and both.injectivity < 1e-12, both
    against = theory.sparse_recovery_certificate(inputs, np.array([1.0, -1.0, 0]))
    assert against.margin == -np.inf and against.dual is None and not against.is_unique


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_units_of_the_inputs_change_nothing(scale):
    inputs, truth = sparse("gaussian", 10, 20, 3, 3)
    one, other = (theory.sparse_recovery_certificate(s * inputs, truth) for s in (1.0, scale))
    close("margin", other.margin, one.margin, 1e-9)
    close("dual", other.dual / scale, one.dual, 1e-7)
    assert one.is_unique and other.is_unique
    plain = [
        theory.sparse_recovery_certificate(s * inputs, truth, weights=s * np.ones(20))
        for s in (1.0, scale)
    ]
    close("dual, weights of one's own", plain[1].dual, plain[0].dual, 1e-7)


def test_nothing_and_everything_as_support():
    inputs = np.random.default_rng(0).normal(size=(4, 4))
    none = theory.sparse_recovery_certificate(inputs[:2], np.zeros(4))
    assert none.is_unique and none.margin == 1.0
    every = theory.sparse_recovery_certificate(inputs, np.ones(4))
    assert every.is_unique and every.margin == 1.0


# --- How many examples suffice ---------------------------------------------------------------


def by_hand(inputs, truth):
    """1 - max |z_j' nu|/c_j for the nu of least norm: above 0 only if w* is recovered."""
    on, costs = truth != 0, np.sum(inputs**2, axis=0)
    dual = np.linalg.pinv(inputs[:, on].T) @ (costs[on] * np.sign(truth[on]))
    return 1 - np.max(np.abs(inputs[:, ~on].T @ dual) / costs[~on])


@pytest.mark.parametrize(
    ("design", "d", "sparsity"), [("gaussian", 1000, 2), ("boolean", 1000, 2), ("boolean", 300, 8)]
)
def test_that_many_examples_recover(design, d, sparsity):
    """At the sample size for probability 0.9, and no longer at kappa ln(d/kappa)."""
    n = theory.sparse_recovery_sample_size(d, sparsity, failure_probability=0.1, design=design)
    few, num_seeds = int(sparsity * np.log(d / sparsity)), 40
    assert few < n < d, f"n = {n} of {d} features says nothing"
    margins = [by_hand(*sparse(design, n, d, sparsity, seed)) for seed in range(num_seeds)]
    part = np.mean(np.array(margins) > 0)
    error = np.sqrt(0.1 * 0.9 / num_seeds)
    at_least(f"recovered at n = {n}, {design}, seeds 0-39", part, 0.9 - 4 * error)
    if d == 300:
        seeds = range(10)
        found = [
            theory.sparse_recovery_certificate(*sparse(design, few, d, sparsity, s)) for s in seeds
        ]
        at_most(f"recovered at κ ln(d/κ) = {few}", np.mean([f.is_unique for f in found]), 0.5)


def test_the_bounds_by_hand():
    """Both formulas at the answer and one example below."""
    d, k, p = 400, 3, 0.02

    def gaussian(n):
        s = np.sqrt(n - 1) - np.sqrt(k) - 3 * np.sqrt(2 * k * np.log(2 * (d - k)))
        return np.exp(-(s**2) / 2) + d * (chi2.cdf(n / 2, n) + chi2.sf(1.5 * n, n))

    def boolean(n):
        x = np.linspace(0.001, 0.999, 999)
        chernoff = k * (np.exp(-x) / (1 - x) ** (1 - x)) ** (n / k)
        return np.min(chernoff + 2 * (d - k) * np.exp(-n * (1 - x) / (2 * k)))

    for design, bound in (("gaussian", gaussian), ("boolean", boolean)):
        n = theory.sparse_recovery_sample_size(d, k, failure_probability=p, design=design)
        at_most(f"{design}, bound at n = {n}", bound(n), p)
        at_least(f"{design}, bound at {n - 2}", bound(n - 2), p)
    # Lemma D.8 itself, with half of sqrt(n - 1) for s, asks for more.
    half = 1 + 4 * k * (1 + 3 * np.sqrt(2 * np.log(2 * (d - k)))) ** 2
    at_most("against the lemma's choice", theory.sparse_recovery_sample_size(d, k), half)


def frequency(events):
    """Less four standard errors: what a bound must not be below of."""
    part = np.mean(events)
    return part - 4 * np.sqrt(part * (1 - part) / len(events))


def test_hoeffding_for_boolean_inputs():
    """P(|z_j' nu| >= 1) <= 2 exp(-1/(2|nu|^2)) for each of d - kappa columns; not without the 2."""
    n, d, k = 40, 200, 3
    fails, exponents = [], []
    for seed in range(400):
        inputs, truth = sparse("boolean", n, d, k, seed)
        dual = np.linalg.pinv(inputs[:, truth != 0].T) @ np.sign(truth[truth != 0])
        fails.append(by_hand(inputs, truth) <= 0)
        exponents.append(1 / (dual @ dual))
    bound = lambda part: np.mean(2 * (d - k) * np.exp(-part * np.array(exponents)))
    at_most("no dual vector, seeds 0-399", frequency(fails), bound(0.5))
    at_least("that without the 2", frequency(fails), bound(1))


def test_chernoff_for_boolean_inputs():
    """P(Z_S' Z_S has an eigenvalue below n(1-x)); not with n for n/kappa in the exponent."""
    n, k, x, num_draws = 120, 5, 0.35, 4000
    columns = np.random.default_rng(0).choice([-1.0, 1.0], (num_draws, n, k))
    least = np.linalg.svd(columns, compute_uv=False)[:, -1] ** 2
    base = np.exp(-x) / (1 - x) ** (1 - x)
    at_most("a small eigenvalue, seed 0", frequency(least < n * (1 - x)), k * base ** (n / k))
    at_least("that with n", frequency(least < n * (1 - x)), k * base**n)


def test_the_largest_of_gaussian_numbers():
    """Lemma D.9: E max|z_i| <= sqrt(2 ln 2d); without the 2 it fails."""
    for d in (2, 20, 400):
        largest = np.max(np.abs(np.random.default_rng(d).normal(size=(4000, d))), axis=1)
        mean, error = np.mean(largest), np.std(largest) / np.sqrt(len(largest))
        at_most(f"E max of {d}", mean - 4 * error, np.sqrt(2 * np.log(2 * d)))
        assert mean - 4 * error > np.sqrt(np.log(2 * d)) * 0.75 or d == 2


def test_bad_input():
    inputs, truth = sparse("gaussian", 4, 8, 2, 0)
    for word, call in {
        "column 1 is zero": lambda: theory.sparse_recovery_certificate(
            inputs * (np.arange(8) != 1), truth
        ),
        "truth: got shape (7,)": lambda: theory.sparse_recovery_certificate(inputs, truth[1:]),
        "weights: got 0.0": lambda: theory.sparse_recovery_certificate(
            inputs, truth, weights=np.zeros(8)
        ),
        "between 1 and d - 1 = 4": lambda: theory.sparse_recovery_sample_size(5, 5),
        "failure_probability: got 1.0": lambda: theory.sparse_recovery_sample_size(
            5, 1, failure_probability=1.0
        ),
        'expected "gaussian" or "boolean"': lambda: theory.sparse_recovery_sample_size(
            5, 1, design="fourier"
        ),
        "num_examples must be a positive integer": lambda: theory.kernel_regime_error_bound(
            -1, truth
        ),
        "truth: got shape (4, 8)": lambda: theory.kernel_regime_error_bound(1, inputs),
    }.items():
        with refused(ValueError, word):
            call()
