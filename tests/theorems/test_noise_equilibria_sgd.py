"""SGD on new examples at every step, from unbalanced starts, to the equilibria of [Ziyin2024]."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close
from manifoldflow import models, symmetry, theory
from quick import long_jit

V = np.array([[1.0, 0.3, 0.0], [0.2, -0.8, 0.1], [0.0, 0.1, 0.6]])
STREAM = models.LinearStream(V, [2.0, 1.0, 0.5], [0.3, 1.0, 0.2])


def runs(
    model,
    start,
    *,
    rate,
    steps,
    observe,
    seeds,
    batch_size=1,
    saves=20,
    decay=0.0,
    seed=0,
    jit=jax.jit,
):
    """Observables of SGD with weight decay, (seeds, saves + 1, ...)."""
    optimizer = lambda eta: optax.chain(optax.add_decayed_weights(2 * decay), optax.sgd(eta))

    @jit
    @jax.vmap
    def run(key):
        of_start, of_steps = jr.split(key)
        return mf.simulate(
            model.loss, model.noise(batch_size), optimizer, start(of_start), learning_rate=rate,
            num_steps=steps, num_saves=saves, key=of_steps, observe=observe,
        ).observables  # fmt: skip

    return jax.tree.map(np.asarray, run(jr.split(jr.key(seed), seeds)))


def mean_and_error(late):
    """Over seeds, of means over the saves of each."""
    each = late.mean(axis=1)
    return each.mean(axis=0), each.std(axis=0, ddof=1) / np.sqrt(len(each))


# --- Deep linear networks ---------------------------------------------------------------------


def test_sgd_ends_at_the_equilibrium_of_deep_networks_up_to_its_rate():
    net = models.DeepLinear(STREAM, [4, 3])
    predicted = np.asarray(net.layer_gains(net.equilibrium(jr.key(0))))
    start = lambda key: net.initial(key, (1.0, 0.1, 0.1))
    gaps = {}
    for rate in (0.02, 0.01):
        found = runs(
            net, start, rate=rate, steps=int(4 / rate**2), seeds=12, jit=long_jit,
            observe={"gains": net.layer_gains},
        )["gains"]  # fmt: skip
        at_least("the start's imbalance", np.ptp(found[:, 0].mean(0)) / predicted[0], 2)
        mean, error = mean_and_error(found[:, 10:])
        gaps[rate] = np.max(np.abs(mean - predicted)) / predicted[0]
        at_most("relative gap", gaps[rate], 6 * rate + 4 * np.max(error) / predicted[0])
    at_most("gap, half the rate", gaps[0.01] / gaps[0.02], 0.8)


def test_wide_layers_keep_what_nothing_reaches():
    """Gains forget the start; norms of layers wider than the rank of V between others do not,
    although Theorem 5.4 gives them all one norm: it is one equilibrium of many."""
    net = models.DeepLinear(models.LinearStream(V[:2], [2.0, 1.0, 0.5], [0.3, 1.0]), [5, 5])
    observe = {"gains": net.layer_gains, "norm": lambda p: jnp.sum(p[1] ** 2)}
    # A null space apart: what W_2 carries from the last hidden units to the last ones.
    dead = jnp.zeros((5, 5)).at[3:, 3:].set(jnp.array([[1.5, 0.5], [0.0, 1.0]]))
    mask = (jnp.arange(5) < 3) * 1.0

    def start(key, extra):
        first, middle, last = net.initial(key)
        kept = (first * mask[:, None], middle * mask[:, None] * mask, last * mask)
        return kept[0], kept[1] + extra, kept[2]

    ends = [
        runs(net, lambda key, e=extra: start(key, e), rate=0.02, steps=4000, seeds=2,
             observe=observe)
        for extra in (0 * dead, dead)
    ]  # fmt: skip
    close("gains", ends[1]["gains"], ends[0]["gains"], 1e-9)
    shift = ends[1]["norm"] - ends[0]["norm"]
    close("norms differ for ever", shift, np.full_like(shift, float(jnp.sum(dead**2))), 1e-9)


def test_norms_of_middle_layers_meet_where_no_layer_is_wider_than_the_rank():
    """At c² rank V each [Ziyin2024, (19), corrected], from norms that are 8-fold apart."""
    net = models.DeepLinear(models.LinearStream(V[:2], [2.0, 1.0, 0.5], [0.3, 1.0]), [2, 2, 2])
    norms = lambda point: jnp.stack([jnp.sum(weight**2) for weight in point[1:3]])
    predicted = float(norms(net.equilibrium(jr.key(0)))[0])
    rate, start = 0.02, lambda key: net.initial(key, (0.5, 0.8, 0.1, 0.5))
    found = runs(net, start, rate=rate, steps=10000, seeds=12, observe={"norms": norms})["norms"]
    first = found[:, 0].mean(0)
    at_least("norms at the start, one over the other", first[0] / first[1], 5)
    mean, error = mean_and_error(found[:, 10:])
    bounds = 6 * rate * predicted + 4 * error
    at_most("gap over its bound, key 0", np.max(np.abs(mean - predicted) / bounds), 1)


# --- Two layers -------------------------------------------------------------------------------


def sides_of(net, **options):
    return lambda point: jnp.stack(net.sides(point, **options))


def gap_of(sides):
    """|left - right|/|left + right| of the time averages."""
    left, right = sides[..., 0, :, :], sides[..., 1, :, :]
    return np.linalg.norm(left - right) / np.linalg.norm(left + right)


@pytest.mark.parametrize("kind", ["stream", "finite"])
def test_sgd_balances_two_layers_and_descent_does_not(kind):
    data = STREAM
    if kind == "finite":
        drawn = STREAM.sample(jr.key(1), 30)
        data = models.FiniteData(*drawn)
    net = models.MatrixFactorization(data, 4)
    start = lambda key: net.initial(key, (1.5, 0.1))
    observe = {"sides": sides_of(net), "charges": lambda p: net.charges(p)[0]}
    noisy = runs(net, start, rate=0.01, steps=20000, seeds=4, saves=200, observe=observe)
    at_least("imbalance at the start", gap_of(noisy["sides"][:, 0].mean(0)), 0.5)
    at_most("imbalance of SGD", gap_of(noisy["sides"][:, 100:].mean((0, 1))), 0.06)
    at_least("what SGD did to the charges", np.linalg.norm(
        noisy["charges"][:, -1] - noisy["charges"][:, 0]) / np.linalg.norm(noisy["charges"][:, 0]),
        0.5)  # fmt: skip
    still = mf.simulate(
        net.loss, mf.IsotropicNoise(0.0), optax.sgd, start(jr.key(2)), learning_rate=0.001,
        num_steps=8000, observe=observe, key=jr.key(0),
    )  # fmt: skip
    at_most("loss of descent", net.loss(still.final), 1e-8)
    charges = still.observables["charges"]
    close("charges of descent", charges[-1], charges[0], 0.02)
    at_least("imbalance of descent", gap_of(np.asarray(still.observables["sides"][-1])), 0.5)


def test_weight_decay_enters_by_the_learning_rate_and_the_batch():
    """Gamma = 2 sigma^2 E[...] + gamma I balances the time averages of SGD; (13) does not."""
    net, rate, decay = models.MatrixFactorization(STREAM, 3), 0.01, 0.02
    observe = {
        "holds": sides_of(net, noise_scale=rate / 2, weight_decay=decay),
        "printed": sides_of(net, noise_scale=0.5, weight_decay=2 * decay),
    }
    start = lambda key: net.initial(key)
    found = runs(
        net, start, rate=rate, steps=20000, seeds=4, saves=400, decay=decay, observe=observe
    )
    late = {name: gap_of(sides[:, 200:].mean((0, 1))) for name, sides in found.items()}
    at_most("imbalance", late["holds"], 0.04)
    at_least("imbalance as printed, over it", late["printed"] / late["holds"], 5)


def test_the_limit_of_the_noise_is_where_the_symmetry_room_finds_it():
    """A finite set at its least-squares map: every charge of the theory's factors rests."""
    data = models.FiniteData(*STREAM.sample(jr.key(4), 25))
    net = models.MatrixFactorization(data, 3)
    point = net.decayed_equilibrium(jr.key(0), noise_scale=0.01, weight_decay=0.05)
    close("U W", net.product(point), data.target_map, 1e-12)
    left, right = net.sides(point, 0.01, 0.05)
    close("sides", left, right, 1e-12)
    rescaling = symmetry.rescaling(point, lambda p: p["U"], lambda p: p["W"])
    star = symmetry.noise_equilibrium(
        rescaling, net.example_loss, point, (data.inputs, data.targets), noise_scale=0.01,
        weight_decay=0.05,
    )  # fmt: skip
    at_most("|lambda*|", abs(star), 1e-10)


def test_an_approximate_symmetry_under_sgd():
    """(u w x - y)^2 + zeta/2 |theta - t|^2 about a minimum of both: the mean charge moves by
    sigma^2 tr(Sigma A)/zeta, less a share zeta/lambda for the width of the valley."""
    target, zeta, rate = jnp.array([1.5, 0.5]), 0.2, 0.002

    def example_loss(point, example):
        x, y = example
        return (point[0] * point[1] * x - y) ** 2

    def noisy(point, example):
        return example_loss(point, example) + zeta / 2 * jnp.sum((point - target) ** 2)

    def sample(key, count):
        x, noise = jr.normal(key, (2, count))
        return jnp.sign(x), 0.75 * jnp.sign(x) + noise

    noise = mf.noise.OnlineBatch(sample, noisy, 1)
    loss = mf.FunctionLoss(lambda p: (p[0] * p[1] - 0.75) ** 2)
    charge = lambda p: (p[0] ** 2 - p[1] ** 2) / 2
    run = long_jit(jax.vmap(lambda key: mf.simulate(
        loss, noise, optax.sgd, target, learning_rate=rate, num_steps=30000, num_saves=60,
        observe={"charge": charge}, key=key).observables["charge"]))  # fmt: skip
    mean, error = mean_and_error(np.asarray(run(jr.split(jr.key(0), 64)))[:, 20:])
    slope = jnp.array([0.5, 1.5])  # of u w; the gradient is 2 x eps times it
    covariance, a = 4 * np.outer(slope, slope), np.diag([1.0, -1.0])
    moved = theory.approximate_symmetry_displacement(
        target, a, covariance, np.eye(2), a @ target, noise_scale=rate / 2, strength=zeta
    ) * float(target @ a @ a @ target)  # fmt: skip
    close("sigma^2 tr(Sigma A)/zeta", moved, rate / 2 * np.trace(covariance @ a) / zeta, 1e-12)
    at_least("the signal over its error", abs(moved) / error, 10)
    at_most("C - C°, gap", abs(mean - float(charge(target)) - moved), 0.1 * abs(moved) + 4 * error)


# --- Nonlinear networks -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.swish, jax.nn.relu, jax.nn.leaky_relu])
def test_nonlinear_networks_align_under_sgd(activation):
    size = 5
    data = models.LinearStream(np.eye(size), np.ones(size), [5.0, 1.0, 1.0, 1.0, 1.0])
    net = models.NonlinearFactorization(data, size, activation)
    loss = net.loss(jr.key(9), 200)
    # W much larger than U: descent keeps it so.
    start = net.initial(jr.key(1), 0.7)
    start = {"U": start["U"], "W": start["W"]}

    def run(noise, rate, steps):
        return mf.simulate(
            loss, noise, optax.sgd, start, learning_rate=rate, num_steps=steps, num_saves=40,
            key=jr.key(2), observe={"both": lambda p: jnp.stack(net.representations(p))},
        ).observables["both"]  # fmt: skip

    sgd = long_jit(lambda: run(net.noise(2), 0.01, 10000))()
    descent = long_jit(lambda: run(mf.IsotropicNoise(0.0), 0.05, 2000))()
    cosine = lambda pair: np.vdot(*pair) / np.prod([np.linalg.norm(side) for side in pair])
    aligned, apart = cosine(np.asarray(sgd[20:]).mean(0)), cosine(np.asarray(descent[-1]))
    at_least("cosine under SGD", aligned, 0.8)
    at_most("1 - cosine of SGD over that of descent", (1 - aligned) / (1 - apart), 0.5)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_scale_invariant_networks_grow_under_sgd(kind):
    """The whole norm grows at every step; each layer's too where it has its own invariance."""
    net = models.ScaleInvariantNet(STREAM, 4, kind)
    point, data = net.initial(jr.key(0)), STREAM.sample(jr.key(1), 20)
    for one in net.symmetries(point):
        assert symmetry.check_symmetry(one, net.example_loss, point, data)
    alone = symmetry.scaling(point, lambda p: p["U"])
    assert bool(symmetry.check_symmetry(alone, net.example_loss, point, data)) == (kind == "B")
    loss = net.loss(jr.key(2), 20)

    def norms(noise, rate):
        found = mf.simulate(
            loss, noise, optax.sgd, point, learning_rate=rate, num_steps=400, num_saves=400,
            key=jr.key(3), observe={"norms": net.squared_norms},
        ).observables["norms"]  # fmt: skip
        return np.asarray(found["U"]), np.asarray(found["W"])

    u, w = norms(net.noise(2), 0.05)
    at_least("least growth of both", np.min(np.diff(u + w)), -1e-12)
    at_least("growth", (u + w)[-1] / (u + w)[0], 1.05)
    if kind == "B":
        at_least("least growth of a layer", min(np.diff(u).min(), np.diff(w).min()), -1e-12)
    else:
        at_most("a layer of A shrinks at times", min(np.diff(u).min(), np.diff(w).min()), -1e-6)
    still = sum(norms(mf.IsotropicNoise(0.0), 1e-4))
    close("norm under descent", still[-1], still[0], 1e-4)
