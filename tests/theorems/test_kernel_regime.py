"""[LiWangArora2022, section 6.3]: gradient descent in the kernel regime, and how it is left.

Theorem 6.7: on f_i = <z_i, u² − v²> linearised at u = v = α1, gradient descent with any learning
rates has after any number of steps an expected error of at least (1 − n/d)|w*|². Beyond its
letter: Boolean inputs, for which the projection on the span is (n/d)I on average as well.
"""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, in_window, slope
from manifoldflow import theory
from manifoldflow.diagnostics import kernel_change
from quick import long_jit

SILENT = mf.IsotropicNoise(0.0)


def problem(key, n, d, sparsity, design):
    inputs, targets, truth = mf.models.sparse_regression(key, n, d, sparsity, design=design)
    return mf.models.OverparametrizedLinear(inputs, targets), truth


def weights_of(loss, point):
    """The w of a prediction <z, w>."""
    d = loss.inputs.shape[1]
    return jax.vmap(lambda e: loss.predict(point, e))(jnp.eye(d))


# --- The linearised model on these inputs --------------------------------------------------


def test_gradients_at_the_start_are_twice_what_is_printed():
    """∇f_i = [2αz_i, −2αz_i]; §6.3 and (69) print [αz_i, −αz_i]. f = 0 there."""
    model, _ = problem(jr.key(0), 5, 8, 2, "gaussian")
    alpha, z = 1.7, np.asarray(model.inputs)
    start = model.initial(alpha)
    rows = model.loss.jacobian(start).as_matrix()
    close("∇f", rows, np.hstack([2 * alpha * z, -2 * alpha * z]), 1e-14)
    at_least("from what is printed", np.linalg.norm(rows - alpha * np.hstack([z, -z])), 1)
    at_most("f", np.max(np.abs(model.loss.outputs(start))), 1e-14)


def test_gradient_descent_is_that_of_linear_regression():
    """With w = 2α(u − v), and 8α²η for η; with the printed gradients it would be 2α²η."""
    model, _ = problem(jr.key(1), 6, 10, 2, "boolean")
    alpha, rate, steps = 2.0, 1e-3, 40
    start = model.initial(alpha)
    lazy = mf.linearized(model.loss, start)
    end = mf.simulate(
        lazy, SILENT, optax.sgd, start, learning_rate=rate, num_steps=steps, key=jr.key(0)
    ).final
    found = weights_of(lazy, end)
    close("w = 2α(u − v)", found, 2 * alpha * (end["u"] - end["v"]), 1e-12)
    regression = mf.models.LinearRegression(model.inputs, model.targets)
    by_hand = lambda gain: regression.descent(np.zeros(10), gain * rate, steps)
    close("w after 40 steps", found, by_hand(8 * alpha**2), 1e-12)
    at_least("as printed", np.linalg.norm(found - by_hand(2 * alpha**2)), 0.1)


# --- Theorem 6.7 ---------------------------------------------------------------------------

D, STEPS, SAVES, SEEDS = 30, 48, 6, 200
COUNTS, SPARSITIES = (6, 15, 24, 30), (2, 5, 10)
SCHEDULES = ("constant", "falling", "far too large at random", "constant, label noise")


@long_jit
def descents(inputs, truth, rates, noise_stds):
    """w after 8, 16, …, 48 steps for every draw of the inputs and every schedule."""

    def one(inputs, truth, rates):
        model = mf.models.OverparametrizedLinear(inputs, inputs @ truth)
        start = model.initial(3.0)
        lazy = mf.linearized(model.loss, start)

        def run(rates, std):
            schedule = jax.tree_util.Partial(lambda rates, k: rates[k], rates)
            walk = mf.simulate(
                lazy, mf.LabelNoise(std), optax.sgd, start, learning_rate=schedule,
                num_steps=STEPS, num_saves=SAVES, key=jr.key(0), throw=False,
            )  # fmt: skip
            return jax.vmap(lambda point: weights_of(lazy, point))(walk.points)[1:]

        return jax.vmap(run)(rates, noise_stds)

    return jax.vmap(one)(inputs, truth, rates)


def drawn(design, n, sparsity, seed=7):
    """Inputs, of which rows from n on are zero, truths and the learning rates of all steps."""
    rng, shape = np.random.default_rng(seed), (SEEDS, D, D)
    inputs = rng.choice([-1.0, 1.0], shape) if design == "boolean" else rng.normal(size=shape)
    inputs = inputs * (np.arange(D) < n)[:, None]
    truth = rng.choice([-1.0, 1.0], (SEEDS, D)) * (np.arange(D) < sparsity)
    # In units of 1/λ_max, λ_max = 8α²|Z|²/d: above 2 they make w grow.
    in_units = np.stack(np.broadcast_arrays(
        0.9, 1.9 / (1 + np.arange(STEPS)), 4.5 * rng.uniform(size=(SEEDS, STEPS)), 0.9
    ), axis=1)  # fmt: skip
    largest = 8 * 9 * np.linalg.norm(inputs, 2, axis=(1, 2)) ** 2 / D
    return inputs, truth, in_units / largest[:, None, None]


def seen(inputs, truth):
    """The projection P on the span of the inputs, its rank, and |w* − Pw*|²."""
    _, sizes, rows = np.linalg.svd(inputs)
    rank = int(np.sum(sizes > 1e-10 * sizes[0]))
    projection = rows[:rank].T @ rows[:rank]
    return projection, rank, np.sum((truth - projection @ truth) ** 2)


@pytest.mark.parametrize("design", ("gaussian", "boolean"))
def test_the_bound_holds_for_any_learning_rates_and_any_number_of_steps(design):
    for n, sparsity in itertools.product(COUNTS, SPARSITIES):
        inputs, truth, rates = drawn(design, n, sparsity)
        found = np.asarray(descents(inputs, truth, rates, np.array([0, 0, 0, 1.0])))
        where = f"{design}, n={n}, κ={sparsity}, seed 7"
        projections, ranks, unseen = map(np.array, zip(*map(seen, inputs, truth)))
        outside = found - np.einsum("sij,sabj->sabi", projections, found)
        sizes = np.linalg.norm(found, axis=-1)
        at_least(f"{where}: the largest w of rates {SCHEDULES[2]}", sizes[:, 2].max(), 100)
        # u and v near 3 are rounded at every step, and that is in w six times over.
        part = (np.linalg.norm(outside, axis=-1) / (1 + sizes)).max()
        at_most(f"{where}: of w outside the span", part, 1e-11)
        errors = np.sum((found - truth[:, None, None]) ** 2, axis=-1)
        excess = (errors - unseen[:, None, None]) / (1 + errors)
        at_least(f"{where}: |w − w*|² − |w* − Pw*|²", excess.min(), -1e-12)
        # E|w* − Pw*|² = (1 − E rank/d)|w*|²: the bound itself, if all inputs have rank n.
        bound, exact = theory.kernel_regime_error_bound(n, truth[0]), 1 - np.mean(ranks) / D
        mean, deviation = np.mean(unseen), np.std(unseen, ddof=1) / np.sqrt(SEEDS)
        at_least(f"{where}: exact", exact * sparsity, bound)
        at_most(f"{where}: |mean − exact|", abs(mean - exact * sparsity), 4 * deviation + 1e-12)
        at_least(f"{where}: least mean error", errors.mean(axis=0).min(), bound - 4 * deviation)
        if n == 6:
            # Attained by steps that converge, so that no larger bound holds.
            attained = errors.mean(axis=0)[0, -1]
            at_most(f"{where}: attained", attained, bound + 4 * deviation)
            wrong = (1 - n / (2 * D)) * sparsity
            at_most(f"{where}: 1 − n/2d is rejected", attained, wrong - 4 * deviation)


# --- How it is left ------------------------------------------------------------------------


def kernel_of(inputs, squares):
    """4 Z diag(u² + v²) Zᵀ."""
    return 4 * (np.asarray(inputs) * np.asarray(squares)) @ np.asarray(inputs).T


def change_of(kernel, other):
    """Relative change and alignment, by hand."""
    product = np.linalg.norm(kernel) * np.linalg.norm(other)
    return np.linalg.norm(other - kernel) / np.linalg.norm(kernel), np.sum(kernel * other) / product


def test_the_kernel_of_gradient_flow_changes_like_the_fourth_power_of_the_scale():
    """uv = α² is kept, so u² + v² = √(w² + 4α⁴) = 2α²(1 + w²/8α⁴ + …) where it lands."""
    model, _ = problem(jr.key(3), 8, 16, 3, "gaussian")
    changes, scales = [], [1.0, 2.0, 4.0, 8.0]
    for alpha in scales:
        start = model.initial(alpha)
        found = kernel_change(model.loss, start, mf.limit_map(model.loss, start, rtol=1e-10))
        w = model.landing(alpha)
        kernels = [kernel_of(model.inputs, np.sqrt(x**2 + 4 * alpha**4)) for x in (0 * w, w)]
        change, alignment = change_of(*kernels)
        close(f"α = {alpha}", found.relative_change, change, 1e-5)
        allowed = 1e-4 * (1 - alignment) + 1e-14
        at_most(f"α = {alpha}, alignment", abs(found.alignment - alignment), allowed)
        changes.append(float(found.relative_change))
    in_window("slope in α", slope(scales[1:], changes[1:]), -4.1, -3.9)


RATES, SGD_STEPS, RUNS = (0.01, 0.005), 16_000, 48


def runs():
    """SGD with label noise from the kernel regime, u = v = 1, at two learning rates, and without.

    Saves are at t = 0.4, 0.8, … for the first and the last, at 0.1, 0.2, … for the second.
    """
    model, truth = problem(jr.key(5), 10, 16, 2, "gaussian")
    start = model.initial(1.0)

    def run(rate, std, key):
        walk = mf.simulate(
            model.loss, mf.LabelNoise(std), optax.sgd, start, learning_rate=rate,
            num_steps=SGD_STEPS, num_saves=4, key=key, throw=False,
        )  # fmt: skip
        measure = lambda point: kernel_change(model.loss, start, point).relative_change
        return jax.vmap(measure)(walk.points)[1:], jax.vmap(model.weights)(walk.points)[1:]

    members = long_jit(jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None)))
    rates, stds = jnp.array([*RATES, RATES[0]]), jnp.sqrt(jnp.array([10, 10, 0]))
    found = members(rates, stds, jr.split(jr.key(6), RUNS))
    return model, np.asarray(truth), tuple(map(np.asarray, found))


def test_label_noise_leaves_the_kernel_regime_as_its_flow_says():
    """Gradient flow lands with a kernel that is changed by 1 %; label noise takes it on along
    u² + v² = √(w(t)² + 4p(t)²), with the w(t) and p(t) = e^{−cst} of the closed form."""
    model, truth, (changes, weights) = runs()
    times, ones = np.array([0, 0.4, 0.44]), np.ones(16)
    w = model.flow(model.initial(1.0), times)
    p = theory.overparametrized_linear_charges(model.inputs, ones, ones, time=times)
    kernels = [kernel_of(model.inputs, np.sqrt(w**2 + 4 * p**2)) for w, p in zip(w, p)]
    first = kernel_of(model.inputs, 2 * ones)
    landed, early, wrong = (change_of(first, kernel)[0] for kernel in kernels)
    at_most("change of the kernel at Φ(x₀)", landed, 0.01)
    at_least("and at t = 0.4", early, 0.75)
    at_most("and after 16,000 steps of gradient descent", changes[2].max(), 0.01)
    # Twice the second minus the first removes the bias of order η.
    both = np.stack([changes[0, :, 0], changes[1, :, 3]])
    means, errors = both.mean(axis=1), both.std(axis=1, ddof=1) / np.sqrt(RUNS)
    gap, error = 2 * means[1] - means[0] - early, np.hypot(2 * errors[1], errors[0])
    allowed = 4 * error + 0.001  # what is left of the bias is of order η²
    at_most(f"|extrapolated − flow|, η = {RATES}, key 6", abs(gap), allowed)
    at_least("|extrapolated − flow on a clock 1.1 times as fast|", wrong - early - gap, allowed)
    unseen = seen(np.asarray(model.inputs), truth)[2]
    final = np.sum((weights[0, :, 3] - truth) ** 2, axis=1)
    high = np.mean(final) + 4 * np.std(final, ddof=1) / np.sqrt(RUNS)
    at_most("error at t = 1.6, and four errors of it, against the kernel regime", high, unseen / 2)
