"""Noise equilibria over GL(d): products of matrices balanced along all their symmetries at once."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import minimize

from checks import at_least, at_most, close, equal, refused
from manifoldflow import symmetry, theory
from quick import long_jit

SIGMA2 = 0.05
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))


def first(point):
    return point["U"]


def second(point):
    return point["W"]


def example_loss(point, example):
    x, y = example
    return jnp.sum((point["U"] @ (point["W"] @ x) - y) ** 2)


def problem(width, d_y, seed=1):
    """A finite set and random factors of its least-squares map, where the mean gradient is 0."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(12, d_y)) * np.linspace(1, 3, d_y)
    target = np.linalg.lstsq(X, y, rcond=None)[0].T
    u = rng.normal(size=(d_y, width))
    right = np.linalg.pinv(u)
    w = right @ target + (np.eye(width) - right @ u) @ rng.normal(size=(width, 3))
    return {"U": jnp.asarray(u), "W": jnp.asarray(w)}, (X, y)


WIDE, WIDE_DATA = problem(4, 2)  # 3 of the 4 hidden directions are read, 2 of them are needed
FULL, FULL_DATA = problem(3, 3)
OFF = {"U": FULL["U"], "W": 1.5 * FULL["W"]}  # the mean gradient is not zero
PROBLEMS = {"full": (FULL, FULL_DATA), "wide": (WIDE, WIDE_DATA)}
PRODUCT = symmetry.product_symmetry(FULL, first, second, name="U W")


def balanced(point, data, decay=0.0, symmetries=(PRODUCT,), **options):
    return symmetry.balance_with_info(
        point, (example_loss, data), noise_scale=SIGMA2, weight_decay=decay,
        symmetries=list(symmetries), **options,
    )  # fmt: skip


def drift(point, data, decay=0.0, product=PRODUCT, loss=example_loss):
    return np.asarray(
        symmetry.product_drift(product, loss, point, data, noise_scale=SIGMA2, weight_decay=decay)
    )


# --- Two layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_two_layers_are_balanced_as_the_theory_says(kind, decay):
    point, (x, y) = PROBLEMS[kind]
    there, info = balanced(point, (x, y), decay)
    assert bool(info.info.is_successful) and "U W: Q with eigenvalues from" in str(info), info
    close("function", there["U"] @ there["W"], point["U"] @ point["W"], 1e-12)
    residuals = x @ (point["U"] @ point["W"]).T - y
    matrices = theory.two_layer_noise_matrices(x, residuals, noise_scale=SIGMA2, weight_decay=decay)
    w, u = there["W"], there["U"]
    close("W G_W W' = U' G_U U", w @ matrices[0] @ w.T, u.T @ matrices[1] @ u, 1e-8)
    # The factors are those of the closed form, up to a rotation between them.
    closed = theory.two_layer_noise_equilibrium(
        point["U"] @ point["W"], *matrices, width=len(w), key=jr.key(0)
    )
    close("W'W", w.T @ w, closed[0].T @ closed[0], 1e-8)
    close("U U'", u @ u.T, closed[1] @ closed[1].T, 1e-8)
    size = np.linalg.norm(drift(point, (x, y), decay))
    at_most("drift of all charges", np.linalg.norm(drift(there, (x, y), decay)) / size, 1e-10)
    if kind == "full":
        (q,) = info.matrices
        close("Q", symmetry.ProductSymmetry.act(PRODUCT, point, q), there, 1e-10)
        close("Q is symmetric", q, jnp.swapaxes(q, 1, 2), 1e-12)


def test_it_is_the_least_of_decay_and_noise_on_the_orbit():
    """By gradients of the examples at points Q moves to, and another search, over all Q."""
    decay = 0.02

    @jax.jit
    @jax.value_and_grad
    def potential(entries):
        q = entries.reshape(3, 3)
        moved = {"U": OFF["U"] @ jnp.linalg.inv(q), "W": q @ OFF["W"]}
        rows = jax.vmap(lambda *e: jax.grad(example_loss)(moved, e))(*FULL_DATA)
        noise = sum(jnp.sum(jnp.var(leaf, axis=0)) for leaf in rows.values())
        return decay * sum(jnp.sum(x**2) for x in moved.values()) + SIGMA2 / 2 * noise

    found = minimize(potential, np.eye(3).ravel(), jac=True, method="BFGS", tol=1e-10)
    best = found.x.reshape(3, 3)
    (q,) = balanced(OFF, FULL_DATA, decay)[1].matrices
    close("P = Q'Q", q[0].T @ q[0], best.T @ best, 1e-6)
    close("potential", potential(q.ravel())[0], found.fun, 1e-9)
    # What balances one of the two terms against its own transpose is no minimum: Q for Q^-1.
    at_least("potential at 1/Q", potential(np.linalg.inv(q[0]).ravel())[0] / found.fun, 1.1)


def test_the_drift_of_the_matrix_charge_is_that_of_its_entries():
    """By Ito's formula for every entry of U'U - W W'; Proposition 5.1 prints half of it."""
    found = drift(OFF, FULL_DATA, 0.3)[0]
    charge = lambda p: p["U"].T @ p["U"] - p["W"] @ p["W"].T
    entries = [
        symmetry.charge_drift(
            lambda p, i=i, j=j: charge(p)[i, j], example_loss, OFF, FULL_DATA,
            noise_scale=SIGMA2, weight_decay=0.3,
        )
        for i, j in ((0, 0), (0, 2))
    ]  # fmt: skip
    close("dC/dt", [found[0, 0], found[0, 2]], entries, 1e-11)
    rows = jax.vmap(lambda *e: jax.grad(example_loss)(OFF, e))(*FULL_DATA)
    of_u, of_w = (rows[name] - rows[name].mean(axis=0) for name in "UW")
    printed = SIGMA2 * (
        np.einsum("nki,nkj->ij", of_u, of_u) - np.einsum("nik,njk->ij", of_w, of_w)
    ) / len(X)  # fmt: skip
    without_decay = drift(OFF, FULL_DATA)[0]
    close("twice what is printed", without_decay, 2 * printed, 1e-11)
    close("decay", found, without_decay - 4 * 0.3 * charge(OFF), 1e-11)
    close("charge", PRODUCT.charge(OFF)[0], charge(OFF), 1e-14)
    matrix = RNG.normal(size=(3, 3))
    matrix = matrix + matrix.T
    member = PRODUCT.member(OFF, matrix)
    by_hand = symmetry.double_rotation(OFF, first, second, matrix)
    close("member", member.act(OFF, 0.3), by_hand.act(OFF, 0.3), 1e-14)
    options = dict(noise_scale=SIGMA2, weight_decay=0.3)
    of_member = symmetry.noether_drift(member, example_loss, OFF, FULL_DATA, **options)
    close("dC_B/dt", of_member, np.sum(matrix * found) / 2, 1e-11)


def test_commuting_symmetries_leave_the_others_moving():
    """The mutant: d rescalings, or the diagonal alone, balance d charges of d^2."""
    size = np.linalg.norm(drift(FULL, FULL_DATA))
    diagonal = [symmetry.double_rotation(FULL, first, second, np.diag(row)) for row in np.eye(3)]
    there, _ = balanced(FULL, FULL_DATA, symmetries=diagonal)
    left = drift(there, FULL_DATA)[0]
    at_most("diagonal", np.max(np.abs(np.diag(left))) / size, 1e-9)
    at_least("off the diagonal", np.linalg.norm(left) / size, 0.05)


RUN_TIME, LEAST_RATE = 0.02, 2e-4


@functools.partial(long_jit, static_argnames="seeds")
def charges_of_runs(point, rate, seeds=3000):
    """How far U'U - W W' has gone in runs of SGD with batches of one, in units of sigma^2 times
    time, (seeds, 3, 3)."""
    x, y = (jnp.asarray(part) for part in FULL_DATA)
    charge = lambda p: p["U"].T @ p["U"] - p["W"] @ p["W"].T

    @jax.vmap
    def run(key):
        picks = jr.randint(key, (round(RUN_TIME / LEAST_RATE),), 0, len(x))

        def step(k, p):
            gradient = jax.grad(example_loss)(p, (x[picks[k]], y[picks[k]]))
            return jax.tree.map(lambda a, g: a - rate * g, p, gradient)

        num_steps = jnp.rint(RUN_TIME / rate).astype(int)
        return charge(jax.lax.fori_loop(0, num_steps, step, point)) - charge(point)

    return run(jr.split(jr.key(0), seeds)) / (rate / 2 * RUN_TIME)


def test_sgd_does_not_move_the_charges_at_the_balance():
    """Means over runs, extrapolated from two learning rates; from the start they go as the drift
    says, and from the balance of the diagonal alone they go as well."""
    there, _ = balanced(FULL, FULL_DATA)
    x, y = FULL_DATA
    moves = []
    for example in zip(x, y):
        gradient = jax.grad(example_loss)(there, example)
        after = jax.tree.map(lambda a, g: a - 0.01 * g, there, gradient)
        moves.append(PRODUCT.charge(after) - PRODUCT.charge(there))
    # One step with one example is exact: the mean gradient is zero here.
    size = np.max(np.abs(moves))
    at_most("mean of one step over one step", np.max(np.abs(np.mean(moves, axis=0))) / size, 1e-10)
    diagonal = [symmetry.double_rotation(FULL, first, second, np.diag(row)) for row in np.eye(3)]
    halfway, _ = balanced(FULL, FULL_DATA, symmetries=diagonal)
    unit = np.linalg.norm(drift(FULL, FULL_DATA)) / SIGMA2
    for what, point in (("start", FULL), ("balance", there), ("diagonal balance", halfway)):
        expected = drift(point, FULL_DATA)[0] / SIGMA2
        coarse, fine = (charges_of_runs(point, rate) for rate in (2 * LEAST_RATE, LEAST_RATE))
        found = 2 * np.mean(fine, axis=0) - np.mean(coarse, axis=0)
        spread = [np.std(runs, axis=0, ddof=1) for runs in (coarse, fine)]
        bars = np.sqrt((spread[0] ** 2 + 4 * spread[1] ** 2) / len(fine))
        # What the extrapolation leaves is of second order, well below a hundredth.
        gap = np.abs(found - expected) / (4 * bars + 0.01 * np.max(np.abs(expected)))
        at_most(f"charges from the {what} (seed 0), over their bounds", np.max(gap), 1)
        if what != "balance":
            signal = np.abs(found[0, 1]) / bars[0, 1]
            at_least(f"the {what} moves, in standard errors", signal, 50)
        at_most("4 standard errors, over the drift at the start", 4 * np.max(bars) / unit, 0.03)


def test_no_noise_no_way_and_no_balance():
    perfect = (X, X @ np.asarray(FULL["U"] @ FULL["W"]).T)
    # Rounding of the residuals is all the noise there is: give it exactly none.
    there, info = balanced(FULL, (np.zeros_like(X), np.zeros_like(perfect[1])))
    close("stays", there, FULL, 1e-14)
    assert bool(info.info.is_successful)
    point = {"U": jnp.array([[1.0]]), "W": jnp.array([[1.0, 0.0]])}
    inputs = np.array([[1.0, 0.3], [2.0, -1.0], [4.0, 2.0], [8.0, 1.0]])
    data = (inputs, inputs[:, :1] - 1 / inputs[:, :1])  # the gradient of U is the same in all
    with refused(eqx.EquinoxRuntimeError, "There is no balance", "weight_decay > 0", "U W"):
        balanced(point, data, throw=True)
    there, _ = balanced(point, data, 1e-4)
    close("function", there["U"] @ there["W"], point["U"] @ point["W"], 1e-10)


def test_what_is_no_product_is_refused():
    curved = lambda p, e: jnp.sum((p["U"] @ jax.nn.relu(p["W"] @ e[0]) - e[1]) ** 2)
    with refused(eqx.EquinoxRuntimeError, "does not have this symmetry"):
        symmetry.balance(FULL, (curved, FULL_DATA), symmetries=[PRODUCT])
    with refused(ValueError, "axes (0, 0)", "one length"):
        symmetry.product_symmetry(WIDE, first, second, axes=(0, 0))
    with refused(ValueError, "one for each leaf", "1 and 1"):
        symmetry.product_symmetry(WIDE, first, second, axes=((0, 1), 0))
    with refused(ValueError, "3, 3", "got shape (2, 2)"):
        PRODUCT.act(FULL, np.eye(2))
    with refused(ValueError, "must pick an equinox.nn.MultiheadAttention"):
        symmetry.attention_products(FULL, first)


def test_inside_jit_and_vmap_in_single_precision():
    single = jax.tree.map(lambda a: a.astype("float32"), FULL)
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), single)
    find = lambda p: balanced(p, FULL_DATA, 0.05, throw=False)[0]
    together = jax.jit(jax.vmap(find))(members)
    equal("dtype", together["U"].dtype, np.dtype("float32"))
    for index, member in enumerate((FULL, {k: 2 * v for k, v in FULL.items()})):
        found = jax.tree.map(lambda a: a[index], together)
        close("member", found, balanced(member, FULL_DATA, 0.05)[0], 1e-4)


# --- Deep linear networks: products that share a leaf ------------------------------------------


def test_deep_linear_networks_are_balanced_as_the_theory_says():
    rng = np.random.default_rng(2)
    roots = lambda s: np.sqrt(len(s)) * np.concatenate([np.diag(s) ** 0.5, -(np.diag(s) ** 0.5)])
    sigma_x, sigma_eps = np.array([2.0, 1.0, 0.5]), np.array([0.3, 1.0])
    weights = [rng.normal(size=shape) for shape in ((2, 3), (2, 2), (2, 2))]
    target = weights[2] @ weights[1] @ weights[0]
    # All pairs of these have the second moments of independent x and errors.
    x, errors = (
        np.array(part) for part in zip(*itertools.product(roots(sigma_x), roots(sigma_eps)))
    )
    y = x @ target.T + errors

    def loss(w, example):
        return jnp.sum((w[2] @ (w[1] @ (w[0] @ example[0])) - example[1]) ** 2)

    products = [
        symmetry.product_symmetry(weights, lambda w, i=i: w[i + 1], lambda w, i=i: w[i])
        for i in (0, 1)
    ]
    there, info = symmetry.balance_with_info(
        [jnp.asarray(w) for w in weights], (loss, (x, y)), symmetries=products
    )
    assert bool(info.info.is_successful), info.info.result
    close("product", there[2] @ there[1] @ there[0], target, 1e-11)
    expected = theory.deep_linear_noise_equilibrium(
        target, np.diag(sigma_x), np.diag(sigma_eps), widths=[2, 2], key=jr.key(0)
    )
    for layer, (found, wanted) in enumerate(zip(there, expected)):
        values = [np.linalg.svd(w, compute_uv=False) for w in (found, wanted)]
        close(f"singular values of layer {layer}", *values, 1e-7)


# --- Attention --------------------------------------------------------------------------------


class Attention(eqx.Module):
    layer: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.layer(x, x, x)


def heads(model):
    return model.layer


def test_every_head_of_attention_is_balanced():
    biases = dict(use_query_bias=True, use_value_bias=True, use_output_bias=True)
    layer = eqx.nn.MultiheadAttention(2, 4, qk_size=2, vo_size=3, key=jr.key(3), **biases)
    model, data = Attention(layer), tuple(jr.normal(jr.key(s), (8, 3, 4)) for s in (4, 5))
    loss = lambda m, e: jnp.sum((m(e[0]) - e[1]) ** 2)
    products = symmetry.attention_products(model, heads, name="block")
    options = dict(noise_scale=SIGMA2, weight_decay=0.01)
    there, info = symmetry.balance_with_info(model, (loss, data), symmetries=products, **options)
    assert bool(info.info.is_successful), info.info.result
    equal("names", info.names, ("block, queries and keys", "block, values and outputs"))
    close("function", jax.vmap(there)(data[0]), jax.vmap(model)(data[0]), 1e-10)
    for product, size in zip(products, (2, 3)):
        equal("size", product.size(model), size)
        before, after = (
            symmetry.product_drift(product, loss, m, data, **options) for m in (model, there)
        )
        equal("a matrix for each head", before.shape, (2, size, size))
        at_most("drift", np.linalg.norm(after) / np.linalg.norm(before), 1e-9)
    # Biases left behind, or one Q for both heads, are no symmetries.
    outputs = lambda m: jax.vmap(m)(data[0])
    query, key = lambda m: heads(m).query_proj.weight, lambda m: heads(m).key_proj.weight
    q = np.random.default_rng(0).normal(size=(4, 4))
    for blocks, by in ((1, q), (2, q[:2, :2])):
        wrong = symmetry.product_symmetry(model, query, key, axes=(0, 0), num_blocks=blocks)
        gap = outputs(wrong.act(model, by)) - outputs(model)
        at_least(f"change with {blocks} blocks, without biases", np.max(np.abs(gap)), 1e-2)
    close("change", outputs(products[0].act(model, q[:2, :2])), outputs(model), 1e-12)


def test_products_and_rescalings_are_balanced_together():
    """V relu(U W x): the product U W, and V against U, which share U."""
    rng = np.random.default_rng(5)
    point = {k: jnp.asarray(rng.normal(size=(3, 3))) for k in "UVW"}
    data = FULL_DATA

    def loss(p, example):
        hidden = jax.nn.relu(p["U"] @ (p["W"] @ example[0]))
        return jnp.sum((p["V"] @ hidden - example[1]) ** 2)

    rescaling = symmetry.rescaling(point, first, lambda p: p["V"])
    options = dict(noise_scale=SIGMA2)
    there, info = symmetry.balance_with_info(
        point, (loss, data), symmetries=[rescaling, PRODUCT], **options
    )
    assert bool(info.info.is_successful), info.info.result
    equal("names", info.names, ("symmetries[0]", "U W"))
    values = lambda p: jax.vmap(lambda *e: loss(p, e))(*data)
    close("losses", values(there), values(point), 1e-11)
    at_least("way of the rescaling", abs(info.parameters[0]), 1e-2)
    drifts = [
        (symmetry.noether_drift(rescaling, loss, p, data, **options),
         np.linalg.norm(symmetry.product_drift(PRODUCT, loss, p, data, **options)))
        for p in (point, there)
    ]  # fmt: skip
    for before, after in zip(*drifts):
        at_most("drift", abs(after / before), 1e-7)
