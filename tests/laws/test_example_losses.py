"""Losses over examples that need no minimum: hard labels, whole numbers, weight decay."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, flat
from limit_laws import all_batches
from manifoldflow import linalg, symmetry

DECAY = 0.3
INPUTS, _ = zoo.data(num_examples=5)
LABELS = jnp.array([2, 0, 1, 1, 0])


def whole_numbers(f, y):
    return jax.nn.logsumexp(f) - f[y]


def saddle(f, y):
    """Its second derivative in f has both signs."""
    return f[0] ** 2 * f[1] - y * jnp.sin(f[2] * f[1])


def relu_net(point, x):
    return point["out"] @ jax.nn.relu(point["weight"] @ x + point["bias"])


def built(loss_fn=whole_numbers, targets=LABELS, **options):
    return mf.PerExampleLoss(
        INPUTS, targets, loss_fn, **{"predict": relu_net, "weight_decay": DECAY, **options}
    )


def image(point, x):
    return jnp.outer(zoo.network(point, x), x[:2])


CASES = {
    "whole numbers": built,
    "hard labels": lambda: built(zoo.softmax, jax.nn.one_hot(LABELS, 3)),
    "no decay": lambda: built(weight_decay=0),
    "one output": lambda: built(
        zoo.logistic, LABELS % 2, predict=lambda p, x: zoo.network(p, x)[0]
    ),
    "no sign": lambda: built(saddle, jnp.linspace(0.5, 2, 5), predict=zoo.network),
    "matrices, and targets in a dict": lambda: built(
        lambda f, y: whole_numbers(f.reshape(-1), y["label"]) * y["weight"],
        {"label": LABELS, "weight": jnp.linspace(0.5, 2, 5)},
        predict=image,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


class Dense:
    """The loss, its outputs and its Gauss-Newton matrix, from one vector and by brute force."""

    def __init__(self, loss, seed=5):
        self.loss, self.point = loss, zoo.network_point(jr.key(seed), num_outputs=3)
        self.x, self.unravel = ravel_pytree(self.point)
        self.decay = 0.0 if loss.weight_decay is None else DECAY

    def outputs(self, x):
        one = lambda z: self.loss.predict(self.unravel(x), z)
        return jax.vmap(one)(INPUTS).reshape(5, -1)

    def mean_of(self, outputs):
        like = jax.eval_shape(lambda: self.loss.predict(self.point, INPUTS[0]))
        values = jax.vmap(self.loss.loss_fn)(outputs.reshape(5, *like.shape), self.loss.targets)
        return jnp.mean(values)

    def value(self, x):
        return self.mean_of(self.outputs(x)) + self.decay / 2 * x @ x

    def gauss_newton(self, x):
        outputs, jacobian = self.outputs(x), jax.jacfwd(self.outputs)(x)
        weights = jax.hessian(self.mean_of)(outputs)
        return jnp.einsum("aid,aibj,bje->de", jacobian, weights, jacobian)


@every_case
def test_derivatives_and_traces(name):
    dense = Dense(CASES[name]())
    v = zoo.normal_like(dense.point, 1)

    @eqx.filter_jit
    def found(loss, point, v):
        curved = loss.gauss_newton(point).mv(v), loss.trace_gauss_newton(point)
        rest = loss.hessian(point).mv(v), loss.trace_hessian(point)
        return loss(point), loss.gradient(point), *curved, *rest

    value, gradient, along, trace, hessian_along, hessian_trace = found(dense.loss, dense.point, v)
    matrix, hessian = (jax.jit(f)(dense.x) for f in (dense.gauss_newton, jax.hessian(dense.value)))
    close("L", value, dense.value(dense.x), 1e-12)
    close("∇L", gradient, jax.grad(dense.value)(dense.x), 1e-12)
    close("G·v, seed 1", along, matrix @ flat(v), 1e-11)
    close("tr G", trace, jnp.trace(matrix), 1e-11)
    close("∇²L·v, seed 1", hessian_along, hessian @ flat(v), 1e-11)
    close("tr ∇²L", hessian_trace, jnp.trace(hessian), 1e-11)


@every_case
def test_the_trace_can_be_differentiated_twice(name):
    """Through the weights as well, and where their eigenvalues coincide."""
    dense = Dense(CASES[name]())
    even = jax.tree.map(jnp.zeros_like, dense.point) | {"weight": dense.point["weight"]}
    for point in (dense.point, even):
        x = ravel_pytree(point)[0]
        trace = lambda x, dense=dense: dense.loss.trace_gauss_newton(dense.unravel(x))
        expected = lambda x, dense=dense: jnp.trace(dense.gauss_newton(x))
        close("∇tr G", jax.grad(trace)(x), jax.grad(expected)(x), 1e-9, scale=1.0)
        v = jr.normal(jr.key(3), x.shape)
        turned = [jax.jvp(jax.grad(f), (x,), (v,))[1] for f in (trace, expected)]
        close("∇²tr G·v, seed 3", *turned, 1e-8, scale=1.0)


@pytest.mark.parametrize("name", [n for n in CASES if n != "no sign"])
def test_the_root_is_one(name):
    dense = Dense(CASES[name]())
    root = jax.jit(lambda p: dense.loss.gauss_newton_root(p).as_matrix())(dense.point)
    close("AᵀA", root.T @ root, dense.gauss_newton(dense.x), 1e-11)


def test_the_trace_of_the_hessian_gains_the_decay():
    with_decay, without = Dense(built()), Dense(built(weight_decay=0.0))
    gain = with_decay.loss.trace_hessian(with_decay.point) - without.loss.trace_hessian(
        without.point
    )
    close("λD", gain, DECAY * with_decay.x.size, 1e-12)
    same = [dense.loss.trace_gauss_newton(dense.point) for dense in (with_decay, without)]
    equal("tr G without it", float(same[0]), float(same[1]))
    frozen = built(trainable={"weight": True, "bias": False, "out": True})
    penalty = frozen(with_decay.point) - without.loss(with_decay.point)
    moving = [with_decay.point[k] for k in ("weight", "out")]
    close("of what moves", penalty, DECAY / 2 * sum(jnp.sum(m**2) for m in moving), 1e-12)


def test_structured_and_small():
    """Never n×D numbers, for a network that is wide enough to have factors."""
    width, count = 200, 40
    x, y = jr.normal(jr.key(0), (count, 20)), jnp.arange(count) % 10
    point = zoo.network_point(jr.key(1), 20, width, 10)
    loss = mf.PerExampleLoss(x, y, whole_numbers, predict=relu_net)
    program = jax.make_jaxpr(loss.trace_gauss_newton)(point)
    num_columns = ravel_pytree(point)[0].size
    at_most("largest array", max(zoo.array_sizes(program)), count * 20 * num_columns / 4)
    rows = jax.jit(lambda p: loss.gauss_newton_root(p).row_norms_squared())(point)
    close("tr G", loss.trace_gauss_newton(point), jnp.sum(rows), 1e-11)


def test_spectrum():
    dense = Dense(built())
    values = np.linalg.eigvalsh(dense.gauss_newton(dense.x))
    found = linalg.largest_eigenvalues(dense.loss.gauss_newton(dense.point), 3)
    close("λ of G", found.values, values[-3:][:: 1 if found.values[0] < found.values[-1] else -1],
          1e-6)  # fmt: skip
    values = np.linalg.eigvalsh(jax.hessian(dense.value)(dense.x))
    found = linalg.largest_eigenvalues(dense.loss.hessian(dense.point), 1)
    close("λ₁ of ∇²L", found.values, values[-1:], 1e-6)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("name", ["whole numbers", "hard labels", "one output"])
def test_minibatches(name, replacement):
    """By enumeration of all batches of two; the decay has no noise."""
    dense = Dense(CASES[name]())
    batches = [np.array(b) for b in all_batches(5, 2, replacement)]
    gradients = np.stack([flat(dense.loss.select(b).gradient(dense.point)) for b in batches])
    close("mean", gradients.mean(0), flat(dense.loss.gradient(dense.point)), 1e-12)
    noise = mf.MinibatchNoise(2, replacement=replacement)
    factor = noise.factor(dense.loss, dense.point)
    matrix = jnp.stack([flat(factor.mv(e)) for e in jnp.eye(5)], axis=1)
    close("Σ", matrix @ matrix.T, np.cov(gradients.T, bias=True), 1e-11)
    drawn = jax.jit(noise.gradient)(dense.loss, dense.point, jr.key(0))
    gaps = jnp.linalg.norm(gradients - flat(drawn), axis=1)
    at_most("the drawn gradient is one of them", jnp.min(gaps), 1e-12)


def test_noisy_labels_keep_the_decay():
    dense = Dense(built(zoo.softmax, 0.1 + 0.7 * jax.nn.one_hot(LABELS, 3)))
    keys = jr.split(jr.key(0), 4000)
    for noise in (mf.LabelNoise(0.1), mf.ResampledLabels()):
        drawn = jax.jit(jax.vmap(lambda k, n=noise: n.gradient(dense.loss, dense.point, k)))(keys)
        found = np.stack(
            [flat(jax.tree.map(lambda g, i=i: g[i], drawn)) for i in range(0, 4000, 8)]
        )
        error = found.mean(0) - flat(dense.loss.gradient(dense.point))
        spread = found.std(0) / np.sqrt(len(found)) + 1e-12
        at_most(f"{type(noise).__name__}: errors in σ, seed 0", np.max(np.abs(error / spread)), 4.5)
        assert mf.ResampledLabels().hessian_multiple(dense.loss) is None


def test_under_transformations():
    """The loss is built, called and differentiated inside jit and vmap."""
    point = zoo.network_point(jr.key(5), num_outputs=3)

    @jax.jit
    def inside(labels, decay, point):
        loss = built(targets=labels, weight_decay=decay)
        return loss(point), loss.gradient(point), loss.trace_gauss_newton(point)

    expected = built()
    expected = expected(point), expected.gradient(point), expected.trace_gauss_newton(point)
    close("built inside", inside(LABELS, DECAY, point), expected, 1e-12)
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), point)
    many = jax.vmap(lambda p: inside(LABELS, DECAY, p))(points)
    close("the first of two", jax.tree.map(lambda leaf: leaf[0], many), expected, 1e-12)
    traced = []

    def count(f, y):
        traced.append(1)
        return whole_numbers(f, y)

    losses = [built(count, weight_decay=decay) for decay in (0.1, 0.2)]
    gradient = jax.jit(lambda loss, point: loss.gradient(point))
    gradient(losses[0], point)
    num_traces = len(traced)
    gradient(losses[1], point)
    gradient(eqx.tree_at(lambda loss: loss.targets, losses[1], LABELS[::-1]), point)
    equal("traces for another decay, other labels", len(traced), num_traces)


def test_single_precision():
    point = jax.tree.map(lambda x: x.astype(jnp.float32), Dense(built()).point)
    loss = built()
    found = loss(point), loss.gradient(point), loss.trace_gauss_newton(point)
    equal("dtypes", {leaf.dtype for leaf in jax.tree.leaves(found)}, {jnp.dtype("float32")})
    close("tr G", found[2], loss.trace_gauss_newton(Dense(loss).point), 1e-5)
    confident = jax.tree.map(lambda x: 30 * x, point)  # p = 1 in single precision
    trace = loss.trace_gauss_newton(confident)
    at_least("finite and not negative", float(jnp.where(jnp.isfinite(trace), trace, -1)), 0.0)


def test_the_minimum_is_found_where_the_manifold_is_asked_for():
    loss = mf.PerExampleLoss(INPUTS, 0.1 + 0.7 * jax.nn.one_hot(LABELS, 3), zoo.softmax)
    form = mf.ZeroLossManifold(loss).loss
    assert isinstance(form, mf.losses.ResidualForm)
    assert not isinstance(loss, mf.AbstractResidualLoss)
    model = zoo.mlp(jr.key(6), 3)
    equal("value", float(form(model)), float(loss(model)))
    close("gradient", form.gradient(model), loss.gradient(model), 1e-14)
    chosen = form.select(np.array([1, 3]))
    expected = form.residual(model).reshape(5, 2)[jnp.array([1, 3])].reshape(-1)
    close("residuals of some", chosen.residual(model), expected, 1e-14)
    kept = mf.explain(loss, model)
    assert any("weight" in row.leaf for row in kept), kept


def test_descent_with_hard_labels_and_decay():
    """The flow of the whole loss ends where its gradient vanishes: a minimum, thanks to λ."""
    loss = built(predict=zoo.network)
    start = zoo.network_point(jr.key(5), num_outputs=3)
    limit = mf.limit_map(loss, start)
    at_most("∇L at the limit", jnp.linalg.norm(flat(loss.gradient(limit))), 1e-4)
    assert isinstance(loss.hessian(limit), lx.AbstractLinearOperator)


def test_symmetries_do_not_see_the_decay():
    """A network with decay is balanced as one without: decay has no noise."""
    net = eqx.nn.MLP(3, 3, 6, 1, activation=jax.nn.relu, key=jr.key(0))
    losses = [
        mf.PerExampleLoss(INPUTS, LABELS, whole_numbers, weight_decay=decay) for decay in (0.3, 0)
    ]
    with_decay, without = (symmetry.balance(net, loss) for loss in losses)
    close("weights", *(losses[1].split(b)[0] for b in (with_decay, without)), 1e-12)
    close("the same function", losses[1](with_decay), losses[1](net), 1e-12)
    example_loss, data = symmetry.examples_of(losses[0])
    mean = jnp.mean(jax.vmap(lambda i: example_loss(net, i))(data))
    close("the mean over the examples", mean, losses[1](net), 1e-12)
