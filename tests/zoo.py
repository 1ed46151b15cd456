"""Manifolds of every kind with a point on them, on which all laws are tried."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

import manifoldflow as mf


class Place:
    """A manifold, a point on it, and dense matrices there that the package did not compute."""

    def __init__(self, manifold: mf.AbstractManifold, point: Any, codimension: int):
        self.manifold, self.point, self.codimension = manifold, point, codimension

    @functools.cached_property
    def coordinates(self):
        return self.coordinates_of(self.point)

    def coordinates_of(self, point):
        return self.manifold.split(point)[0]

    def random_vector(self, seed):
        return normal_like(self.coordinates, seed)

    @functools.cached_property
    def jacobian(self):
        fn, x = constraint_of(self.manifold, self.point)
        return np.asarray(jax.jit(jax.jacfwd(fn))(x))

    @functools.cached_property
    def pseudo_inverse(self):
        k = self.codimension
        u, s, vt = np.linalg.svd(self.jacobian, full_matrices=False)
        return vt[:k].T @ (u[:, :k] / s[:k]).T

    @functools.cached_property
    def projector(self):
        return np.eye(self.jacobian.shape[1]) - self.pseudo_inverse @ self.jacobian


def sphere(x):
    return jnp.sum(x**2) - 1


def torus(x):
    return (jnp.sqrt(x[0] ** 2 + x[1] ** 2) - 2) ** 2 + x[2] ** 2 - 1


def three_equations(x):
    keys = jr.split(jr.key(7), 3)
    linear, square, wave = (jr.normal(k, (3, 8)) for k in keys)
    return {"first": linear[:2] @ x + 0.3 * square[:2] @ x**2, "last": jnp.sin(wave[2] @ x) + x[0]}


def two_wells(x):
    """Two functions whose common zeros are the minima of `cosh_loss`."""
    return jnp.stack([x @ x - 2, x[0] * x[1] + jnp.sin(x[2]) + x[3]])


def cosh_loss(x):
    """Minimal where `two_wells` vanishes, and not a sum of squares."""
    return jnp.sum(jnp.array([1.0, 3.0]) * (jnp.cosh(two_wells(x)) - 1))


def network(point, x):
    hidden = jnp.tanh(point["weight"] @ x + point["bias"])
    return point["out"] @ hidden


def network_point(key, num_inputs=3, width=6, num_outputs=2):
    keys = jr.split(key, 3)
    return {
        "weight": jr.normal(keys[0], (width, num_inputs)),
        "bias": 0.3 * jr.normal(keys[1], (width,)),
        "out": jr.normal(keys[2], (num_outputs, width)) / 2,
    }


def data(num_examples=4, num_inputs=3, num_outputs=2):
    keys = jr.split(jr.key(11), 2)
    inputs = jr.normal(keys[0], (num_examples, num_inputs))
    return inputs, jr.normal(keys[1], (num_examples, num_outputs))


def logistic(output, target):
    """Cross-entropy with a label in (0, 1): smooth, minimal at the log-odds."""
    return jnp.squeeze(jnp.logaddexp(0, output) - target * output)


def softmax(output, target):
    return jax.nn.logsumexp(output) - jnp.sum(target * output)


def mlp(key, num_outputs=2):
    return eqx.nn.MLP(3, num_outputs, 6, 1, activation=jnp.tanh, key=key)


def _level_set(fn, size, codimension):
    return mf.LevelSet(fn), jr.normal(jr.key(3), (size,)), codimension


def _mlp():
    return mf.ZeroLossManifold(mf.LeastSquares(*data())), mlp(jr.key(4)), 8


def _dict_net():
    loss = mf.LeastSquares(*data(), predict=network)
    return mf.ZeroLossManifold(loss), network_point(jr.key(5)), 8


def flat_predict(vector, x):
    return network(ravel_pytree(network_point(jr.key(5)))[1](vector), x)


def _flat_net():
    loss = mf.LeastSquares(*data(), predict=flat_predict)
    return mf.ZeroLossManifold(loss), ravel_pytree(network_point(jr.key(5)))[0], 8


def logistic_loss():
    inputs, targets = data(num_outputs=1)
    return mf.PerExampleLoss(inputs, 0.1 + 0.8 * jax.nn.sigmoid(targets), logistic)


def softmax_loss():
    inputs, targets = data(num_outputs=3)
    return mf.PerExampleLoss(inputs, jax.nn.softmax(targets), softmax)


def _logistic():
    return mf.ZeroLossManifold(logistic_loss()), mlp(jr.key(6), 1), 4


def _softmax():
    return mf.ZeroLossManifold(softmax_loss()), mlp(jr.key(6), 3), 8  # 4·(3 − 1)


def _outputs():
    """The level set of logits that fit nothing in particular; the start is a little off it."""
    manifold = mf.OutputManifold(None, data(num_examples=3)[0], like=mlp(jr.key(8), 3))
    off = normal_like(manifold.split(mlp(jr.key(8), 3))[0], 1)
    return manifold, moved(mlp(jr.key(8), 3), off, 0.05), 9


def _minimizers():
    return mf.MinimizerManifold(mf.FunctionLoss(cosh_loss), 2), jr.normal(jr.key(3), (5,)), 2


_BUILDERS = {
    "sphere": lambda: _level_set(sphere, 3, 1),
    "torus": lambda: _level_set(torus, 3, 1),
    "codimension 3": lambda: _level_set(three_equations, 8, 3),
    "mlp": _mlp,
    "dict net": _dict_net,
    "flat net": _flat_net,
    "logistic": _logistic,
    "softmax": _softmax,
    "outputs": _outputs,
    "minimizers": _minimizers,
}
NAMES = list(_BUILDERS)
SMALL = ["codimension 3", "mlp", "minimizers"]


@functools.cache
def place(name):
    manifold, start, codimension = _BUILDERS[name]()
    return Place(manifold, manifold.project(start), codimension)


# --- a flow whose path is known ------------------------------------------------------------

SPHERE = mf.LevelSet(sphere)
POLE = np.array([0.0, 0.6, 0.8])
START = np.array([0.8, 0.6, 0.0])


def height(x):
    return 3 * jnp.dot(POLE.astype(x.dtype), x)


def descent(start, t):
    """Steepest descent of `height` on the sphere: ⟨POLE, x⟩ = tanh(artanh⟨POLE, x₀⟩ − 3t)."""
    c = jnp.dot(POLE, start)
    side = (start - c * POLE) / jnp.sqrt(1 - c**2)
    c = jnp.tanh(jnp.arctanh(c) - 3 * t)
    return c * POLE + jnp.sqrt(1 - c**2) * side


def descent_flow():
    return mf.RiemannianGradientFlow(SPHERE, height)


# --- the overparametrised linear model -----------------------------------------------------


def squares(point, z):
    return jnp.dot(z, point["u"] ** 2 - point["v"] ** 2)


def prescribed_gram(condition, alpha, num_examples=10, dimension=40, seed=0):
    """The u²−v² model whose Gram matrix at α·1 has log-spaced eigenvalues."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(num_examples, num_examples)))[0]
    right = np.linalg.qr(rng.normal(size=(dimension, num_examples)))[0]
    singular = np.logspace(0, -0.5 * np.log10(condition), num_examples)
    inputs = left * singular @ right.T * np.sqrt(dimension)
    target = np.zeros(dimension)
    target[:3] = [1.0, -1.0, 0.5]
    targets = inputs @ target
    loss = mf.LeastSquares(inputs, targets, predict=squares)
    start = {"u": jnp.full(dimension, alpha), "v": jnp.full(dimension, alpha)}
    w = mf.theory.overparametrized_linear_flow(
        inputs, targets, *(np.full(dimension, alpha),) * 2, time=0.0
    )
    size = np.sqrt(w**2 + 4 * alpha**4)  # u² + v², since u·v keeps its value
    plus, minus = np.maximum(size + w, 0) / 2, np.maximum(size - w, 0) / 2
    big = np.sqrt(np.maximum(plus, minus))
    small = alpha**2 / big
    limit = {"u": np.where(w > 0, big, small), "v": np.where(w > 0, small, big)}
    return loss, start, limit


# --- points and vectors on any manifold ----------------------------------------------------


def moved(point, vector, t=1.0):
    """point + t·vector."""
    return eqx.apply_updates(point, jax.tree.map(lambda v: t * v, vector))


def normal_like(tree, seed):
    """A random vector with the structure of a tree of coordinates."""
    vector, unravel = ravel_pytree(tree)
    return unravel(jr.normal(jr.key(seed), vector.shape, vector.dtype))


def unraveller(manifold, point):
    """vector → point, and the vector of this point."""
    here, remainder = manifold.split(point)
    vector, unravel = ravel_pytree(here)
    return lambda x: eqx.combine(unravel(x), remainder), vector


def constraint_of(manifold, point):
    """The constraint as a function of one vector, and the vector of this point."""
    rebuild, vector = unraveller(manifold, point)
    return lambda x: ravel_pytree(manifold.constraint(rebuild(x)))[0], vector


def array_sizes(jaxpr):
    """The sizes of all arrays that a jaxpr forms, in the bodies inside it too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars if hasattr(var.aval, "size"))
        is_body = lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_body):
            if is_body(inner):
                yield from array_sizes(inner)
