"""Programs stay small: the number of instructions that XLA is asked to compile.

The example is a network of two layers on 60 examples in float32; `with calls` counts what is
called once for each call.
"""

import pathlib
import sys

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from diffrax import _integrate

import manifoldflow as mf
from checks import at_most, equal

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

from _programs import num_instructions, size

MOST = {
    "drift": 600,
    "drift, isotropic noise": 1_500,
    "project": 1_100,
    "limit_map": 2_200,
    "solve": 6_000,
    "minimize": 4_500,
}


@pytest.fixture(autouse=True)
def programs_of_users(monkeypatch):
    """Without what `quick` takes out of them."""
    monkeypatch.setattr(_integrate, "eqxi", eqxi)
    monkeypatch.delattr(_integrate, "range", raising=False)


def problem(layers):
    single = lambda x: x.astype(jnp.float32)
    model = eqx.nn.MLP(64, 10, 128, layers - 1, activation=jnp.tanh, key=jr.key(0))
    model = jax.tree.map(lambda x: single(x) if eqx.is_array(x) else x, model)
    inputs, targets = jr.normal(jr.key(1), (60, 64)), jr.normal(jr.key(2), (60, 10))
    return mf.LeastSquares(single(inputs), single(targets)), model


def solved(loss, **options):
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0, batch_size=1))
    return lambda m: mf.solve(flow, m, end_time=1.0, throw=False, **options)


@pytest.mark.parametrize("name", MOST)
def test_the_hot_functions(name):
    with jax.enable_x64(False):
        loss, model = problem(2)
        manifold = mf.ZeroLossManifold(loss)
        functions = {
            "drift": mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1)).drift,
            "drift, isotropic noise": mf.LimitDiffusion(manifold, mf.IsotropicNoise()).drift,
            "project": lambda m: manifold.project(m, throw=False),
            "limit_map": lambda m: mf.limit_map(loss, m, throw=False),
            "solve": solved(loss),
            "minimize": lambda m: mf.minimize(manifold, loss.trace_gauss_newton, m, throw=False),
        }
        at_most(f"{name}, instructions with calls", size(functions[name], model)[1], MOST[name])


def test_saves_cost_nothing():
    with jax.enable_x64(False):
        loss, model = problem(2)
        few, many = (size(solved(loss, num_saves=saves), model)[1] for saves in (10, 100))
    equal("instructions for 100 saves, for 10", many, few)


def test_layers_add_up():
    with jax.enable_x64(False):
        sizes = [size(solved(loss), model)[1] for loss, model in map(problem, (2, 4, 6))]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    at_most("instructions for layers 5 and 6, for layers 3 and 4", second / first, 1.02)


def test_what_is_counted():
    """A function that is called twice counts twice, and a branch that is not taken counts."""
    called = jax.jit(lambda x: jnp.sin(x) * 2)
    text = jax.jit(lambda x: called(called(x))).lower(1.0).compiler_ir("hlo").as_hlo_text()
    in_text, with_calls = num_instructions(text)
    # Of the function: a parameter, the sine, a constant, the product; beside it a parameter
    # and two calls.
    equal("in the text", in_text, 7)
    equal("with calls", with_calls, 11)
    branched = lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)
    text = jax.jit(branched).lower(1.0).compiler_ir("hlo").as_hlo_text()
    at_most("without branches", 6, num_instructions(text)[1])
