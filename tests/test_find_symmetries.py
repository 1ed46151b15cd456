"""Symmetries found by numbers alone: convolutions, residual branches, normalisations, attention,
and networks outside Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from manifoldflow import symmetry

SIGMA2 = 0.05


def normal(seed, *shape):
    return jr.normal(jr.key(seed), shape)


def pairs(found):
    return [(one.first, one.second) for one in found]


def model_loss(model, example):
    return jnp.sum((model(example[0]) - example[1]) ** 2)


class Pictures(eqx.Module):
    """Normalised channels, pooling, and a layer that reads flat pictures."""

    stem: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    next: eqx.nn.Conv2d
    read: eqx.nn.Linear

    def __init__(self, keys):
        self.stem = eqx.nn.Conv2d(1, 2, 3, key=keys[0])
        self.norm = eqx.nn.GroupNorm(2, 2)
        self.next = eqx.nn.Conv2d(2, 3, 1, key=keys[1])
        self.read = eqx.nn.Linear(3 * 4, 2, key=keys[2])

    def __call__(self, x):
        h = jax.nn.leaky_relu(self.next(jax.nn.relu(self.norm(self.stem(x)))))
        return self.read(eqx.nn.MaxPool2d(2, 2)(h).ravel())


PICTURES = Pictures(jr.split(jr.key(0), 3))
SEEN = normal(1, 12, 1, 6, 6), normal(2, 12, 2)


def test_convolutions_and_normalisations():
    found = symmetry.find_rescalings(PICTURES, model_loss, SEEN)
    equal("found", pairs(found), [(".norm", ".next"), (".next", ".read")])
    equal("degrees", [one.degree for one in found], [1.0, 1.0])
    # Balanced it is the same function, and where it was balanced it stays.
    balanced = lambda m: symmetry.balance_with_info(m, (model_loss, SEEN), symmetries=found)
    there, info = balanced(PICTURES)
    at_least("way", np.max(np.abs(info.parameters)), 0.1)
    at_most("way again", np.max(np.abs(balanced(there)[1].parameters)), 1e-9)
    outputs = jax.jit(lambda m: jax.vmap(m)(SEEN[0]))
    close("function", outputs(there), outputs(PICTURES), 1e-10)
    # The stem's weight is invariant by itself; its bias has no gradient, and nothing else is.
    (scaling,) = symmetry.find_scalings(PICTURES, model_loss, SEEN)
    equal("where", scaling.where, ".stem.weight")
    at_least("broken by the normalisation's epsilon", scaling.check.defect, 1e-8)


def test_residual_branches_and_their_stream_neuron_by_neuron():
    """What reads the stream reads two pixels of each of its three channels, laid flat."""

    def loss(p, example):
        h = p["in"]["w"] @ example[0] + p["in"]["b"]
        h = h + p["down"]["w"] @ jax.nn.leaky_relu(p["up"]["w"] @ h + p["up"]["b"])
        flat = jnp.outer(h, jnp.array([1.0, 0.5])).ravel()
        return jnp.sum((p["out"]["w"] @ flat - example[1]) ** 2)

    point = {
        "down": {"w": normal(0, 3, 4)},
        "in": {"b": normal(1, 3), "w": normal(2, 3, 2)},
        "out": {"w": normal(3, 2, 6)},
        "up": {"b": normal(4, 4), "w": normal(5, 4, 3)},
    }
    data = normal(6, 12, 2), normal(7, 12, 2)
    found = symmetry.find_rescalings(point, loss, data, per_neuron=True)
    branch, stream = ("['up']", "['down']"), ("['down'] and ['in']", "['out'] and ['up']")
    equal("found", pairs(found), 3 * [stream] + 4 * [branch])
    equal("neurons", [one.neuron for one in found], [0, 1, 2, 0, 1, 2, 3])
    values = jax.jit(lambda p: jax.vmap(lambda *e: loss(p, e))(*data))
    moved = found[2].symmetry.act(point, 0.7)
    at_least("one of them moves", np.max(np.abs(moved["out"]["w"] - point["out"]["w"])), 0.1)
    close("losses", values(moved), values(point), 1e-11)


def test_statistics_over_batches():
    """A batch is an example where a normalisation looks at all of it."""

    def loss(p, batch):
        x, y = batch
        z = x @ p["in"]["w"] + p["in"]["b"]
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-6)
        hidden = jax.nn.relu(z * p["norm"]["scale"] + p["norm"]["offset"])
        return jnp.mean((hidden @ p["out"]["w"] - y) ** 2)

    point = {
        "in": {"w": normal(0, 3, 4), "b": normal(1, 4)},
        "norm": {"scale": 1 + 0.1 * normal(2, 4), "offset": normal(3, 4)},
        "out": {"w": normal(4, 4, 2)},
    }
    data = normal(5, 6, 8, 3), normal(6, 6, 8, 2)
    found = symmetry.find_rescalings(point, loss, data)
    equal("rescalings", pairs(found), [("['norm']", "['out']")])
    (scaling,) = symmetry.find_scalings(point, loss, data)
    assert isinstance(scaling, symmetry.Scaling) and "scaled; symmetry" in str(scaling), scaling
    equal("where", scaling.where, "['in']['w']")
    options = dict(noise_scale=SIGMA2, weight_decay=0.01, symmetries=[scaling])
    there, info = symmetry.balance_with_info(point, (loss, data), **options)
    equal("names", info.names, ("['in']['w'] scaled",))
    again = symmetry.balance_with_info(there, (loss, data), **options)[1]
    at_most("way again over way", abs(again.parameters[0] / info.parameters[0]), 1e-2)


def test_heads_that_share_an_axis():
    """Linear attention with two heads: a product in each of them, and none across."""

    def loss(p, example):
        x, y = example
        split = lambda name: (x @ p[name]["w"] + p[name].get("b", 0)).reshape(3, 2, 2)
        scores = jnp.einsum("ihk,jhk->hij", split("query"), split("key")) ** 2
        mixed = jnp.einsum("hij,jhk->ihk", scores, split("value")).reshape(3, 4)
        return jnp.sum((mixed @ p["out"]["w"] - y) ** 2)

    layer = lambda seed, *shape: {"w": normal(seed, *shape), "b": normal(seed + 9, shape[1])}
    point = {"key": {"w": normal(0, 3, 4)}, "out": {"w": normal(1, 4, 2)},
             "query": layer(2, 3, 4), "value": layer(3, 3, 4)}  # fmt: skip
    data = normal(4, 8, 3, 3), normal(5, 8, 3, 2)
    found = symmetry.find_products(point, loss, data)
    equal("names", [one.name for one in found],
          ["['query'] against ['key']", "['value'] against ['out']"])  # fmt: skip
    values = jax.jit(lambda p: jax.vmap(lambda *e: loss(p, e))(*data))
    for one in found:
        equal("blocks", (one.num_blocks, one.size(point)), (2, 2))
        close("losses", values(one.act(point, normal(6, 2, 2, 2))), values(point), 1e-11)
    wrong = symmetry.product_symmetry(
        point, lambda p: p["query"]["w"], lambda p: p["key"]["w"], axes=(1, 1), num_blocks=2
    )
    gap = values(wrong.act(point, normal(6, 2, 2))) - values(point)
    at_least("change without the bias", np.max(np.abs(gap)), 1e-3)


def test_attention_of_flax():
    """Heads and their features are two axes there, and layers are (inputs, outputs)."""
    nn = pytest.importorskip("flax.linen")
    net = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, param_dtype=float)
    x = normal(0, 8, 3, 3)
    params = net.init(jr.key(1), x[0])
    data, loss = (x, normal(2, 8, 3, 3)), lambda p, e: model_loss(lambda z: net.apply(p, z), e)
    products = symmetry.find_products(params, loss, data)
    name = lambda *layers: " against ".join(f"['params']['{layer}']" for layer in layers)
    equal("names", [p.name for p in products], [name("key", "query"), name("out", "value")])
    equal("blocks", [(p.num_blocks, p.size(params)) for p in products], [(2, 2), (2, 2)])
    outputs = jax.jit(lambda p: jax.vmap(lambda z: net.apply(p, z))(x))
    for one in products:
        moved = one.act(params, normal(3, 2, 2, 2))
        close(f"outputs, {one.name}", outputs(moved), outputs(params), 1e-10)


def test_layers_of_haiku():
    haiku = pytest.importorskip("haiku")
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([4, 2])(x)))
    params = net.init(jr.key(0), PLAIN_DATA[0][0])
    loss = mf.LeastSquares(*PLAIN_DATA, predict=net.apply)
    (found,) = symmetry.find_rescalings(params, *symmetry.examples_of(loss))
    equal("layers", (found.first, found.second), ("['mlp/~/linear_0']", "['mlp/~/linear_1']"))
    rates = found.symmetry.generator["mlp/~/linear_0"]
    equal("biases grow, though they are still zero", float(rates["b"].sum()), 1.0)
    there = symmetry.balance(params, loss, kind="norm")
    first, second = there["mlp/~/linear_0"], there["mlp/~/linear_1"]
    squares = jnp.sum(first["w"] ** 2) + jnp.sum(first["b"] ** 2), jnp.sum(second["w"] ** 2)
    close("norms", *squares, 1e-6)
    close("loss", loss(there), loss(params), 1e-6)


def plain_loss(activation):
    def loss(p, example):
        x, y = example
        hidden = activation(x @ p["W1"] + p["b1"])
        return jnp.sum((hidden @ p["W2"] @ p["V"] - y) ** 2)

    return loss


PLAIN = {"V": normal(0, 2, 2), "W1": normal(1, 3, 4), "W2": normal(2, 4, 2), "b1": normal(3, 4)}
PLAIN_DATA = normal(4, 8, 3), normal(5, 8, 2)


def test_plain_arrays_in_any_order():
    """x -> (relu(x W1 + b1)^2 W2) V: degree two, and a product of W2 and V that come apart."""
    squared = plain_loss(lambda z: jax.nn.relu(z) ** 2)
    found = symmetry.find_rescalings(PLAIN, squared, PLAIN_DATA)
    assert ("['W1'] and ['b1']", "['W2']") in pairs(found), pairs(found)
    equal("degree", dict(zip(pairs(found), found))["['W1'] and ['b1']", "['W2']"].degree, 2.0)
    (product,) = symmetry.find_products(PLAIN, squared, PLAIN_DATA)
    equal("product", product.name, "['V'] against ['W2']")
    q = np.array([[1.0, 2.0], [-0.5, 1.0]])
    assert symmetry.check_symmetry(product, squared, PLAIN, PLAIN_DATA)
    value = jax.jit(lambda p: jax.vmap(lambda *e: squared(p, e))(*PLAIN_DATA))
    close("losses", value(product.act(PLAIN, q)), value(PLAIN), 1e-12)


def test_what_is_not_there_is_not_found():
    """A ReLU with a bend of 1e-4, about which no degree holds; and the message of `balance`."""
    bent = plain_loss(lambda z: jax.nn.relu(z) + 1e-4 * jnp.tanh(z))
    found = symmetry.find_rescalings(PLAIN, bent, PLAIN_DATA)
    equal("only the product's", [one.first for one in found], ["['V']"])
    curved = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(*PLAIN_DATA)
    with refused(ValueError, "no rescaling", "find_products", "find_scalings", "homogeneous"):
        symmetry.balance(curved, loss)
