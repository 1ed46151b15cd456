"""A report on networks of every library: what it costs, what it says, and what it refuses."""

import time
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from manifoldflow.diagnostics import LeafTrace, LeftOut, Quantity, Report, report
from manifoldflow.diagnostics._kinks import kinks_of
from manifoldflow.diagnostics._passes import curvature_along, outputs_at, pulled, pushed
from manifoldflow.plotting import plot_report

matplotlib.use("Agg")

INPUTS = jr.normal(jr.key(1), (10, 4))
LABELS = jr.randint(jr.key(2), (10,), 0, 3)
WEIGHTS = {"in": jr.normal(jr.key(3), (6, 4)), "out": jr.normal(jr.key(4), (3, 6))}


def cross_entropy(f, y):
    return jax.nn.logsumexp(f) - f[y]


def of_dict(w, x):
    return w["out"] @ jax.nn.gelu(w["in"] @ x)


LOSS = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=of_dict)
SQUARES = mf.LeastSquares(INPUTS, jnp.sin(INPUTS[:, 0]), predict=lambda w, x: of_dict(w, x)[0])


# --- Networks of every library ---------------------------------------------------------------


class Convolutional(eqx.Module):
    convolution: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    head: eqx.nn.MLP

    def __init__(self):
        keys = jr.split(jr.key(0), 2)
        self.convolution = eqx.nn.Conv2d(3, 4, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.head = eqx.nn.MLP(64, 3, 8, 1, jax.nn.relu, key=keys[1])

    def __call__(self, image):
        return self.head(jax.nn.relu(self.norm(self.convolution(image))).reshape(-1))


def of_equinox():
    return Convolutional(), None, (3, 8, 8)


def of_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=(2, 2))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(3)(x.reshape(-1))

    net = Net()
    return net.init(jr.key(0), jnp.zeros((8, 8, 3))), net.apply, (8, 8, 3)


def of_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x)
            x = x + self.attention(self.norm(x))
            return self.out((x + self.down(nnx.gelu(self.up(x)))).mean(axis=-2))

    return Net(nnx.Rngs(0)), None, (5, 4)


def of_haiku():
    haiku = pytest.importorskip("haiku")
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([16, 3])(x)))
    return net.init(jr.key(0), jnp.zeros(4)), net.apply, (4,)


def of_arrays():
    return WEIGHTS, of_dict, (4,)


NETWORKS = {
    "Equinox": (of_equinox, ("max",), True),
    "Linen": (of_linen, ("max",), False),
    "NNX": (of_nnx, (), False),
    "Haiku": (of_haiku, ("max",), False),
    "dict": (of_arrays, (), False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_library(name):
    """Sampled, on parts of the examples; beside the basis in 1.3 times the memory of a gradient."""
    build, kinks, has_gauge = NETWORKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what stays as it is
        point, predict, shape = build()
        inputs = jr.normal(jr.key(1), (160, *shape)).astype(jnp.float32)
        labels = jr.randint(jr.key(2), (160,), 0, 3)
        loss = mf.PerExampleLoss(inputs, labels, cross_entropy, predict=predict)
        point = jax.tree.map(
            lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, point
        )
        began = time.process_time()
        table = report(loss, point, learning_rate=1e-3, batch_size=8, max_rows=1, num_samples=48)
        seconds = time.process_time() - began
        trace = loss.trace_gauss_newton(point)
        gradient = temporary(lambda l, p: (l(p), l.gradient(p)), loss, point)
        part = loss.select(np.arange(40))
        outputs = outputs_at(part, point)
        vector = pulled(part, point, outputs.slopes)
        programs = {
            "outputs": temporary(outputs_at, part, point),
            "Jᵀw": temporary(pulled, part, point, outputs.slopes),
            "WJv": temporary(pushed, part, point, outputs.roots, vector),
            "curvature": temporary(curvature_along, part, point, outputs.slopes, vector),
        }
    at_most("processor seconds", seconds, 10)
    for what, number in programs.items():
        at_most(what, number, 1.3 * gradient)
    found = table["trace of G"]
    at_most("tr G", abs(found.value - trace), 4 * found.standard_error)
    assert "on 40 of 160 examples" in found.how, found.how
    assert "basis of" in table["largest eigenvalue"].how
    equal("a sentence on kinks", any("kinks" in note for note in table.notes), bool(kinks))
    equal("kinks", kinks_of(loss, point), kinks)
    equal("a gauge", "balanced trace of G" in table.quantities, has_gauge)
    reasons = {one.name: one.reason for one in table.left_out}
    if has_gauge:
        assert "Linear neurons of least norm" in table["balanced trace of G"].how
    else:
        for words in ("equinox.nn.Linear layers, and no two", "symmetry.balance(model, loss"):
            assert words in reasons["balanced trace of G"], reasons
    equal("leaves", len(table.leaves), len(jax.tree.leaves(loss.split(point)[0])))


def temporary(fn, *arguments):
    compiled = eqx.filter_jit(fn).lower(*arguments).compile().compiled
    return compiled.memory_analysis().temp_size_in_bytes


# --- Kinks -----------------------------------------------------------------------------------


def layer(w, x):
    return w["in"] @ x


MODELS = {
    "gelu": (of_dict, ()),
    "relu": (lambda w, x: w["out"] @ jax.nn.relu(layer(w, x)), ("max",)),
    "leaky": (lambda w, x: w["out"] @ jax.nn.leaky_relu(layer(w, x)), ("select_n",)),
    "clipped": (lambda w, x: w["out"] @ jnp.clip(layer(w, x), -1, 1), ("max", "min")),
    "abs": (lambda w, x: w["out"] @ jnp.abs(layer(w, x)), ("abs",)),
    "largest": (lambda w, x: w["out"] @ layer(w, x) / layer(w, x).max(), ("reduce_max",)),
    "softmax": (lambda w, x: w["out"] @ jax.nn.softmax(layer(w, x)), ()),
    "softplus": (lambda w, x: w["out"] @ jax.nn.softplus(layer(w, x)), ()),
    "logsumexp": (lambda w, x: w["out"] @ layer(w, x) / jax.nn.logsumexp(layer(w, x)), ()),
    "one side": (lambda w, x: w["out"] @ layer(w, x) * jnp.maximum(jnp.sum(x**2), 0), ()),
    "never": (lambda w, x: w["out"] @ jnp.maximum(jnp.exp(layer(w, x)), 0), ()),
    "of data": (lambda w, x: w["out"] @ layer(w, jnp.abs(x)), ()),
    "inside jit": (jax.jit(lambda w, x: w["out"] @ jax.nn.relu(layer(w, x))), ("max",)),
    "checkpoint": (
        lambda w, x: w["out"] @ jax.checkpoint(lambda z: jnp.abs(z))(layer(w, x)), ("abs",)
    ),
    "scan": (
        lambda w, x: w["out"] @ jax.lax.scan(
            lambda h, _: (jax.nn.relu(h), None), layer(w, x), None, 2
        )[0],
        ("max",),
    ),
    "smooth scan": (
        lambda w, x: w["out"] @ jax.lax.scan(
            lambda h, _: (jnp.tanh(h), None), layer(w, x), None, 2
        )[0],
        (),
    ),
    "behind stop_gradient": (
        lambda w, x: w["out"] @ layer(w, x) * jax.lax.stop_gradient(jnp.max(layer(w, x))), ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_kinks(name):
    predict, kinks = MODELS[name]
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=predict)
    equal("kinks", kinks_of(loss, WEIGHTS), kinks)


# --- What it says ----------------------------------------------------------------------------


def test_the_table():
    table = report(LOSS, WEIGHTS, learning_rate=0.1, batch_size=4, num_samples=16)
    assert isinstance(table, Report)
    text = str(table)
    for words in ("trace of G", "tr JᵀWJ; exact", "η/η*: stable at η = 0.1", "left out", "['in']"):
        assert words in text, text
    assert "Note" not in text
    lines = text.splitlines()
    at_most("columns", max(map(len, lines)), 110)
    equal("its repr", repr(table), text)
    assert all(isinstance(q, Quantity) for q in table.quantities.values())
    assert all(isinstance(one, LeftOut) for one in table.left_out)
    assert all(isinstance(leaf, LeafTrace) for leaf in table.leaves)
    judged = report(LOSS, WEIGHTS, learning_rate=0.1, batch_size=4, max_rows=1, num_samples=16)
    assert "stable for full batches only at η = 0.1" in str(judged)
    wild = report(LOSS, WEIGHTS, learning_rate=1e3, num_samples=16)
    assert "not stable at η = 1000" in str(wild)
    again = report(LOSS, WEIGHTS, learning_rate=0.1, batch_size=4, num_samples=16)
    equal("the same key, the same numbers", str(again), text)
    other = report(LOSS, WEIGHTS, num_samples=16, key=jr.key(7))
    assert other.leaves != again.leaves


def test_names_that_are_not_there():
    table = report(LOSS, WEIGHTS, max_rows=1, num_samples=16)
    with pytest.raises(
        KeyError, match="leaves out 'rank': 30 examples × outputs; raise max_rows=1"
    ):
        table["rank"]
    with pytest.raises(KeyError, match="has no 'sharpness'; it has coordinates, loss, gradient"):
        table["sharpness"]
    small = report(LOSS, WEIGHTS, memory=10, num_samples=16)
    with pytest.raises(KeyError, match="rows of .* kB; raise memory=10"):
        small["rank"]


def test_refusals():
    with refused(ValueError, "report: loss must be"):
        report(of_dict, WEIGHTS)
    with refused(ValueError, "report needs concrete numbers", "outside"):
        jax.jit(lambda w: report(LOSS, w))(WEIGHTS)
    with refused(ValueError, "from 1 to 10, the number of examples; got 11"):
        report(LOSS, WEIGHTS, batch_size=11)
    with refused(ValueError, "learning_rate", "positive"):
        report(LOSS, WEIGHTS, learning_rate=0.0)
    broken = WEIGHTS | {"out": WEIGHTS["out"].at[0, 0].set(jnp.nan)}
    for loss in (LOSS, mf.FunctionLoss(lambda w: jnp.sum(w["out"]))):
        with refused(ValueError, "finite numbers; got NaN or inf in ['out']", "last point before"):
            report(loss, broken)
    high = mf.PerExampleLoss(
        INPUTS, LABELS, lambda f, y: jnp.sum(jnp.exp(1e5 * f**2)), predict=of_dict
    )
    with refused(ValueError, "a loss that is finite at the model; got the loss inf"):
        report(high, WEIGHTS)
    with refused(ValueError, "a loss that is finite at the model; got the loss inf"):
        report(mf.FunctionLoss(lambda w: jnp.sum(jnp.exp(1e5 * w["out"] ** 2))), WEIGHTS)


def test_a_function_without_examples():
    point = {"a": jnp.ones(3), "b": jnp.ones(80)}
    rates = jnp.arange(1.0, 4.0)
    loss = mf.FunctionLoss(lambda p: jnp.sum(p["a"] ** 2 * rates) - jnp.sum(jnp.cos(p["b"])))
    table = report(loss, point)
    close("λ₁", table["largest eigenvalue"].value, 6.0, 1e-6)
    close("tr ∇²L", table["trace of the Hessian"].value, 12 + 80 * np.cos(1.0), 1e-9)
    close("2/λ₁", table["largest stable learning rate"].value, 1 / 3, 1e-6)
    for name in ("trace of G", "gradient noise"):
        with pytest.raises(KeyError, match="FunctionLoss has no examples"):
            table[name]


def test_near_the_zero_loss_manifold_and_off_it():
    off = report(SQUARES, WEIGHTS, num_samples=16)
    with pytest.raises(KeyError, match="not near the zero-loss manifold"):
        off["rate of the limit"]
    manifold = mf.ZeroLossManifold(SQUARES)
    near = manifold.project(WEIGHTS)
    table = report(SQUARES, near, num_samples=16, learning_rate=1e-3)
    at_most("distance", table["distance"].value, 1e-6)
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1))
    step = 1e-5
    there = mf.solve(flow, near, end_time=step).final
    fall = (SQUARES.trace_gauss_newton(near) - SQUARES.trace_gauss_newton(there)) / step
    close("rate of the limit", table["rate of the limit"].value, fall, 1e-2)
    trace = SQUARES.trace_gauss_newton(near)
    close("end time", table["end time"].value, trace / fall, 1e-2)
    close("ηc/4·tr", table["excess loss"].value, 1e-3 / 4 * trace, 1e-9)
    # To first order the model is as far from the manifold as it is from its projection.
    nudge = jax.tree.map(lambda x: 1e-4 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), near)
    moved = jax.tree.map(jnp.add, near, nudge)
    normal = jax.tree.map(jnp.subtract, nudge, manifold.tangent_projection(near, nudge))
    size = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(normal)))
    close("distance", report(SQUARES, moved, num_samples=16)["distance"].value, size, 1e-2)


def test_more_residuals_than_coordinates():
    """A linear fit at its least squares: no manifold, and a distance to none."""
    inputs = jr.normal(jr.key(1), (100, 5))
    targets = inputs @ jnp.arange(5.0) + jnp.sin(jnp.arange(100.0))
    loss = mf.LeastSquares(inputs, targets, predict=jnp.dot)
    fit = jnp.linalg.lstsq(inputs, targets)[0]
    table = report(loss, fit, num_samples=16)
    equal("rank", table["rank"].value, 5)
    with pytest.raises(KeyError, match="more residuals than coordinates"):
        table["rate of the limit"]
    assert "distance" not in table.quantities
    twice = mf.LeastSquares(inputs[:1].repeat(2, 0), jnp.array([0.0, 1.0]), predict=jnp.dot)
    fit = jnp.linalg.lstsq(twice.inputs, twice.targets)[0]
    with pytest.raises(KeyError, match="does not get to zero near here"):
        report(twice, fit, num_samples=16)["rate of the limit"]


def test_leaves_of_two_precisions():
    """The rounding of the coarser one is no part of the rank."""
    mixed = WEIGHTS | {"in": WEIGHTS["in"].astype(jnp.float32)}
    inputs, labels = jr.normal(jr.key(1), (30, 4)), jr.randint(jr.key(2), (30,), 0, 3)
    loss = mf.PerExampleLoss(inputs, labels, cross_entropy, predict=of_dict)
    rank = report(loss, WEIGHTS, num_samples=16)["rank"].value
    found = report(loss, mixed, num_samples=16)
    assert found["rank"].value <= rank
    assert found["largest eigenvalue"].standard_error > 1e-8
    # In single precision eigenvalues go on where rounding begins: the least is not known.
    inputs, labels = jr.normal(jr.key(1), (200, 4)), jr.randint(jr.key(2), (200,), 0, 3)
    loss = mf.PerExampleLoss(inputs, labels, cross_entropy, predict=of_dict)
    wide = {"in": jr.normal(jr.key(3), (99, 4)), "out": jr.normal(jr.key(4), (3, 99))}
    single = jax.tree.map(lambda x: x.astype(jnp.float32), wide)
    with pytest.raises(KeyError, match="no gap: eigenvalues go down to rounding"):
        report(loss, single, num_samples=16, learning_rate=0.1)["smallest eigenvalue"]


def test_edges():
    one = mf.PerExampleLoss(INPUTS[:1], LABELS[:1], cross_entropy, predict=of_dict)
    for rows in (1, 2000):
        table = report(one, WEIGHTS, max_rows=rows, num_samples=16)
        equal("no noise of one example", table["gradient noise"].value, 0)
    half = mf.LeastSquares(
        INPUTS, SQUARES.targets, predict=SQUARES.predict, trainable={"in": True, "out": False}
    )
    table = report(half, WEIGHTS, num_samples=16)
    equal("coordinates", table["coordinates"].value, 24)
    equal("leaves", [leaf.leaf for leaf in table.leaves], ["['in']"])
    close("tr G", table["trace of G"].value, half.trace_gauss_newton(WEIGHTS), 1e-9)
    flat = mf.LeastSquares(
        INPUTS, SQUARES.targets, predict=lambda w, x: 0.0 * SQUARES.predict(w, x)
    )
    for rows in (1, 2000):
        table = report(flat, WEIGHTS, max_rows=rows, num_samples=16)
        with pytest.raises(KeyError, match="leaves out 'largest stable learning rate': G is zero"):
            table["largest stable learning rate"]
    table = report(LOSS, WEIGHTS, max_rows=1, num_samples=16, seconds=1e-9)
    if "largest eigenvalue" not in table.quantities:
        with pytest.raises(KeyError, match="to within .* products, .*; raise seconds=1e-09"):
            table["largest eigenvalue"]
    decayed = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=of_dict, weight_decay=0.1)
    assert "weight decay included" in report(decayed, WEIGHTS, num_samples=16)["loss"].how


# --- The picture -----------------------------------------------------------------------------


def test_the_picture():
    table = report(LOSS, WEIGHTS, learning_rate=0.1, num_samples=16)
    figure = plot_report(table)
    left, right = figure.axes
    assert left.get_xlabel() and left.get_ylabel() and right.get_xlabel()
    equal("a log axis", left.get_yscale(), "log")
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert any(label.startswith("2/η, η = 0.1 = ") for label in labels), labels
    assert any(label.startswith("2/η*") for label in labels) and any("bounds" in x for x in labels)
    assert f"tr G = {table['trace of G'].value:.4g}" in right.get_title()
    matplotlib.pyplot.close(figure)
    for some in (
        report(LOSS, WEIGHTS, max_rows=1, num_samples=16),
        report(mf.FunctionLoss(lambda w: -jnp.sum(w**2)), jnp.ones(3), num_samples=16),
    ):
        figure = plot_report(some)
        assert figure.axes[0].get_title() == "Largest eigenvalues"
        matplotlib.pyplot.close(figure)
