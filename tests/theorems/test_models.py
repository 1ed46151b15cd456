"""The models of the papers carry their losses, manifolds and facts."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, refused


def sparse(design="boolean", n=12, d=20):
    inputs, targets, truth = mf.models.sparse_regression(jr.key(0), n, d, 2, design=design)
    return mf.models.OverparametrizedLinear(inputs, targets), truth


def test_overparametrized_linear_follows_its_closed_form():
    model, _ = sparse("gaussian")
    start = model.random(jr.key(1))
    landed = mf.limit_map(model.manifold, start)
    close("charges of gradient flow", model.charges(landed), model.charges(start), 1e-6)
    close("Φ", model.weights(landed), model.flow(start, 0.0), 1e-6)
    flow = mf.LimitDiffusion(model.manifold, mf.LabelNoise(std=1.0, batch_size=1))
    times = jnp.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
    walk = mf.solve(flow, landed, end_time=0.5, save_times=times, rtol=1e-7, atol=1e-9)
    found = jax.vmap(model.weights)(walk.points)[1:]
    close("the flow at six times", found, model.flow(start, times), 1e-5)
    decay = jnp.exp(-0.5 * model.decay_rates)
    close("charges", model.charges(walk.final), decay * model.charges(landed), 1e-5)
    trace = jnp.sum(model.decay_rates * (landed["u"] ** 2 + landed["v"] ** 2))
    close("tr H", model.loss.trace_gauss_newton(landed), trace, 1e-9)


def test_how_fast_gradient_flow_fits():
    """‖∇L‖² ≥ (16/n)·λ_min(ZZᵀ)·min|uv|·L [LiWangArora2022, D.2, which prints no 1/n]."""
    model, _ = sparse("gaussian")
    n = len(model.targets)
    values, vectors = np.linalg.eigh(model.inputs @ model.inputs.T)

    def ratio(inputs, targets, point):
        model = mf.models.OverparametrizedLinear(inputs, targets)
        slope = jax.tree.map(lambda leaf: jnp.sum(leaf**2), model.loss.gradient(point))
        return sum(slope.values()) / model.loss(point)

    points = jax.vmap(model.random)(jr.split(jr.key(5), 50))
    ratios = jax.vmap(lambda point: ratio(model.inputs, model.targets, point))(points)
    bounds = 16 / n * values[0] * jnp.min(jnp.abs(points["u"] * points["v"]), axis=1)
    assert bool(jnp.all(ratios >= bounds))
    # It is attained where u = v = α and the residual is the last eigenvector.
    tight = ratio(model.inputs, vectors[:, 0], model.initial(0.7))
    close("attained", tight, 16 / n * values[0] * 0.49, 1e-9)
    assert float(tight) < 16 * values[0] * 0.49 / 2, "the printed constant holds too"


def test_label_noise_recovers_the_sparse_truth():
    model, truth = sparse(n=14, d=20)
    close("linear program", model.limit(), truth, 1e-8)
    late = model.flow(model.initial(), 8.0)
    at_most("distance to the truth", np.max(np.abs(late - np.asarray(truth))), 1e-4)


def test_gradient_flow_of_squares_minimises_an_entropy():
    """From β = α1 on β ⊙ β: Σ w(ln(w/α²) − 1) on {Xw = y}, whose gradient is a row of X."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(4, 9))
    model = mf.models.QuadraticallyParametrized(inputs, inputs @ rng.uniform(0.5, 1.5, 9))
    landed = mf.limit_map(model.manifold, model.initial(0.3))
    slope = np.log(np.asarray(model.weights(landed)) / 0.3**2)
    multipliers, *_ = np.linalg.lstsq(inputs.T, slope, rcond=None)
    close("stationarity", inputs.T @ multipliers, slope, 1e-5)
    close("¼n", model.loss(model.initial(0.3)), np.mean(
        (inputs @ np.full(9, 0.09) - model.targets) ** 2) / 4, 1e-12)  # fmt: skip
    early, late = model.recovery_window(1e-8, 0.01)
    assert 0 < early < late
    close("ln(d/α)/η", early, 2061.7905321, 1e-9)
    close("1/(η√(dα))", late, 1e6 / 3, 1e-9)


def cubic(z):
    return z**3 + z


@pytest.mark.parametrize("second_layer", [None, [1.0, 0.5, 2.0]])
def test_two_layer_net_finds_its_minimizer(second_layer):
    inputs = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 2)))[0].T
    net = mf.models.TwoLayerNet(inputs, [0.8, -1.1], 3, second_layer=second_layer)
    start = net.manifold.project(net.initial(jr.key(0)))
    close("tr H = 2F", net.loss.trace_gauss_newton(start), 2 * net.flatness(start), 1e-10)
    found = mf.minimize(net.manifold, net.flatness, start).final
    close("features", net.features(found), net.minimizer(), 1e-7)
    traced = jax.jit(lambda net, point: net.flatness(point))(net, found)
    close("jit", traced, net.flatness(found), 1e-12)
    other = mf.models.TwoLayerNet(inputs, [0.8, -1.1], 3, cubic, second_layer)
    close("own activation", other.flatness(start), net.flatness(start), 1e-12)


@pytest.mark.quick
def test_bad_input():
    with refused(ValueError, "inputs must be (n, d)"):
        mf.models.OverparametrizedLinear(np.ones((3, 2)), np.ones(2))
    with refused(ValueError, "inputs must be (n, d)"):
        mf.models.TwoLayerNet(np.ones(3), np.ones(3), 2)
    with refused(ValueError, "second_layer must have shape (2,)"):
        mf.models.TwoLayerNet(np.ones((3, 2)), np.ones(3), 2, second_layer=np.ones(3))
    with refused(ValueError, '"boolean" or "gaussian"'):
        mf.models.sparse_regression(jr.key(0), 3, 4, 1, design="uniform")
    with refused(ValueError, "sparsity must be between"):
        mf.models.sparse_regression(jr.key(0), 3, 4, 5)


@pytest.mark.quick
def test_digits_are_those_of_scikit_learn():
    """Read from its file, without its import."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(3).permutation(len(images))
    for test, part in ((False, order[:7]), (True, order[1000:1007])):
        found = mf.models.digits(7, test=test, seed=3)
        close("images", found[0], images[part] / 16, 1e-12)
        close("labels", np.argmax(found[1], axis=1), labels[part], 0)
