"""Which leaves move: those that are weights to the model's own library, and seen by the loss."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
import zoo
from checks import at_most, close, equal, flat, norm, refused
from manifoldflow import _trainable
from manifoldflow.losses._reach import check_reach

INPUTS, TARGETS = zoo.data()
LABELS = jnp.array([0, 2, 1, 1])


def cross_entropy(f, y):
    return jax.nn.logsumexp(f) - f[y]


@pytest.fixture(autouse=True)
def nothing_mentioned(monkeypatch):
    monkeypatch.setattr(_trainable, "_mentioned", set())


def says(*words):
    return pytest.warns(UserWarning, match=".*".join(words))


def size(tree):
    return flat(tree).size


# --- stand-ins: classes of Flax as they look from outside ----------------------------------


@jax.tree_util.register_pytree_with_keys_class
class Variable:
    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("value"), self.value),), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@jax.tree_util.register_pytree_with_keys_class
class Param(Variable):
    pass


@jax.tree_util.register_pytree_with_keys_class
class LowRank(Param):
    """A subclass of a Param is one."""


@jax.tree_util.register_pytree_with_keys_class
class BatchStat(Variable):
    pass


@jax.tree_util.register_pytree_with_keys_class
class Module:
    def __init__(self, **parts):
        self.parts = parts

    def tree_flatten_with_keys(self):
        keys = sorted(self.parts)
        return [(jax.tree_util.GetAttrKey(k), self.parts[k]) for k in keys], tuple(keys)

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(**dict(zip(keys, children)))


for stand_in in (Variable, Param, LowRank, BatchStat):
    stand_in.__module__ = "flax.nnx.variablelib"
Module.__module__ = "flax.nnx.module"


def stand_in_module():
    net = zoo.network_point(jr.key(5), num_outputs=3)
    return Module(
        weight=Param(net["weight"]),
        bias=LowRank(net["bias"]),
        out=Module(kernel=Param(net["out"]), mean=BatchStat(jnp.ones(6))),
        buffer=jnp.ones(3),
        count=Variable(jnp.array(3)),
    )


def of_stand_in(m, x):
    p = m.parts
    hidden = jnp.tanh(p["weight"].value @ x + p["bias"].value) * p["out"].parts["mean"].value
    return p["out"].parts["kernel"].value @ hidden * p["buffer"]


def test_only_params_of_an_nnx_module_move():
    model = stand_in_module()
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=of_stand_in)
    with says(r"\.buffer, \.out\.mean stay as they are", r"nnx\.Param", "trainable=True", "once"):
        coordinates, remainder = loss.split(model)
    equal("coordinates", size(coordinates), 6 * 3 + 6 + 3 * 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        gradient = loss.gradient(model)
    assert gradient.parts["out"].parts["mean"].value is None
    assert gradient.parts["buffer"] is None
    joined = eqx.combine(coordinates, remainder)
    assert eqx.tree_equal(joined, model), joined
    manifold = mf.OutputManifold(of_stand_in, INPUTS, like=model)
    v = manifold.random_tangent(model, jr.key(0))
    moved = manifold.retract(model, jax.tree.map(lambda x: 0.1 * x, v))
    equal(
        "the average stays", float(jnp.max(jnp.abs(moved.parts["out"].parts["mean"].value - 1))), 0
    )
    close("a whole model as a vector", manifold.tangent_projection(model, moved),
          manifold.tangent_projection(model, loss.split(moved)[0]), 1e-12)  # fmt: skip
    everything = mf.PerExampleLoss(
        INPUTS, LABELS, cross_entropy, predict=of_stand_in, trainable=True
    )
    equal("if asked for", size(everything.split(model)[0]), 6 * 3 + 6 + 3 * 6 + 6 + 3)


def linen_variables():
    params = {"dense": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}}
    return {"batch_stats": {"norm": {"mean": jnp.zeros(2)}}, "params": params, "cache": {}}


def of_variables(v, x):
    scale, mean = v["params"]["norm"]["scale"], v["batch_stats"]["norm"]["mean"]
    return scale * (x @ v["params"]["dense"]["kernel"] - mean)


def test_only_params_of_linen_variables_move():
    variables = linen_variables()
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=of_variables)
    with says("batch_stats", "mean", "stay as they are", "'params' of Linen"):
        coordinates, _ = loss.split(variables)
    equal("coordinates", size(coordinates), 8)
    inside = {"a": variables, "b": jnp.ones(2)}
    with says("'a'", "batch_stats"):
        equal("within a dict", size(mf.split(inside)[0]), 10)
    equal("the params alone", size(mf.split(variables["params"])[0]), 8)
    plain = {"params": jnp.ones(3), "noise": jnp.ones(2)}
    equal("a dict of one's own", size(mf.split(plain)[0]), 5)


def test_states_of_equinox_are_refused():
    class Model(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.linear = eqx.nn.Linear(3, 2, key=key)
            self.norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="ema")

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    loss = mf.LeastSquares(INPUTS, TARGETS)
    ways = "make_with_state", "inference_mode(model)", "predict=lambda model, x: model(x, state)[0]"
    with refused(ValueError, "equinox.nn.StateIndex", "running averages", *ways):
        loss.split(Model(jr.key(0)))
    model, state = eqx.nn.make_with_state(Model)(jr.key(0))
    with refused(ValueError, "equinox.nn.State,", "no weights", *ways):
        loss.split((model, state))
    model = eqx.nn.inference_mode(model)
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=lambda m, x: m(x, state)[0])
    equal("as the message says", size(loss.gradient(model)), 3 * 2 + 2 + 2 + 2)


# --- leaves without a derivative -----------------------------------------------------------


def probe(p, x):
    features = jax.lax.stop_gradient(jnp.tanh(p["weight"] @ x + p["bias"]))
    return p["out"] @ features


def straight_through(w):
    return w + jax.lax.stop_gradient(jnp.round(w) - w)


@jax.custom_jvp
def hard(x):
    return jnp.sign(x)


hard.defjvp(lambda primals, tangents: (hard(*primals), tangents[0]))

POINT = zoo.network_point(jr.key(5))
BLIND = {
    "stop_gradient": (probe, ["'bias'", "'weight'"]),
    "inside jit": (jax.jit(probe), ["'bias'", "'weight'"]),
    "inside a checkpoint": (jax.checkpoint(probe), ["'bias'", "'weight'"]),
    "rounding": (lambda p, x: zoo.network(p | {"bias": jnp.round(p["bias"])}, x), ["'bias'"]),
    "comparison": (lambda p, x: zoo.network(p | {"bias": p["bias"] > 0}, x), ["'bias'"]),
    "index": (
        lambda p, x: p["out"] @ jnp.tanh(p["weight"] @ x)[p["bias"].astype(int)], ["'bias'"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLIND)
def test_leaves_without_a_derivative_are_refused(name):
    predict, leaves = BLIND[name]
    freeze = "stop_gradient", "comparison", "Freeze it by trainable="
    squares = mf.LeastSquares(INPUTS, TARGETS, predict=predict)
    inside = lambda p: jax.jit(lambda p: squares.residual(p))(p)
    for use in (squares, squares.gradient, squares.jacobian, inside):
        with refused(ValueError, *leaves, *freeze):
            use(POINT)
    logits = mf.PerExampleLoss(INPUTS, LABELS % 2, cross_entropy, predict=predict)
    for use in (logits, logits.gradient, logits.trace_gauss_newton):
        with refused(ValueError, *leaves, *freeze):
            use(POINT)
    for build in (
        lambda: mf.OutputManifold(predict, INPUTS, like=POINT),
        lambda: mf.ZeroLossManifold(squares).project(POINT),
        lambda: mf.LevelSet(lambda p: predict(p, INPUTS[0])).project(POINT),
    ):
        with refused(ValueError, *leaves, *freeze):
            build()
    names = [leaf.strip("'") for leaf in leaves]
    trainable = {k: k not in names for k in POINT}
    frozen = mf.LeastSquares(INPUTS, TARGETS, predict=predict, trainable=trainable)
    assert np.isfinite(norm(frozen.gradient(POINT))), "frozen, it is fine"


SEEN = {
    "idle": lambda p, x: p["out"] @ jnp.tanh(p["weight"] @ x),
    "idle inside jit": jax.jit(lambda p, x: p["out"] @ jnp.tanh(p["weight"] @ x)),
    "straight through": lambda p, x: zoo.network(jax.tree.map(straight_through, p), x),
    "own derivative": lambda p, x: zoo.network(p | {"bias": hard(p["bias"])}, x),
    "in a part": lambda p, x: zoo.network(p, x) * jax.lax.stop_gradient(jnp.sum(p["bias"])),
    "scan": lambda p, x: jax.lax.scan(
        lambda c, b: (jnp.tanh(c + b), None), zoo.network(p, x), p["bias"]
    )[0],
}


@pytest.mark.quick
@pytest.mark.parametrize("name", SEEN)
def test_leaves_that_are_fine(name):
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=SEEN[name])
    gradient = loss.gradient(POINT)
    assert np.isfinite(norm(gradient))


def test_looked_at_once():
    """One look at a model for many calls, whatever its values; a model without a hash is fine."""
    traces = []

    def counted(p, x):
        traces.append(1)
        return zoo.network(p, x)

    loss = mf.LeastSquares(INPUTS, TARGETS, predict=counted)
    for scale in (1.0, 2.0, 3.0):
        point = jax.tree.map(lambda x, s=scale: s * x, POINT)
        check_reach(loss.example_residual, *loss.split(point), loss.data)
    equal("traces", len(traces), 1)
    check_reach(loss.example_residual, *loss.split(POINT), jax.tree.map(lambda x: x[:2], loss.data))
    equal("traces for data of another shape", len(traces), 2)

    class Unhashable:
        __hash__ = None

        def __call__(self, p, x):
            return probe(p, x)

    with refused(ValueError, "'bias'", "stop_gradient"):
        check_reach(Unhashable(), *mf.split(POINT), INPUTS)


# --- Flax and Haiku themselves, where they are there ---------------------------------------


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.gelu(self.norm(self.first(x)))))

    model = Net(nnx.Rngs(0))
    model.eval()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy)
    with says("norm.mean", "norm.var", "stay as they are"):
        equal("coordinates", size(loss.split(model)[0]), num_params)
    graph, state = nnx.split(model)
    of_state = mf.PerExampleLoss(
        INPUTS, LABELS, cross_entropy, predict=lambda s, x: nnx.merge(graph, s)(x)
    )
    with says("norm", "mean"):
        equal("of a State", size(of_state.split(state)[0]), num_params)
    close("same loss", of_state(state), loss(model), 1e-6)
    close("same tr G", of_state.trace_gauss_newton(state), loss.trace_gauss_newton(model), 1e-5)
    manifold = mf.OutputManifold(None, INPUTS, like=model)
    v = manifold.random_tangent(model, jr.key(0))
    end = manifold.retract(model, jax.tree.map(lambda v: 0.1 * v, v))
    moved = jax.vmap(end)(INPUTS) - jax.vmap(model)(INPUTS)
    at_most("outputs moved", jnp.max(jnp.abs(moved)), 1e-4)


def test_flax_linen():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
            return linen.Dense(3)(linen.relu(x))

    net = Net()
    variables = net.init(jr.key(0), INPUTS[0])
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=net.apply)
    with says("batch_stats", "BatchNorm_0", "stay as they are"):
        gradient = loss.gradient(variables)
    equal("coordinates", size(gradient), 3 * 8 + 8 + 8 + 8 + 8 * 3 + 3)


def test_haiku():
    haiku = pytest.importorskip("haiku")
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([8, 3])(x)))
    params = net.init(jr.key(0), INPUTS[0])
    loss = mf.PerExampleLoss(INPUTS, LABELS, cross_entropy, predict=net.apply)
    equal("coordinates", size(loss.gradient(params)), 3 * 8 + 8 + 8 * 3 + 3)
