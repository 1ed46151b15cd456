"""A checkpoint is taken over by the same run only; a refusal names what is another."""

import functools
import json

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import equal, refused
from manifoldflow._journal import Identity, program
from manifoldflow._journal._identity import versions
from sgd_runs import LINEAR, short

SPHERE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
START = jnp.array([0.6, 0.0, 0.8])


def height(p):
    return p[2]


def followed(file, fn=height, **options):
    """An ordinary differential equation."""
    flow = mf.RiemannianGradientFlow(SPHERE, fn)
    return mf.solve(
        flow, START, **{"end_time": 0.4, "num_saves": 2, **options}, checkpoint=file
    )  # fmt: skip


def walked(file, std=1.0, **options):
    """A stochastic one."""
    loss = mf.FunctionLoss(lambda p: 0.5 * jnp.sum(p**2))
    flow = mf.SGDDiffusion(loss, mf.IsotropicNoise(std), 0.1)
    options = {"key": jr.key(0), "end_time": 0.1, "step_size": 0.01, **options}
    return mf.solve(flow, START, checkpoint=file, **options)


def test_every_option_of_solve(tmp_path):
    file = tmp_path / "ode"
    observe = {"x": lambda p: p[0]}
    followed(file, observe=observe, until=lambda p: p[0] < -2)
    same = {"observe": {"x": lambda q: q[0]}, "until": lambda q: q[0] < -2}
    equal("the same by other names", int(followed(file, **same).stats["num_steps"]), 0)
    later = followed(file, **same, max_steps=99)
    equal("more steps allowed", int(later.stats["num_steps"]), 0)
    for options, words in (
        ({"rtol": 1e-5}, "another rtol (float64[] 1e-06 in the file, float64[] 1e-05 here)"),
        ({"atol": 1e-7}, "another atol"),
        ({"step_size": 0.1}, "another step size"),
        ({"solver": dfx.Bosh3()}, "another solver (Tsit5 in the file, Bosh3 here)"),
        ({"until": lambda p: p[0] < -3}, "another until"),
        ({"until": None}, "another until"),
        ({"until": mf.Stationary(1e-9)}, "another until"),
        ({"observe": {"x": lambda p: p[1]}}, "another observable 'x'"),
        ({"observe": {"y": lambda p: p[0]}}, "other observables, [\"observed['x']\"]"),
        ({"fn": lambda p: 1.001 * p[2]}, "another flow"),
        ({"end_time": 0.5}, "other save times"),
    ):
        with refused(ValueError, words, "Delete it, or give this solve another file."):
            followed(file, **{**same, **options})


def test_every_option_of_a_stochastic_solve(tmp_path):
    file = tmp_path / "sde"
    walked(file)
    for options, words in (
        ({"key": jr.key(1)}, "another key"),
        ({"std": 1.1}, "another flow.noise.std"),
        ({"step_size": 0.02}, "another step size (10 steps from save to save in the file, 5"),
        ({"solver": dfx.Euler()}, "another solver"),
    ):
        with refused(ValueError, words):
            walked(file, **options)


class Scaled(eqx.Module):
    """A prediction with numbers of its own, one of them static."""

    factor: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, x, z):
        return self.factor * jnp.dot(x, z) ** self.power


def linear(index=None, change=0.0, factor=1.0, power=1):
    targets = LINEAR.targets if index is None else LINEAR.targets.at[index].add(change)
    return mf.LeastSquares(LINEAR.inputs, targets, predict=Scaled(jnp.asarray(factor), power))


def test_every_option_of_simulate(tmp_path):
    file = tmp_path / "run"
    adam = lambda rate: optax.adam(rate, b1=0.9, b2=0.99)
    own = {
        "optimizer": adam, "loss": linear(), "noise": mf.LabelNoise(0.5, batch_size=1),
        "num_steps": 2, "observe": {"x": lambda p: p[0]}, "learning_rate": 0.01,
    }  # fmt: skip
    short(checkpoint=file, **own)
    short(resume=file, **own)
    for options, words in (
        ({"key": jr.key(1)}, "another key"),
        ({"noise": mf.LabelNoise(0.5 + 1e-12, batch_size=1)}, "another noise.std"),
        ({"noise": mf.LabelNoise(0.5, batch_size=2)}, "another noise.batch_size (1 in"),
        ({"noise": mf.IsotropicNoise(0.5)}, "another noise (LabelNoise in the file, Isotropic"),
        ({"learning_rate": 0.01 + 1e-12}, "another learning rate"),
        ({"learning_rate": lambda step: 0.01 * (step < 9)}, "another learning rate"),
        ({"momentum": 0.1}, "another momentum (0.0 in the file, 0.1 here)"),
        ({"optimizer": lambda rate: optax.adam(rate, b1=0.8, b2=0.99)}, "another optimizer"),
        ({"optimizer": lambda rate: optax.adam(rate, b1=0.9, b2=0.999)}, "another optimizer"),
        ({"optimizer": lambda rate: optax.adam(rate, b2=0.99, eps=1e-7)}, "another optimizer"),
        ({"optimizer": functools.partial(optax.adam, b2=0.98)}, "another optimizer"),
        ({"observe": {"x": lambda p: p[1]}}, "another observable 'x'"),
        ({"point": jnp.ones(3).at[2].add(1e-15)}, "another start"),
        *(({"loss": linear(i, 1e-12)}, "another loss.targets") for i in range(3)),
        ({"loss": linear(factor=1.1)}, "another loss.predict.factor"),
        ({"loss": linear(power=2)}, "another loss.predict.power (1 in the file, 2 here)"),
        ({"loss": mf.LeastSquares(LINEAR.inputs, LINEAR.targets, predict=jnp.dot)}, "another loss"),
    ):
        with refused(ValueError, words, "Delete it, or give this run another file."):
            short(resume=file, **{**own, **options})


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.inject_hyperparams(optax.sgd)])
def test_momentum_of_the_optimizer(tmp_path, optimizer):
    heavy = lambda momentum: lambda rate: optimizer(rate, momentum=momentum)
    short(heavy(0.5), checkpoint=tmp_path / "run", num_steps=2)
    with refused(ValueError, "optimizer"):
        short(heavy(0.9), resume=tmp_path / "run", num_steps=2)


def test_other_versions_are_named():
    there = json.loads(json.dumps(Identity({}, {}, {}).as_dict()))
    equal("the same", Identity({}, {}, {}).other_versions(there), None)
    there["versions"]["jax"] = "0.1"
    said = Identity({}, {}, {}).other_versions(there)
    equal("another", said, f"jax 0.1, not {versions()['jax']}")


TABLE = np.arange(3.0)


def closed(value):
    return lambda p: value * p


def with_callback(text):
    shape = jax.ShapeDtypeStruct((), jnp.float64)
    return lambda p: jax.pure_callback(lambda x: x + len(text), shape, p[0])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (lambda p: p + 1, lambda other_name: other_name + 1, lambda p: p + 2),
        (lambda p: p * TABLE, lambda p: p * np.arange(3.0), lambda p: p * (TABLE + 1e-16)),
        (closed(jnp.ones(3)), closed(jnp.ones(3)), closed(jnp.ones(3).at[1].set(2))),
        (jax.nn.relu, lambda p: jax.nn.relu(p), jax.nn.gelu),
        (lambda p: {"a": p}, lambda p: {"a": p}, lambda p: {"b": p}),
        (lambda p: (p, 1), lambda p: (p, 1), lambda p: (p, 2)),
        (with_callback("a"), with_callback("a"), with_callback("ab")),
        (
            lambda p: jax.lax.fori_loop(0, 3, lambda i, x: x * p, p),
            lambda p: jax.lax.fori_loop(0, 3, lambda j, y: y * p, p),
            lambda p: jax.lax.fori_loop(0, 3, lambda i, x: x * x, p),
        ),
    ],
)
def test_functions_are_what_they_do(one, same, other):
    digest = program(one, START)
    equal("again", program(one, START), digest)
    equal("the same function", program(same, START), digest)
    assert program(other, START) != digest, "another function has the same digest"
