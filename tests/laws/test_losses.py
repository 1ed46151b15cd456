"""Values and derivatives of every loss against brute force by jax.hessian and jax.jacfwd."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, flat
from manifoldflow import losses

INPUTS, TARGETS = zoo.data()


def nets():
    """name → loss, a point off its manifold."""
    wide = jr.normal(jr.key(2), (4, 2, 3))
    return {
        "vector outputs, MLP": (mf.LeastSquares(INPUTS, TARGETS), zoo.mlp(jr.key(4))),
        "scalar outputs": (
            mf.LeastSquares(INPUTS, TARGETS[:, 0]),
            eqx.nn.MLP(3, "scalar", 6, 1, activation=jnp.tanh, key=jr.key(4)),
        ),
        "matrix outputs, dict": (
            mf.LeastSquares(
                INPUTS, wide, predict=lambda p, x: jnp.outer(zoo.network(p, x), jnp.sin(x)), scale=2
            ),
            zoo.network_point(jr.key(5)),
        ),
        "logistic": (losses.ResidualForm(zoo.logistic_loss()), zoo.mlp(jr.key(6), 1)),
        "softmax": (losses.ResidualForm(zoo.softmax_loss()), zoo.mlp(jr.key(6), 3)),
        "function": (mf.FunctionLoss(zoo.cosh_loss), jr.normal(jr.key(3), (5,))),
    }


LOSSES = nets()
every_loss = pytest.mark.parametrize("name", LOSSES)
every_residual_loss = pytest.mark.parametrize("name", [n for n in LOSSES if n != "function"])


class Dense:
    """A loss as a function of one vector."""

    def __init__(self, loss, point):
        self.loss, (self.rebuild, self.x) = loss, zoo.unraveller(loss, point)

    def value(self, x):
        return self.loss(self.rebuild(x))

    def residual(self, x):
        return self.loss.residual(self.rebuild(x))


def random_like(loss, point, seed):
    return zoo.normal_like(loss.split(point)[0], seed)


@every_loss
def test_gradient_and_hessian(name):
    loss, point = LOSSES[name]
    dense = Dense(loss, point)
    v = random_like(loss, point, 1)

    @eqx.filter_jit
    def found(loss, point, v):
        return loss.gradient(point), loss.hessian(point).mv(v), loss.trace_hessian(point)

    gradient, along, trace = found(loss, point, v)
    expected = jax.jit(jax.grad(dense.value))(dense.x)
    hessian = jax.jit(jax.hessian(dense.value))(dense.x)
    close("gradient", gradient, expected, 1e-10)
    close("Hessian·v, seed 1", along, hessian @ flat(v), 1e-10)
    close("tr H", trace, jnp.trace(hessian), 1e-10)


@every_residual_loss
def test_residual_and_jacobian(name):
    loss, point = LOSSES[name]
    dense, v = Dense(loss, point), random_like(loss, point, 2)
    jacobian = jax.jit(jax.jacfwd(dense.residual))(dense.x)
    w = jr.normal(jr.key(3), (loss.num_residuals,))

    @eqx.filter_jit
    def found(loss, point, v):
        operator = loss.jacobian(point)
        return operator.mv(v), operator.T.mv(w), operator.gram(), operator.row_norms_squared()

    mv, transpose, gram, norms = found(loss, point, v)
    equal("number of residuals", loss.num_residuals, len(jacobian))
    close("J v, seed 2", mv, jacobian @ flat(v), 1e-10)
    close("Jᵀw, seed 3", transpose, w @ jacobian, 1e-10)
    close("J Jᵀ", gram, jacobian @ jacobian.T, 1e-10)
    close("squared row norms", norms, jnp.sum(jacobian**2, axis=1), 1e-10)
    close(
        "trace_gauss_newton",
        loss.trace_gauss_newton(point),
        loss.scale * jnp.sum(jacobian**2),
        1e-10,
    )
    expected = loss.scale * jacobian.T @ (jacobian @ flat(v))
    close("Gauss-Newton·v", loss.gauss_newton(point).mv(v), expected, 1e-10)


@pytest.mark.parametrize("name", ["mlp", "logistic", "softmax"])
def test_gauss_newton_is_the_hessian_on_the_manifold(name):
    place = zoo.place(name)
    loss, dense = place.manifold.loss, Dense(place.manifold.loss, place.point)
    hessian = np.asarray(jax.jit(jax.hessian(dense.value))(dense.x))
    jacobian = place.jacobian
    close("scale·JᵀJ", float(loss.scale) * jacobian.T @ jacobian, hessian, 1e-8)
    close("tr", loss.trace_gauss_newton(place.point), np.trace(hessian), 1e-8)
    root = eqx.filter_jit(lambda p: loss.gauss_newton_root(p).gram())(place.point)
    at_most("its root has the same trace", abs(jnp.trace(root) - np.trace(hessian)), 1e-8)
    moved = zoo.moved(place.point, place.random_vector(4), 0.1)
    off = abs(loss.trace_gauss_newton(moved) - loss.trace_hessian(moved))
    at_least("off the manifold the two traces differ", off, 1e-4)


def test_residual_vanishes_exactly_where_the_loss_is_minimal():
    for name in ("logistic", "softmax"):
        place = zoo.place(name)
        loss = place.manifold.loss
        at_most(
            f"{name}: gradient of L on the manifold",
            jnp.linalg.norm(flat(loss.gradient(place.point))),
            1e-9,
        )
        nearby = [loss(zoo.moved(place.point, place.random_vector(s), 0.01)) for s in (5, 6, 7)]
        at_least(f"{name}: loss nearby less loss there", min(nearby) - loss(place.point), 1e-7)


def test_minimisers_of_smoothed_labels():
    """Logistic: log-odds; softmax: log-probabilities up to a shift."""
    logistic, softmax = (zoo.place(name).manifold.loss for name in ("logistic", "softmax"))
    p = logistic.targets
    close("log-odds", logistic.minimizers, jnp.log(p / (1 - p)), 1e-8)
    shifted = softmax.minimizers - jnp.log(softmax.targets)
    at_most("a common shift", jnp.max(jnp.abs(shifted - shifted.mean(axis=1, keepdims=True))), 1e-8)
    equal("softmax: N·(k − 1) residuals", softmax.num_residuals, 8)


@pytest.mark.quick
def test_scale_conventions():
    """Default 1/n with n = N × outputs; 2 and 1/N when asked for."""
    point, outputs = zoo.network_point(jr.key(5)), 2
    squares = float(jnp.sum((jax.vmap(lambda x: zoo.network(point, x))(INPUTS) - TARGETS) ** 2))
    for scale, expected in (
        (None, squares / (2 * 4 * outputs)),
        (2, squares),
        (1 / 4, squares / 8),
    ):
        loss = mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network, scale=scale)
        close(f"L with scale {scale}", loss(point), expected, 1e-12)
    losses = [mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network, scale=s) for s in (1.0, 2.0)]
    close(
        "tr H is linear in the scale",
        losses[1].trace_hessian(point),
        2 * losses[0].trace_hessian(point),
        1e-12,
    )


@pytest.mark.quick
def test_frozen_leaves():
    trainable = {"weight": True, "bias": False, "out": True}
    point = zoo.network_point(jr.key(5))
    free = mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network)
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network, trainable=trainable)
    close("same value", loss(point), free(point), 1e-14)
    gradient = loss.gradient(point)
    assert gradient["bias"] is None, gradient
    close("same gradient elsewhere", gradient["weight"], free.gradient(point)["weight"], 1e-12)
    columns = sum(leaf.size for leaf in jax.tree.leaves(loss.jacobian(point).in_structure()))
    equal("columns of J", columns, 18 + 12)
    at_least(
        "tr H of fewer leaves is smaller",
        free.trace_gauss_newton(point) - loss.trace_gauss_newton(point),
        1e-3,
    )


@pytest.mark.quick
def test_integer_data():
    tokens, labels = jnp.array([0, 2, 1]), jnp.array([1, 0, 3])
    table = jnp.array([[0.1, 1.0], [0.5, -1.0], [0.3, 2.0]])
    loss = mf.LeastSquares(tokens, labels, predict=lambda p, i: p[i, 0] * p[i, 1])
    values = table[tokens, 0] * table[tokens, 1]
    close("integer inputs and targets", loss(table), jnp.mean((values - labels) ** 2) / 2, 1e-12)
    single = loss.residual(table.astype(jnp.float32))
    equal("the point's precision wins", single.dtype, jnp.dtype("float32"))


def test_precision_follows_the_point():
    """float64 data do not promote a float32 point."""
    for name in ("vector outputs, MLP", "softmax"):
        loss, point = LOSSES[name]
        point = jax.tree.map(
            lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, point
        )
        results = loss(point), loss.gradient(point), loss.trace_gauss_newton(point)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(results)}
        equal(f"dtypes of {name}", dtypes, {jnp.dtype("float32")})
