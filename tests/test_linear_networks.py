"""Linear networks, their data and the noise of new examples: each fact by another way."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, flat, refused
from manifoldflow import models, theory

ROOTS = np.random.default_rng(0).normal(size=(2, 3, 3))
STREAM = models.LinearStream(
    np.array([[1.0, 0.3, 0.0], [0.2, -0.8, 0.1]]),
    ROOTS[0] @ ROOTS[0].T,
    np.array([[1.0, 0.4], [0.4, 0.5]]),
)
LARGE = models.FiniteData(*STREAM.sample(jr.key(0), 200_000))
NETS = {
    "deep": models.DeepLinear(STREAM, [4, 3]),
    "two": models.MatrixFactorization(STREAM, 3),
    "finite": models.MatrixFactorization(models.FiniteData(*STREAM.sample(jr.key(1), 20)), 3),
}


def mean_loss(net, data):
    return mf.FunctionLoss(
        lambda p: jnp.mean(jax.vmap(lambda *e: net.example_loss(p, e))(data.inputs, data.targets))
    )


def test_a_stream_has_the_moments_it_states():
    linear_map = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    for name in ("target_map", "input_covariance", "noise_covariance"):
        close(name, getattr(LARGE, name), getattr(STREAM, name), 0.02)
    for name, found, stated in zip(
        ("E|r|²xxᵀ", "E|x|²rrᵀ"), LARGE.noise_moments(linear_map), STREAM.noise_moments(linear_map)
    ):
        close(name, found, stated, 0.03)
    diagonal = models.LinearStream(np.eye(2), [4.0, 1.0], [1.0, 9.0])
    close("a diagonal", diagonal.noise_covariance, np.diag([1.0, 9.0]), 1e-14)


def test_finite_data_are_drawn_with_replacement():
    data = NETS["finite"].data
    x, y = data.sample(jr.key(0), 500)
    assert {tuple(row) for row in np.asarray(x)} == {tuple(row) for row in np.asarray(data.inputs)}
    linear_map = np.random.default_rng(1).normal(size=(2, 3))
    residuals = data.inputs @ linear_map.T - data.targets
    expected = theory.two_layer_noise_matrices(data.inputs, residuals, noise_scale=0.5)
    for found, stated in zip(data.noise_moments(jnp.asarray(linear_map)), expected, strict=True):
        close("moments", found, stated, 1e-12)
    across = (data.inputs @ data.target_map.T - data.targets).T @ data.inputs
    at_most("normal equations", jnp.max(jnp.abs(across)), 1e-12)


@pytest.mark.parametrize("name", ["deep", "two"])
def test_the_loss_is_the_mean_over_the_stream(name):
    """Its value up to tr Σ_ε, its gradient and the trace of its Hessian, by 200,000 examples."""
    net = NETS[name]
    point = net.initial(jr.key(2))
    sampled = mean_loss(net, LARGE)
    noise = float(jnp.trace(STREAM.noise_covariance))
    close("L", net.loss(point) + noise, sampled(point), 0.02)
    close("∇L", flat(net.loss.gradient(point)), flat(sampled.gradient(point)), 0.03)
    close("tr H", net.loss.trace_hessian(point), net.sharpness(point), 1e-11)
    stated = theory.deep_linear_sharpness(net.weights(point), STREAM.input_covariance)
    close("tr H by the oracle", net.sharpness(point), stated, 1e-12)


def test_the_loss_of_finite_data_is_that_of_all_examples():
    net = NETS["finite"]
    point, whole = net.initial(jr.key(2)), mean_loss(net, net.data)
    least = float(jnp.trace(net.data.noise_covariance))
    close("L", net.loss(point) + least, whole(point), 1e-12)
    close("∇L", flat(net.loss.gradient(point)), flat(whole.gradient(point)), 1e-12)


@pytest.mark.parametrize("name", list(NETS))
def test_the_equilibrium_fits_and_balances(name):
    net = NETS[name]
    point = net.equilibrium(jr.key(3))
    close("product", net.product(point), net.data.target_map, 1e-12)
    gains = net.layer_gains(point)
    close("gains", gains, jnp.full_like(gains, gains[0]), 1e-12)
    assert net.manifold.is_on(point)
    sides = theory.deep_linear_noise_sides(
        net.weights(point), net.data.input_covariance, net.data.noise_covariance
    )
    for left, right in sides:
        close("sides", left, right, 1e-11)
    charges = net.charges(point)
    close("charges", charges[0], net.weights(point)[1].T @ net.weights(point)[1] - net.weights(
        point)[0] @ net.weights(point)[0].T, 1e-14)  # fmt: skip
    if name == "two":
        left, right = net.sides(point)
        close("sides", left, right, 1e-12)
        decayed = net.decayed_equilibrium(jr.key(3), noise_scale=0.1, weight_decay=0.0)
        close("without decay", flat(decayed), flat(point), 1e-12)


@pytest.mark.parametrize("scheme", ["kaiming", "xavier"])
def test_starts_have_the_sharpness_of_their_scheme(scheme):
    net = NETS["two"]
    draws = jax.vmap(lambda key: net.sharpness(net.initial(key, scheme)))(jr.split(jr.key(0), 4000))
    error = float(jnp.std(draws)) / np.sqrt(4000)
    expected = net.initial_sharpness(scheme)
    at_most("gap in standard errors", abs(float(jnp.mean(draws)) - expected) / error, 4)
    close("the same by numbers", net.initial_sharpness(net.variances(scheme)), expected, 1e-14)


# --- New examples at every step ---------------------------------------------------------------


def test_online_batches_are_unbiased_gradients():
    net = NETS["two"]
    point, noise = net.initial(jr.key(4)), net.noise(3)
    assert isinstance(noise, mf.OnlineBatch)
    drawn = jax.jit(jax.vmap(lambda key: flat(noise.gradient(net.loss, point, key))))(
        jr.split(jr.key(5), 20_000)
    )
    error = jnp.std(drawn, axis=0) / np.sqrt(len(drawn))
    gaps = jnp.abs(jnp.mean(drawn, axis=0) - flat(net.loss.gradient(point))) / error
    at_most("gap in standard errors", jnp.max(gaps), 4.5)
    single = jax.vmap(lambda key: flat(net.noise(1).gradient(net.loss, point, key)))(
        jr.split(jr.key(6), 20_000)
    )
    ratio = jnp.sum(jnp.var(single, axis=0)) / jnp.sum(jnp.var(drawn, axis=0))
    close("1/B", ratio, 3.0, 0.05)


def test_online_batches_keep_precision_and_frozen_leaves():
    net = NETS["two"]
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), net.initial(jr.key(0)))
    gradient = net.noise(2).gradient(net.loss, single, jr.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    frozen = mf.FunctionLoss(lambda p: jnp.sum(p["U"] ** 2), trainable={"U": True, "W": False})
    assert net.noise(2).gradient(frozen, single, jr.key(0))["W"] is None
    end = mf.simulate(
        frozen, net.noise(2), optax.sgd, single, learning_rate=0.01, num_steps=3, key=jr.key(0)
    ).final
    close("frozen", end["W"], single["W"], 0.0)
    at_least("moved", jnp.max(jnp.abs(end["U"] - single["U"])), 1e-4)


def test_online_batches_have_no_covariance():
    net = NETS["two"]
    noise = net.noise(2)
    with refused(ValueError, "OnlineBatch has no covariance", "CustomNoise"):
        mf.LimitDiffusion(net.manifold, noise)
    with refused(ValueError, "samples only"):
        mf.SGDDiffusion(net.loss, noise, 0.1)


def test_bad_input():
    with refused(ValueError, "input_covariance must be (2, 2)"):
        models.LinearStream(np.eye(2), np.eye(3), np.eye(2))
    with refused(ValueError, "noise_covariance must be symmetric"):
        models.LinearStream(np.eye(2), np.eye(2), np.diag([1.0, -1.0]))
    with refused(ValueError, "target_map must be (d_y, d_x)"):
        models.LinearStream(np.ones(2), np.eye(2), np.eye(2))
    with refused(ValueError, "the targets (N, d_y)"):
        models.FiniteData(np.ones((3, 2)), np.ones(3))
    with refused(ValueError, "at least one hidden layer"):
        models.DeepLinear(STREAM, [])
    with refused(ValueError, '"kaiming" or "xavier"'):
        NETS["two"].initial(jr.key(0), "lecun")
    with refused(ValueError, "variances needs 2 numbers"):
        NETS["two"].initial(jr.key(0), (1.0,))
    with refused(ValueError, "kind must be one of"):
        models.ScaleInvariantNet(STREAM, 3, "C")
    with refused(ValueError, "batch_size must be a positive integer"):
        NETS["two"].noise(0)
    with refused(ValueError, "needs two functions", wrong_type=True):
        mf.OnlineBatch(3, NETS["two"].example_loss, 1)
    with refused(ValueError, "positive integer"):
        models.NonlinearFactorization(STREAM, 0, jnp.tanh)
    net = models.NonlinearFactorization(STREAM, 3, jnp.tanh)
    assert 0 < float(net.alignment(net.initial(jr.key(0)))) < 1


def test_bad_input_of_the_oracles():
    v, sigma_x, sigma_eps = np.random.default_rng(0).normal(size=(3, 4)), np.eye(4), np.eye(3)
    find = lambda *a, widths=(3,): theory.deep_linear_noise_equilibrium(
        *a, widths=widths, key=jr.key(0)
    )
    with refused(ValueError, "got 2", "rank"):
        find(v, sigma_x, sigma_eps, widths=[3, 2])
    with refused(ValueError, "at least one hidden layer"):
        find(v, sigma_x, sigma_eps, widths=[])
    with refused(ValueError, "noise_covariance: got the eigenvalue -1"):
        find(v, sigma_x, np.diag([1.0, -1.0, 1.0]))
    with refused(ValueError, "input_covariance: expected a symmetric matrix"):
        find(v, sigma_x + np.triu(np.ones((4, 4)), 1), sigma_eps)
    with refused(ValueError, "noise_covariance: got shape (4, 4), expected (3, 3)"):
        find(v, sigma_x, sigma_x)
    with refused(ValueError, "target_map: got 0"):
        find(0 * v, sigma_x, sigma_eps)
    with refused(ValueError, "residuals: got 2 rows, expected 3"):
        theory.two_layer_noise_matrices(np.ones((3, 1)), np.ones((2, 1)), noise_scale=1.0)
    with refused(ValueError, "from the inputs to the outputs"):
        theory.deep_linear_sharpness((np.ones((2, 3)), np.ones((2, 3))), np.eye(3))
    with refused(ValueError, "variances"):
        theory.deep_linear_initial_sharpness((2, 3), (1.0, 1.0), 1.0)
    ones, eye = np.ones(2), np.eye(2)
    shift = lambda n: theory.approximate_symmetry_displacement(
        ones, np.diag([1.0, -1.0]), eye, eye, n, noise_scale=0.1, strength=1.0
    )
    with refused(ValueError, "along which the charge stays"):
        shift(ones)
    with refused(ValueError, "expected (D,) both"):
        shift(np.ones(3))
