"""Gradient descent with weight decay λ follows Y' = −PY on the clock kηλ, as λ → 0.

To first order in λ the iterates are θ = y − λH†y with y = Φ(θ) and, since ∂Φ∇L = 0 everywhere,
y' = −∂Φ(θ)θ = −Py + λ∂²Φ[H†y, y] in time kηλ. The problem is addition modulo p.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, norm, refused
from quick import long_jit

SMALL = mf.models.ModularAddition(5, 16)
TIME = 0.5


def half_square(point):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(point)) / 2


@long_jit
def descend(point, rate, decay, num_steps):
    """Plain gradient descent on the loss with λ|θ|²/2."""

    def step(_, x):
        return jax.tree.map(lambda a, g: a - rate * (g + decay * a), x, jax.grad(SMALL.loss)(x))

    return jax.lax.fori_loop(0, num_steps, step, point)


@functools.cache
def landing():
    """Where gradient descent lands, which is not Φ of its start, with the curvature there."""
    point = descend(SMALL.initial(jr.key(0)), 1.0, 0.0, 40_000)
    at_most("loss", SMALL.loss(point), 1e-26)
    return point


@functools.cache
def predicted():
    """½|θ|² at TIME and its derivative by λ at λ = 0, by RK4 and dense matrices."""
    loss = SMALL.loss
    start, unravel = jax.flatten_util.ravel_pytree(landing())
    residual = lambda x: loss.residual(unravel(x))

    def spaces(x):
        """J, and J† of full rank."""
        jacobian = jax.jacfwd(residual)(x)
        return jacobian, jacobian.T @ jnp.linalg.inv(jacobian @ jacobian.T)

    def velocity(x):
        jacobian, inverse = spaces(x)
        return -(x - inverse @ (jacobian @ x))

    def lift(x):
        """H†x."""
        _, inverse = spaces(x)
        return inverse @ (inverse.T @ x) / loss.scale

    def bend(x):
        """∂²Φ[H†x, x], from the second differences ∂²Φ[v, v] along H†x ± x."""
        covariance = lambda v: mf.limit_map_second_derivative(
            SMALL.manifold, unravel(x), jax.tree.map(lambda leaf: leaf[..., None], unravel(v))
        )
        # A length of its own, so that the difference of the two loses no digits.
        lifted = lift(x)
        size = jnp.linalg.norm(lifted) / jnp.linalg.norm(x)
        both = jax.lax.map(lambda sign: covariance(lifted / size + sign * x), jnp.array([1.0, -1]))
        difference = jax.tree.map(lambda a: (a[0] - a[1]) * size / 4, both)
        return jax.flatten_util.ravel_pytree(difference)[0]

    def right(state):
        x, first = state
        value, change = jax.jvp(velocity, (x,), (first,))
        return jnp.stack([value, change + bend(x)])

    def step(state, _):
        h = TIME / 60

        # In a loop, so that the program has the right side once.
        def stage(carry, ahead_and_weight):
            slope, total = carry
            ahead, weight = ahead_and_weight
            slope = right(state + h * ahead * slope)
            return (slope, total + h / 6 * weight * slope), None

        stages = jnp.array([0, 0.5, 0.5, 1]), jnp.array([1.0, 2, 2, 1])
        return jax.lax.scan(stage, (jnp.zeros_like(state), state), stages)[0][1], None

    @jax.jit
    def integrate(x):
        (x, first), _ = jax.lax.scan(step, jnp.stack([x, 0 * x]), None, length=60)
        return jnp.dot(x, x) / 2, jnp.dot(x, first) - jnp.dot(x, lift(x)), jnp.dot(x, lift(x))

    return tuple(map(float, integrate(start)))


def slope_of_descent(rate, decays):
    """d(½|θ|²)/dλ at TIME on the clock kηλ, by three λ: quotients are slope + O(λ)."""
    expected = predicted()[0]
    counts = np.rint(TIME / (rate * decays)).astype(int)
    ends = [descend(landing(), rate, decay, count) for decay, count in zip(decays, counts)]
    errors = np.array([float(half_square(end)) - expected for end in ends])
    at_most("½|θ|² at the smallest λ, less that of the flow", abs(errors[0]), 1e-2)
    return np.polynomial.polynomial.polyfit(decays, errors / decays, 2)[0]


def test_descent_with_decay_meets_the_flow():
    expected, slope, lifted = predicted()
    walk = mf.solve(mf.WeightDecayFlow(SMALL.manifold), landing(), end_time=TIME, rtol=1e-9)
    close("½|Y|²", half_square(walk.final), expected, 1e-8)
    decays = 1e-5 * np.array([1.0, 2.0, 4.0])
    gram = mf.linalg.DenseGram()(SMALL.loss.jacobian(landing()))
    least = float(SMALL.loss.scale * gram.eigenvalues()[0])
    at_most("the largest λ in units of the smallest eigenvalue", decays[-1] / least, 0.02)
    found = {rate: slope_of_descent(rate, decays) for rate in (0.25, 1.0)}
    for rate, value in found.items():
        close(f"slope {value:.3f} at η = {rate}, predicted {slope:.3f}", value, slope, 0.01)
    # What is left is the step ηλ of Euler's method on this clock.
    value = (4 * found[0.25] - found[1.0]) / 3
    close(f"slope {value:.4f} at η → 0, predicted {slope:.4f}", value, slope, 1e-4)
    at_least("and −YᵀH†Y alone is rejected", abs(value + lifted) / lifted, 1e-3)


def test_the_flow_is_the_steepest_descent_of_the_norm():
    point, manifold = landing(), SMALL.manifold
    found = mf.WeightDecayFlow(manifold).drift(point)
    close("−PY", found, mf.RiemannianGradientFlow(manifold, half_square).drift(point), 1e-11)
    normal = manifold.normal_projection(point, point)
    close("−Y + P⊥Y", found, jax.tree.map(lambda n, y: n - y, normal, point), 1e-11)


def test_frozen_leaves_do_not_decay():
    model = mf.models.ModularAddition(5, 30)
    inputs, targets, predict = model.loss.inputs, model.loss.targets, model.loss.predict
    part = mf.LeastSquares(inputs, targets, predict=predict, trainable={"W": False, "V": True})
    flow = mf.WeightDecayFlow(mf.ZeroLossManifold(part))
    point = flow.manifold.project(model.initial(jr.key(0)))
    found = flow.drift(point)
    equal("the frozen part", found["W"], None)
    features = (point["W"] @ inputs.T) ** 2  # f = V features
    kept = features @ np.linalg.pinv(features)
    close("−VP", found["V"], -point["V"] @ (np.eye(30) - kept), 1e-8, scale=norm(point["V"]))
    walk = mf.solve(flow, point, end_time=0.1)
    equal("W after a solve", bool(jnp.all(walk.final["W"] == point["W"])), True)
    at_least("motion of V", norm(walk.final["V"] - point["V"]), 1e-3)


# --- addition modulo 11 --------------------------------------------------------------------


def balance(point):
    """|W|² − 2|V|², the charge of W → tW, V → V/t²."""
    return jnp.sum(point["W"] ** 2) - 2 * jnp.sum(point["V"] ** 2)


# In two groups: with fewer cases one of each is tried.
@pytest.mark.parametrize(("group", "seed"), [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)])
def test_weight_decay_alone_groks_modular_addition(group, seed):
    """For every one of five choices of the pairs and of the first weights."""
    model = mf.models.ModularAddition(seed=seed)
    start = mf.limit_map(model.loss, model.initial(jr.key(seed)), rtol=1e-4)
    equal("training accuracy at the start", float(model.train_accuracy(start)), 1.0)
    at_most(f"test accuracy at the start, seed {seed}", model.test_accuracy(start), 0.1)
    walk = mf.solve(
        mf.WeightDecayFlow(model.manifold), start, end_time=6.0, num_saves=3, rtol=1e-3, atol=1e-5,
        observe={"test": model.test_accuracy, "charge": balance},
    )  # fmt: skip
    at_least(f"test accuracy at time 6, seed {seed}", walk.observables["test"][-1], 0.99)
    equal("training accuracy at the end", float(model.train_accuracy(walk.final)), 1.0)
    at_most("loss at the end", model.loss(walk.final), 1e-20)
    # Aθ is tangent for a symmetry A, so that Q = θᵀAθ has Q' = −2⟨PY, AY⟩ = −2Q.
    ratio = walk.observables["charge"][2] / walk.observables["charge"][0]
    close("the charge decays as e^(−2t), at time 4", ratio, np.exp(-8.0), 0.05)


def test_the_modular_problem():
    model = mf.models.ModularAddition(7, 8, 0.6, seed=3)
    pairs = np.concatenate([model.train, model.test])
    equal("every pair once", len(np.unique(pairs, axis=0)), 49)
    equal("training pairs", len(model.train), int(0.6 * 49))
    equal("residuals", model.loss.num_residuals, 29 * 7)
    again, other = (mf.models.ModularAddition(7, 8, 0.6, seed=seed) for seed in (3, 4))
    equal("the same seed", bool(jnp.all(again.train == model.train)), True)
    equal("another seed", bool(jnp.all(other.train == model.train)), False)
    point = model.initial(jr.key(1))
    (a, b), v, w = model.train[4], point["V"], point["W"]
    by_hand = v @ (w[:, a] + w[:, 7 + b]) ** 2
    target = jnp.arange(7) == (a + b) % 7
    close("residuals of a pair", model.loss.residual(point)[28:35], by_hand - target, 1e-12)
    sums = (model.test[:, 0] + model.test[:, 1]) % 7
    scores = jnp.stack([v @ (w[:, i] + w[:, 7 + j]) ** 2 for i, j in model.test])
    share = np.mean(np.argmax(np.asarray(scores), axis=1) == np.asarray(sums))
    close("test accuracy", model.test_accuracy(point), share, 1e-12, scale=1)
    spread = mf.models.ModularAddition(7, 4000).initial(jr.key(2), scale=0.5)
    close("std of W", jnp.std(spread["W"]), 0.5 / np.sqrt(2), 0.02)
    close("std of V", jnp.std(spread["V"]), 0.5 / np.sqrt(4000), 0.02)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((1,), "modulus"),
        ((5, 0), "width"),
        ((5, 4, 1.0), "train_fraction"),
        ((5, 4, 0.0), "train_fraction"),
    ],
)
def test_modular_addition_refuses(arguments, words):
    with refused(ValueError, words):
        mf.models.ModularAddition(*arguments)
