"""In which stages gradient descent on ⟨β⊙β, x⟩ finds a sparse truth [Ma2022, section 9.2].

The signal grows first, the noise stays what it was; inputs whose correlations are small enough
behave like the population. Where the lecture notes print another bound, it is rejected here.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import manifoldflow as mf
from checks import at_least, at_most, close, in_window, refused
from manifoldflow import theory

RATE, SIZE = 0.1, 12


def inputs_of(gram):
    """Square X with XᵀX/n = this matrix."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(len(gram)) * (vectors * np.sqrt(values)) @ vectors.T


def correlated(delta, seed):
    """XᵀX/n = I + E with random entries of E up to δ."""
    noise = np.random.default_rng(seed).uniform(-delta, delta, (SIZE, SIZE))
    noise = np.tril(noise, -1)
    noise += noise.T
    noise[0, 1] = noise[1, 0] = delta
    return inputs_of(np.eye(SIZE) + noise)


def truth_of(sparsity):
    return (np.arange(SIZE) < sparsity).astype(float)


def descended(inputs, truth, scales, num_steps):
    """β after 0, 1, …, num_steps steps of gradient descent on the empirical loss, for each α."""
    model = mf.models.QuadraticallyParametrized(inputs, inputs @ truth)
    run = lambda start: mf.simulate(
        model.loss, mf.IsotropicNoise(0.0), optax.sgd, start, learning_rate=RATE,
        num_steps=num_steps, num_saves=num_steps, key=jr.key(0),
    ).points  # fmt: skip
    return np.asarray(jax.jit(jax.vmap(run))(jax.vmap(model.initial)(jnp.asarray(scales))))


# --- The stages: Theorem 9.14, Lemmas 9.16 and 9.17 --------------------------------------------

SCALES = np.array([1e-2, 1e-3, 1e-4])
CASES = [(1, 0.02, 0), (1, 0.02, 1), (2, 0.008, 2), (3, 0.005, 3)]


@pytest.mark.parametrize("sparsity, delta, seed", CASES)
def test_the_stages_bound_gradient_descent(sparsity, delta, seed):
    """Signal and noise stay within their bounds, and the truth is found in the time promised."""
    inputs, truth = correlated(delta, seed), truth_of(sparsity)
    stages = [theory.recovery_stages(inputs, truth, scale=a, learning_rate=RATE) for a in SCALES]
    assert all(isinstance(s, theory.RecoveryStages) and s.is_shown for s in stages)
    num_steps = int(max(s.noise_steps for s in stages))
    for stage, path in zip(stages, descended(inputs, truth, SCALES, num_steps)):
        name = f"α = {stage.scale}, seed {seed}"
        close(f"δ, {name}", stage.distortion, delta, 1e-12)
        till = int(stage.noise_steps)
        path = path[: till + 1]
        signal, noise = path[:, :sparsity], path[:, sparsity:]
        low, high = stage.signal_bounds(till)
        at_least(f"signal over its lower bound, {name}", np.min(signal - low[:, None]), -1e-13)
        at_most(f"signal over its upper bound, {name}", np.max(signal - high[:, None]), 1e-13)
        bound = stage.noise_bound(np.arange(till + 1))
        at_most(f"noise over its bound, {name}", np.max(noise.max(1) / bound), 1 + 1e-12)
        at_most(f"the bound over 2α, {name}", bound[-1] / (2 * stage.scale), 1.0)
        errors = np.abs(signal[1:] - (1 + RATE * (1 - signal[:-1] ** 2)) * signal[:-1])
        share = np.max(errors / (RATE * stage.drift_error * signal[:-1]))
        at_most(f"Lemma 9.17, share of ηρr, {name}", share, 1.0)
        for what, level, steps in (
            ("half", 0.5, stage.half_steps),
            ("fit", np.sqrt(1 - stage.drift_error) - stage.drift_error, stage.fit_steps),
        ):
            taken = np.argmax(np.min(signal, axis=1) > level)
            in_window(f"steps to {what} over their bound, {name}", taken / steps, 0.4, 1.0)
        late = np.sum((path[int(stage.fit_steps) :] ** 2 - truth) ** 2, axis=1)
        at_most(f"|β⊙β − w*|², {name}", late.max(), stage.error)


def test_the_growth_of_the_noise_is_attained():
    """Correlations δ of all with the truth: each step multiplies the noise by 1 + ηδ at first.

    So |ζ|² grows with the exponent 2t, and from α²d, not with t from α√d as printed in (9.72).
    """
    delta, alpha, truth = 0.05, 1e-6, truth_of(1)
    gram = np.eye(SIZE)
    gram[0, 1:] = gram[1:, 0] = delta
    inputs = inputs_of(gram)
    stage = theory.recovery_stages(inputs, truth, scale=alpha, learning_rate=RATE)
    noise = descended(inputs, truth, [alpha], 60)[0, :, 1:]
    times = np.arange(len(noise))
    close("attained", noise.max(1), stage.noise_bound(times), 1e-8)
    squares = np.sum(noise**2, axis=1)
    once = (1 + RATE * delta) ** times
    at_most("exponent 2t, from α²(d − 1)", np.max(squares / (alpha**2 * 11 * once**2)), 1 + 1e-8)
    at_least("exponent t is passed", squares[-1] / (alpha**2 * 11 * once[-1]), 1.3)
    at_most("|ζ₀|² over the printed α√d", squares[0] / (alpha * np.sqrt(SIZE)), 1e-4)


def test_the_time_is_log_one_over_alpha():
    """Steps to |β⊙β − w*|² < 10⁻³ grow like log(1/α)/log(1 + η); after α·log(1/δ)/η none is fit.

    The latter is the time printed in Theorem 9.14.
    """
    alphas = np.array([1e-2, 1e-4, 1e-6, 1e-8])
    paths = descended(correlated(0.02, 0), truth_of(1), alphas, 280)
    errors = np.sum((paths**2 - truth_of(1)) ** 2, axis=2)
    steps = np.argmax(errors < 1e-3, axis=1)
    slope = np.polyfit(np.log(1 / alphas), steps, 1)[0]
    in_window("steps an e-fold of α, times log(1 + η)", slope * np.log1p(RATE), 0.95, 1.05)
    for alpha, error in zip(alphas, errors):
        printed = int(np.ceil(alpha * np.log(1 / 0.02) / RATE))
        at_least(f"error at the printed time, {printed} steps, α = {alpha}", error[printed], 0.99)


def test_single_columns_do_not_say_enough():
    """Two equal columns keep the norms of 1-sparse vectors, and gradient descent cannot tell them.

    So Lemma 9.11 and Corollary 9.12 are false for r = 1, and Theorem 9.14 needs pairs of columns.
    """
    inputs = np.array(correlated(0.02, 0))
    inputs[:, 1] = inputs[:, 0]
    single = theory.restricted_isometry(inputs, 1)
    at_most("δ₁", single.lower, 1e-12)
    gram = inputs.T @ inputs / SIZE
    at_least("⟨Xe₁, Xe₂⟩/n − ⟨e₁, e₂⟩ over the printed 4δ₁", gram[0, 1] - 4 * single.lower, 0.99)
    stage = theory.recovery_stages(inputs, truth_of(1), scale=1e-3, learning_rate=RATE)
    assert not stage.is_shown and stage.noise_steps == 0 and np.isinf(stage.fit_steps)
    path = descended(inputs, truth_of(1), [1e-3], 300)[0]
    at_least("least |β⊙β − w*|²", np.sum((path**2 - truth_of(1)) ** 2, axis=1).min(), 0.45)


def test_few_examples_show_nothing():
    """Gaussian inputs: δ falls like √(log d/n), so that the theorem speaks from some n on."""
    draws = np.random.default_rng(0).normal(size=(16_000, SIZE))
    found = {
        n: theory.recovery_stages(draws[:n], truth_of(1), scale=1e-3, learning_rate=RATE)
        for n in (20, 1_000, 16_000)
    }
    assert [s.is_shown for s in found.values()] == [False, False, True]
    fall = found[1_000].distortion / found[16_000].distortion
    in_window("δ at n over δ at 16n, expected about 4", fall, 2.8, 5.7)


# --- The population: Theorem 9.13 ---------------------------------------------------------------


def test_population_flow_in_closed_form():
    """Against a solver, for weights of every sign; and where numbers overflow."""
    weights = np.array([1.0, 0.3, 0.0, -0.7, 2.0, 1.0])
    start = np.array([0.01, 1.4, 0.5, 0.9, -0.02, 0.0])
    times = np.array([0.0, 0.5, 3.0, 11.0])
    found = theory.quadratically_parametrized_flow(weights, start, time=times)
    solved = solve_ivp(
        lambda t, b: (weights - b**2) * b, (0, 11.0), start, t_eval=times, rtol=1e-11, atol=1e-13
    )
    close("b(t)", found, solved.y.T, 1e-9)
    assert found.shape == (4, 6)
    one = lambda w, b, t: theory.quadratically_parametrized_flow(
        np.ones(1) * w, np.ones(1) * b, time=t
    )
    at = lambda w, b, t: one(w, b, t)[0]
    close("late", at(4.0, 1e-200, 1e4), 2.0, 1e-15)
    close("e^{wt}b at first", at(1.0, 1e-200, 9.0), 1e-200 * np.exp(9.0), 1e-12)
    close("from afar 1/√(2t)", at(0.0, 1e200, 8.0), 0.25, 1e-15)
    assert at(-900.0, 1.0, 10.0) == 0.0 and at(-900.0, 0.0, 10.0) == 0.0
    close("weights near 0 are like 0", at(1e-18, 0.3, 2.0), at(0.0, 0.3, 2.0), 1e-15)


def test_population_flow_is_that_of_the_model():
    """Gradient flow on data with XᵀX = nI, by the library's own solver."""
    inputs = inputs_of(np.eye(SIZE))
    truth = truth_of(2)
    model = mf.models.QuadraticallyParametrized(inputs, inputs @ truth)
    start = jnp.linspace(0.05, 0.4, SIZE)
    flowed = mf.solve(mf.GradientFlow(model.loss), start, end_time=4.0, rtol=1e-9, atol=1e-12).final
    close("b(4)", flowed, theory.quadratically_parametrized_flow(truth, start, time=4.0), 1e-7)


def test_off_the_support_the_population_only_falls():
    """β ≤ α at every step: the window t ≤ 1/(10ηα²) of Theorem 9.13, case 2, is not needed."""
    alpha, truth = 0.3, truth_of(1)
    path = descended(inputs_of(np.eye(SIZE)), truth, [alpha], 600)[0]
    window = 1 / (10 * RATE * alpha**2)
    assert 10 * window < 600, "far beyond it"
    at_most("largest step upwards off the support", np.max(np.diff(path[:, 1:], axis=0)), 0.0)
    at_most("β over α", path[:, 1:].max() / alpha, 1.0)


# --- What restricted isometry gives: Lemma 9.11, Corollary 9.12 ---------------------------------


def largest_bilinear(gram, sparsity):
    """max |⟨v, (G − I)w⟩| over unit v, w with at most so many entries, over all supports."""
    error = gram - np.eye(len(gram))
    supports = list(itertools.combinations(range(len(gram)), sparsity))
    return max(np.linalg.norm(error[np.ix_(s, t)], 2) for s in supports for t in supports)


def block(size, away):
    """G that keeps norms of `size` entries as badly as it must for products of two such vectors."""
    gram = np.eye(8)
    gram[:size, size : 2 * size] = away / size
    gram[size : 2 * size, :size] = away / size
    return gram


@pytest.mark.parametrize("sparsity, factor", [(2, 2), (3, 3), (4, 2)])
def test_products_of_sparse_vectors(sparsity, factor):
    """|⟨Xv, Xw⟩/n − ⟨v, w⟩| ≤ 2δ|v||w| (even r) or 3δ (odd r), by splitting the supports."""
    rng = np.random.default_rng(sparsity)
    shares = []
    for gram in [block(sparsity, 0.4)] + [np.cov(rng.normal(size=(8, 30))) for _ in range(3)]:
        found = theory.restricted_isometry(inputs_of(gram), sparsity)
        assert found.is_exact
        close("bound", found.bilinear_bound, factor * found.lower, 1e-12)
        shares.append(largest_bilinear(gram, sparsity) / found.lower)
    at_most("|⟨v, (G − I)w⟩| over δ", max(shares), factor)
    at_least("δ alone is not enough", max(shares), 1.2)


def test_no_bound_from_single_columns():
    found = theory.restricted_isometry(np.ones((5, 3)), 1)
    at_most("δ₁", found.lower, 1e-12)
    assert np.isinf(found.bilinear_bound)
    searched = theory.restricted_isometry(np.asarray(jr.normal(jr.key(0), (50, 80))), 4)
    assert not searched.is_exact
    close(
        "from the upper bound where δ is not known", searched.bilinear_bound, 2 * searched.upper, 0
    )


def test_dense_noise_has_its_bound_from_its_length():
    """|Gζ²|_∞ ≤ |ζ|²_∞ + δ|ζ|₂² (9.57); Corollary 9.12 applied to the dense ζ² is false (9.55)."""
    size, delta = 100, 0.02
    gram = (1 - delta) * np.eye(size) + delta
    two = theory.restricted_isometry(inputs_of(gram), 2)
    close("δ₂", two.lower, delta, 1e-8)
    zeta = np.full(size, 0.1)
    found = np.max(gram @ zeta**2)
    length = np.sum(zeta**2)
    at_most("(9.57) with δ", found / (np.max(zeta) ** 2 + delta * length), 1.0)
    printed = np.max(zeta) ** 2 + 4 * two.lower * np.linalg.norm(zeta**2)
    at_least("over the printed (9.55)", found / printed, 1.5)


# --- Beside it: the Lasso (9.8) -----------------------------------------------------------------


def test_early_stopping_is_no_worse_than_the_lasso():
    """On noisy targets the best step of gradient descent finds more than the best λ of the Lasso.

    60 examples with 100 features, three draws: the Lasso shrinks what it finds by λ, gradient
    descent does not. The interpolant of least ℓ₁ norm, λ → 0, is far off.
    """
    from sklearn.linear_model import lasso_path

    size, truth = 100, np.r_[np.ones(2), np.zeros(98)]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(60, size))
        targets = inputs @ truth + 0.5 * rng.normal(size=60)
        gram, right = inputs.T @ inputs / 60, inputs.T @ targets / 60
        penalties = right.max() * np.geomspace(1, 1e-3, 60)
        _, weights, _ = lasso_path(inputs, targets, positive=True, alphas=penalties)
        lasso = np.sum((weights.T - truth) ** 2, axis=1)
        beta, stopped = np.full(size, 1e-5), []
        for _ in range(400):
            beta = beta - RATE * beta * (gram @ beta**2 - right)
            stopped.append(np.sum((beta**2 - truth) ** 2))
        ratio = min(stopped) / lasso.min()
        in_window(f"best error² of GD over the Lasso's, seed {seed}", ratio, 0.02, 1.0)
        at_least(f"λ → 0 over the best λ, seed {seed}", lasso[-1] / lasso.min(), 5.0)


# --- Bad input ----------------------------------------------------------------------------------


def test_bad_input():
    good = {"inputs": np.eye(3) * np.sqrt(3), "truth": np.array([1.0, 0, 0])}
    both = {"scale": 0.1, "learning_rate": 0.1}
    for words, wrong in {
        "zeros and ones": {"truth": np.array([0.5, 0, 0])},
        "at least one": {"truth": np.zeros(3)},
        "less than 1/2": {"scale": 0.6},
        "a larger signal stays": {"learning_rate": 0.7},
    }.items():
        with refused(ValueError, words):
            theory.recovery_stages(**(good | both | wrong))
    with refused(ValueError, "weights: got shape ()"):
        theory.quadratically_parametrized_flow(1.0, np.ones(1), time=1.0)
    with refused(ValueError, "time: got"):
        theory.quadratically_parametrized_flow(np.ones(1), np.ones(1), time=-1.0)
