"""Deep linear networks at any weights and residuals [Ziyin2024, Theorem E.1]."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import models, symmetry, theory

KEY, ETA, COUNT = jr.key(0), 0.03, 5
RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.normal(size=(COUNT, 3)), RNG.normal(size=(COUNT, 2)) * [1.0, 2.0]
WEIGHTS = tuple(RNG.normal(size=shape) for shape in ((3, 3), (4, 3), (2, 4)))
DRAWS = [(1, False), (2, False), (2, True), (None, False)]


def product_of(weights):
    found = weights[0]
    for layer in weights[1:]:
        found = layer @ found
    return found


def example_loss(weights, example):
    x, y = example
    return jnp.sum((product_of(weights) @ x - y) ** 2)


@jax.jit
def gradients(weights):
    of = lambda x, y: jax.grad(example_loss)(weights, (x, y))
    return jax.vmap(of)(jnp.asarray(INPUTS), jnp.asarray(TARGETS))


def charges(weights):
    return [after.T @ after - before @ before.T for before, after in zip(weights, weights[1:])]


def mean_changes(weights, batch_size, replacement):
    """E[C₁] − C₀ of one step of SGD, from every batch."""
    size = batch_size or COUNT
    chosen = (
        itertools.product(range(COUNT), repeat=size)
        if replacement
        else itertools.combinations(range(COUNT), size)
    )
    each = [np.asarray(g) for g in gradients(weights)]
    ends = [
        charges([w - ETA * g[list(batch)].mean(0) for w, g in zip(weights, each)])
        for batch in chosen
    ]
    return [np.mean(end, axis=0) - start for end, start in zip(zip(*ends), charges(weights))]


@pytest.mark.parametrize(("batch_size", "replacement"), DRAWS)
def test_the_sides_are_what_a_step_does_to_the_charges(batch_size, replacement):
    """At weights that are no minimum. Larger batches need their own sides: those of Theorem E.1
    as printed are for batches of one."""
    options = {"batch_size": batch_size, "replacement": replacement}
    changes = mean_changes(WEIGHTS, batch_size, replacement)
    found = theory.deep_linear_sides_of_examples(WEIGHTS, INPUTS, TARGETS, **options)
    printed = theory.deep_linear_sides_of_examples(WEIGHTS, INPUTS, TARGETS)
    for change, (left, right), (p_left, p_right) in zip(changes, found, printed, strict=True):
        close("E[C₁] − C₀", 4 * ETA**2 * (left - right), change, 1e-10)
        if batch_size != 1:
            wrong = 4 * ETA**2 * (p_left - p_right)
            at_least("as printed", np.linalg.norm(wrong - change) / np.linalg.norm(change), 0.1)


def test_the_theorem_is_not_of_the_limit_of_small_learning_rates():
    """Its Σ is centred, (109) is not: away from minima dC/dt is not 8σ² times their difference;
    at a minimum it is."""
    data, sigma2 = (jnp.asarray(INPUTS), jnp.asarray(TARGETS)), 0.01
    flattest = np.linalg.lstsq(INPUTS, TARGETS, rcond=None)[0].T
    there = (*WEIGHTS[:2], flattest @ np.linalg.pinv(WEIGHTS[1] @ WEIGHTS[0]))
    for weights, agrees in ((WEIGHTS, False), (there, True)):
        left, right = theory.deep_linear_sides_of_examples(weights, INPUTS, TARGETS)[0]
        drift = symmetry.charge_drift(
            lambda w: jnp.sum(w[1][:, 0] * w[1][:, 1]) - jnp.sum(w[0][0] * w[0][1]),
            example_loss, tuple(map(jnp.asarray, weights)), data, noise_scale=sigma2,
        )  # fmt: skip
        gap = abs(float(drift) / (8 * sigma2 * (left - right)[0, 1]) - 1)
        at_most("gap at a minimum", gap, 1e-9) if agrees else at_least("gap elsewhere", gap, 0.01)


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize(("batch_size", "replacement"), DRAWS)
def test_factors_of_any_product_are_balanced(depth, batch_size, replacement):
    """At products that are no minimum, of full and lower rank, in wide layers."""
    options = {"batch_size": batch_size, "replacement": replacement}
    for product in (product_of(WEIGHTS), np.outer([1.0, -0.5], [0.3, 1.0, 2.0])):
        widths = [3, 2, 4, 2][: depth - 1]
        weights = theory.deep_linear_equilibrium_of_examples(
            product, INPUTS, TARGETS, widths=widths, key=KEY, **options
        )
        assert [w.shape for w in weights] == list(zip([*widths, 2], [3, *widths]))
        close("W_D … W_1", product_of(weights), product, 1e-12)
        sides = theory.deep_linear_sides_of_examples(weights, INPUTS, TARGETS, **options)
        gaps = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in sides]
        at_most("imbalance", max(gaps), 1e-11)


def test_no_rotation_of_a_hidden_layer_moves_there():
    """By the gradients of the examples: λ* = 0 for random B in every hidden layer, at a product
    that is no minimum; in the limit of small learning rates the equilibrium is another one."""
    data = jnp.asarray(INPUTS), jnp.asarray(TARGETS)
    found = theory.deep_linear_equilibrium_of_examples(
        product_of(WEIGHTS), INPUTS, TARGETS, widths=[2, 2], key=KEY, batch_size=2
    )
    point, rng = tuple(map(jnp.asarray, found)), np.random.default_rng(1)
    for layer in (0, 1):
        root = rng.normal(size=(2, 2))
        one = symmetry.double_rotation(
            point, lambda w, i=layer: w[i + 1], lambda w, i=layer: w[i], root + root.T
        )
        star = lambda **options: symmetry.noise_equilibrium(
            one, example_loss, point, data, **options
        )
        at_most("|λ*|", abs(star(learning_rate=ETA, batch_size=2)), 1e-11)
        at_least("|λ*| in the limit", abs(star(noise_scale=1.0)), 1e-4)


def test_independent_noise_is_the_closed_form():
    """Theorem 5.4: x and ε on all pairs, so that E[|ε|²xxᵀ] = trΣ_ε Σ_x."""
    rng = np.random.default_rng(2)
    x, noise, target = (rng.normal(size=shape) for shape in ((4, 3), (3, 2), (2, 3)))
    noise = np.concatenate([noise, -noise])
    inputs, added = np.repeat(x, len(noise), 0), np.tile(noise, (len(x), 1))
    moments = inputs.T @ inputs / len(inputs), added.T @ added / len(added)
    for widths in ([2], [4, 3], [2, 3, 2]):
        found = theory.deep_linear_equilibrium_of_examples(
            target, inputs, inputs @ target.T + added, widths=widths, key=KEY
        )
        exact = theory.deep_linear_noise_equilibrium(target, *moments, widths=widths, key=KEY)
        for one, other in zip(found, exact, strict=True):
            close("singular values", *(np.linalg.svd(w)[1] for w in (one, other)), 1e-10)
        close("W_1ᵀW_1", found[0].T @ found[0], exact[0].T @ exact[0], 1e-10)


def test_sgd_ends_there_and_not_at_the_closed_form():
    """Residuals that are large where the map looks little: gains 1.32 and 0.69 (twice), by two
    step sizes; the formula for independent noise has 0.85 for all."""
    signs = np.array([1.0, -1.0])
    inputs = np.concatenate([np.outer(np.repeat(signs, 2), axis) for axis in np.eye(2)])
    noise = np.tile(signs, 4) * np.repeat([0.2, 0.6], 4)
    data = models.FiniteData(inputs, (inputs @ [1.0, 0.5] + noise)[:, None])
    net = models.DeepLinear(data, [1, 1])
    found = theory.deep_linear_equilibrium_of_examples(
        data.target_map, data.inputs, data.targets, widths=[1, 1], key=KEY
    )
    exact = np.asarray(net.layer_gains(tuple(map(jnp.asarray, found))))

    def late(rate, seeds=24):
        @jax.jit
        @jax.vmap
        def run(key):
            of_start, of_steps = jr.split(key)
            return mf.simulate(
                net.loss, net.noise(1), optax.sgd, net.initial(of_start, (0.5, 0.5, 0.5)),
                learning_rate=rate, num_steps=int(60 / rate**2), num_saves=120, key=of_steps,
                observe={"gains": net.layer_gains},
            ).observables["gains"]  # fmt: skip

        means = np.asarray(run(jr.split(jr.key(0), seeds)))[:, 60:].mean(axis=1)
        return means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(seeds)

    (coarse, coarse_error), (fine, fine_error) = late(0.08), late(0.04)
    limit = 2 * fine - coarse  # what is left is of order η²
    error = np.sqrt(4 * fine_error**2 + coarse_error**2)
    gap, remainder = np.abs(limit - exact), np.abs(fine - coarse) / 2
    at_most("gap over what is allowed", np.max(gap / (4 * error + remainder)), 1)
    at_most("gap", np.max(gap / exact), 0.03)
    white = np.asarray(net.layer_gains(net.equilibrium(KEY)))
    at_least("gap from the closed form, over the error", np.min(np.abs(limit - white) / error), 20)


def test_what_has_no_equilibrium_is_refused():
    full = product_of(WEIGHTS)
    find = lambda product=full, widths=(2,), inputs=INPUTS, **options: (
        theory.deep_linear_equilibrium_of_examples(
            product, inputs, TARGETS, widths=widths, key=KEY, **options
        )
    )
    with refused(ValueError, "no finite equilibrium", "reach less than all of product"):
        find(inputs=INPUTS * [1.0, 0.0, 0.0])
    with refused(ValueError, "product: got 0"):
        find(np.zeros((2, 3)))
    with refused(ValueError, "width: got 1, expected at least 2"):
        find(widths=(1,))
    with refused(ValueError, "at least one hidden layer"):
        find(widths=())
    with refused(ValueError, "batch_size: got 6, more than the 5 examples"):
        find(batch_size=6)
    with refused(ValueError, "expected (N, 3) and (N, 2)"):
        find(inputs=INPUTS[:, :2])
