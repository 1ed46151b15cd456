"""Networks with kinks: where gradient flow is held by one, `limit_map` soon says so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most, equal, refused


def problem(activation):
    inputs = jr.normal(jr.key(1), (20, 4))
    targets = jnp.sin(inputs.sum(axis=1, keepdims=True))
    network = eqx.nn.MLP(4, 1, 32, 2, activation=activation, key=jr.key(0))
    return mf.LeastSquares(inputs, targets), network


def test_a_network_that_is_held_by_a_kink_says_so_early():
    loss, network = problem(jax.nn.relu)
    with refused(eqx.EquinoxRuntimeError, "The loss is not smooth here; use `manifold.project`"):
        mf.limit_map(loss, network)
    _, info = mf.limit_map_with_info(loss, network)
    equal("not smooth", bool(info.result == mf.RESULTS.not_smooth), True)
    at_most("steps", info.num_steps, 200)


def test_what_it_says_instead_works():
    loss, network = problem(jax.nn.relu)
    landed = mf.ZeroLossManifold(loss).project(network)
    at_most("loss", loss(landed), 1e-20)
    loss, network = problem(jax.nn.softplus)
    at_most("loss", loss(mf.limit_map(loss, network)), 1e-20)


@pytest.mark.quick
def test_kinks_that_are_crossed_hold_nothing_up():
    """Forty of them, straight across; between two the flow gets up to speed."""
    slopes = 1 + 0.5 * (jnp.arange(41) % 2)
    edges = jnp.arange(41) * 0.25

    def height(x):
        return jnp.sum(jnp.diff(slopes, prepend=0.0) * jax.nn.relu(x - edges))

    loss = mf.FunctionLoss(lambda x: 0.5 * (height(x[0]) + x[0] * (x[0] < 0) - 0.1) ** 2)
    found, info = mf.limit_map_with_info(loss, jnp.array([9.9]), max_steps=2000)
    equal("found", bool(info.is_successful), True)
    at_most("where", abs(float(found[0]) - 0.1), 1e-6)
