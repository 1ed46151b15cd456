"""Outputs on old data are held while a model learns new data: to a bound, in third order."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import manifoldflow as mf
from checks import at_least, at_most, close, distance, equal, flat, in_window, norm, refused, slope

OLD, NEW = jr.normal(jr.key(1), (4, 2)), jr.normal(jr.key(2), (3, 2))
NUMBERS = jr.normal(jr.key(3), (3,))
MODEL = {"in": jr.normal(jr.key(4), (32, 2)), "out": jr.normal(jr.key(5), (32,)) / 4}


def predict(w, x):
    return w["out"] @ jnp.tanh(w["in"] @ x)


MANIFOLD = mf.OutputManifold(predict, OLD, like=MODEL)
LOSS = mf.LeastSquares(NEW, NUMBERS, predict=predict)


def outputs(model):
    return jax.vmap(lambda x: predict(model, x))(OLD)


def trained(optimizer, num_steps, start=MODEL):
    def step(carry, _):
        model, state = carry
        updates, state = optimizer.update(LOSS.gradient(model), state, model)
        model = optax.apply_updates(model, updates)
        return (model, state), jnp.max(jnp.abs(outputs(model) - outputs(MODEL)))

    @jax.jit
    def run(model):
        return jax.lax.scan(step, (model, optimizer.init(model)), None, length=num_steps)

    (model, state), changes = run(start)
    return model, state, changes


def test_old_outputs_stay_while_new_ones_are_learned():
    held, state, changes = trained(mf.walks.hold_outputs(optax.adam(0.02), MANIFOLD, MODEL), 400)
    plain, _, moved = trained(optax.adam(0.02), 400)
    at_most("new loss", LOSS(held), 1e-3 * LOSS(MODEL))
    at_most("change of old outputs", jnp.max(changes), 1e-4)
    at_least("without", moved[-1], 0.1)
    close("the certificate, last", state.change, changes[-1], 1e-6, scale=1)
    close("the certificate, worst", state.worst, jnp.max(changes), 1e-12, scale=1)
    equal("steps", int(state.num_steps), 400)
    at_least("distance of both ways", distance(held, plain), 0.1)


def test_one_step_leaves_a_change_of_third_order():
    """Its tangent part is of first order, Newton's step leaves the second times the first."""
    lengths, left, straight = [0.1, 0.05, 0.025], [], []
    for length in lengths:
        optimizer = mf.walks.hold_outputs(optax.sgd(length), MANIFOLD, MODEL, max_change=1.0)
        step, state = optimizer.update(LOSS.gradient(MODEL), optimizer.init(MODEL), MODEL)
        left.append(state.change)
        along = MANIFOLD.tangent_projection(MODEL, step)
        close("tangent part", along, tangent_step(length), 1e-9)
        straight.append(norm(outputs(optax.apply_updates(MODEL, along)) - outputs(MODEL)))
    in_window("order of what is left", slope(lengths, left), 2.7, 3.3)
    in_window("order without the Newton step", slope(lengths, straight), 1.8, 2.2)


def tangent_step(length):
    projected = MANIFOLD.tangent_projection(MODEL, LOSS.gradient(MODEL))
    return jax.tree.map(lambda leaf: -length * leaf, projected)


def test_the_optimiser_gets_the_projected_gradient():
    """Else its step, projected, may climb: of signs that ascend where gradients may not go."""
    optimizer = mf.walks.hold_outputs(optax.scale_by_sign(), MANIFOLD, MODEL, max_change=10.0)
    gradient = LOSS.gradient(MODEL)
    step, _ = optimizer.update(gradient, optimizer.init(MODEL), MODEL)
    signs = jax.tree.map(jnp.sign, MANIFOLD.tangent_projection(MODEL, gradient))
    along = MANIFOLD.tangent_projection(MODEL, step)
    close("step", along, MANIFOLD.tangent_projection(MODEL, signs), 1e-9)
    at_least("slope", flat(gradient) @ flat(along), 1e-3)


def test_long_steps_are_shortened_and_drift_is_taken_back():
    optimizer = mf.walks.hold_outputs(optax.sgd(3.0), MANIFOLD, MODEL, max_change=1e-4)
    _, state, changes = trained(optimizer, 5)
    at_most("change", jnp.max(changes), 1e-4)
    at_least("steps shortened", state.num_shortened, 1)
    off = jax.tree.map(lambda leaf: leaf + 0.01, MODEL)
    _, state, changes = trained(mf.walks.hold_outputs(optax.sgd(0.0), MANIFOLD, MODEL), 3, off)
    at_least("off at the start", state.worst, 1e-2)
    at_most("after three steps", changes[-1], 1e-9)


def test_it_runs_in_simulate_and_holds_modules():
    model = eqx.nn.MLP(2, "scalar", 32, 1, activation=jnp.tanh, key=jr.key(0))
    old = mf.OutputManifold(None, OLD, like=model)
    loss = mf.LeastSquares(NEW, NUMBERS)
    run = mf.simulate(
        loss, mf.MinibatchNoise(3), lambda rate: mf.walks.hold_outputs(optax.sgd(rate), old, model),
        model, learning_rate=0.1, num_steps=20, key=jr.key(0),
    )  # fmt: skip
    at_most("loss", loss(run.final) / loss(model), 0.9)
    at_most("change", jnp.max(jnp.abs(old.constraint(run.final))), 1e-6)


def test_bad_input():
    with refused(ValueError, "max_change", "positive"):
        mf.walks.hold_outputs(optax.sgd(0.1), MANIFOLD, MODEL, max_change=0.0)
    optimizer = mf.walks.hold_outputs(optax.sgd(0.1), MANIFOLD, MODEL)
    with refused(ValueError, "needs the parameters"):
        optimizer.update(MODEL, optimizer.init(MODEL))
    with refused(ValueError, "gradient", "structure"):
        optimizer.update(MODEL["in"], optimizer.init(MODEL), MODEL)
