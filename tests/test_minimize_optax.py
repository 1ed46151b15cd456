"""Optax transforms along a manifold: their steps by hand, and what of their state is turned."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifoldflow as mf
import zoo
from checks import close, equal
from manifoldflow.optimize import Iterate, minimize, Problem, RiemannianOptax

heavy_ball = optax.sgd(0.05, momentum=0.8)


def cubic(x):
    return x @ jnp.diag(jnp.array([1.0, -2.0, 0.5])) @ x + jnp.sum(x**3)


def test_momentum_by_hand():
    point, momentum = zoo.SPHERE.project(zoo.START), jnp.zeros(3)
    for _ in range(5):
        momentum = mf.riemannian_gradient(zoo.SPHERE, cubic, point) + 0.8 * momentum
        point = zoo.SPHERE.retract(point, -0.05 * momentum)
        momentum = zoo.SPHERE.tangent_projection(point, momentum)
    walk = minimize(
        zoo.SPHERE, cubic, zoo.START, method=RiemannianOptax(heavy_ball), max_steps=5, throw=False
    )
    close("five steps", walk.point(-1), point, 1e-13)


def _masked():
    momentum = optax.masked(optax.trace(0.5), {"u": True, "v": False})
    return optax.chain(momentum, optax.scale(-0.1))


BALL = mf.LevelSet(lambda p: jnp.sum(p["u"] ** 2) + jnp.sum(p["v"] ** 2) - 1)
ON_BALL = {"u": jnp.full(3, 0.5), "v": jnp.full(2, np.sqrt(0.125))}


def mixed(p):
    return p["u"] @ jnp.array([1.0, 2.0, -1.0]) + jnp.sum(p["v"] ** 4)


@pytest.mark.parametrize(
    "optimizer, is_vector",
    [
        (heavy_ball, [True]),
        (optax.adam(0.1), [True, False]),
        (optax.rmsprop(0.1), [False]),
        (optax.lion(0.1), [True]),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.1)), [True, False]),
        (_masked(), [False]),
        (optax.polyak_sgd(), []),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), [True]),
    ],
)
def test_only_vectors_are_projected(optimizer, is_vector):
    problem, method = Problem(BALL, mixed, None), RiemannianOptax(optimizer)
    gradient = {"u": jnp.array([0.3, -0.1, 0.2]), "v": jnp.array([0.5, 0.1])}
    space = BALL.normal_space(ON_BALL)
    state = method.init(problem, Iterate(ON_BALL, jnp.asarray(1.0), gradient, gradient, space))
    equal("vectors", [bool(flag) for flag in state.is_vector], is_vector)


def test_masked_momentum():
    """Of some leaves only, it is no tangent vector of the whole, and left as it is."""
    solution = minimize(BALL, mixed, ON_BALL, method=RiemannianOptax(_masked()))
    close("minimum", mixed(solution.final), -np.sqrt(6), 1e-12)
