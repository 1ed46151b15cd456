"""Optimisers as values, and clocks: what they are, and what they do to the limit."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from manifoldflow import updates
from quick import long_jit

key_of = functools.partial(jr.key, impl="unsafe_rbg")  # draws in a third of the time
CLOCKS = {
    "limit": (mf.LimitClock(), 2, 1.0),
    "limit, momentum": (mf.LimitClock(0.5), 2, 4.0),
    "gradient": (mf.GradientClock(), 1, 1.0),
    "gradient, momentum": (mf.GradientClock(0.9), 1, 10.0),
    "sam": (mf.SAMClock(0.1), 1, 0.01),
    "decay": (mf.DecayClock(1e-3), 1, 1e-3),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CLOCKS)
def test_times_and_back(name):
    clock, power, gain = CLOCKS[name]
    assert isinstance(clock, mf.AbstractClock)
    equal("power", clock.power, power)
    close("times", clock.times(0.2, 5), gain * 0.2**power * np.arange(6), 1e-12)
    schedule = optax.linear_schedule(0.2, 0.1, 10)
    rates = np.asarray([float(schedule(k)) for k in range(10)])
    expected = gain * np.concatenate([[0], np.cumsum(rates**power)])
    close("a schedule", clock.times(schedule, 10), expected, 1e-6)
    end = float(expected[7])
    equal("steps", clock.num_steps(schedule, end), 7)
    assert clock.formula.startswith("Ση")


class HalfClock(mf.AbstractClock):
    """Half of the gradient flow's: a clock of one's own."""

    power = 1
    gain = 0.5
    formula = "½Ση"


def test_a_new_clock_is_one_value():
    close("times", HalfClock().times(0.2, 3), [0, 0.1, 0.2, 0.3], 1e-12)
    equal("steps", HalfClock().num_steps(0.2, 1.0), 10)


@pytest.mark.quick
def test_bad_clocks():
    for wrong in (-0.1, 1.0, "a"):
        with refused(ValueError, "momentum must be a number in [0, 1)"):
            mf.LimitClock(wrong)
        with refused(ValueError, "momentum must be a number in [0, 1)"):
            updates.SGD(momentum=wrong)
    with refused(ValueError, "SAMClock: radius must be positive"):
        mf.SAMClock(0.0)
    with refused(ValueError, "weight_decay must be finite and not negative"):
        updates.SGD(weight_decay=-1.0)
    with refused(ValueError, "max_steps"):
        mf.DecayClock(1e-6).num_steps(0.1, 1.0, max_steps=10)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_is_optax_with_decoupled_decay(momentum):
    """By hand: m ← βm + g, θ ← θ − η·m − η²wθ."""
    update = updates.SGD(momentum, weight_decay=0.7)
    assert isinstance(update, updates.AbstractUpdate)
    schedule = optax.linear_schedule(0.3, 0.1, 4)
    for rate in (0.2, schedule):
        transform, theta = update.transform(rate), jnp.array([1.0, -2.0])
        state, by_hand, m = transform.init(theta), np.array([1.0, -2.0]), np.zeros(2)
        for k in range(4):
            g = jnp.sin(theta)
            step, state = transform.update(g, state, theta)
            eta = 0.2 if rate == 0.2 else float(schedule(k))
            m = momentum * m + np.sin(by_hand)
            by_hand = by_hand - eta * m - eta**2 * 0.7 * by_hand
            theta = optax.apply_updates(theta, step)
        close("θ", theta, by_hand, 1e-6)
    assert updates.SGD().weight_decay is None
    assert updates.SGD().slow_drift(jnp.ones(2)) is None


def product(p, x):
    return p[0] * p[1] * x


LOSS = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=product, scale=1.0)
GAMMA = mf.ZeroLossManifold(LOSS)
POINT = jnp.array([2.0, 0.5, 0.3])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("noise", [mf.LabelNoise(0.5), mf.IsotropicNoise(0.5)], ids=["ode", "sde"])
def test_decay_adds_its_tangent_part(noise, momentum):
    plain = mf.LimitDiffusion(GAMMA, noise)
    flow = mf.LimitDiffusion(GAMMA, noise, updates.SGD(momentum, weight_decay=0.3))
    expected = -0.3 * (1 - momentum) ** 2 * GAMMA.tangent_projection(POINT, POINT)
    close("added", flow.drift(POINT) - plain.drift(POINT), expected, 1e-12)
    close("alone", flow.slow_drift(POINT), expected, 1e-12)
    at_most("none", jnp.max(jnp.abs(plain.slow_drift(POINT))), 0.0)
    assert flow.is_stochastic == plain.is_stochastic
    close("gain", flow.clock.gain, (1 - momentum) ** -2, 1e-12)


def test_the_limit_of_sgd_with_decay():
    """Simulated from the flow's start, at two step sizes; the bias of η falls with it."""
    noise, update = mf.LabelNoise(1.0), updates.SGD(weight_decay=0.5)
    flow = mf.LimitDiffusion(GAMMA, noise, update)
    end = mf.solve(flow, POINT, end_time=1.0).final
    errors = []

    def run(key, rate, steps):
        transform = update.transform(rate)

        def step(k, carry):
            theta, state = carry
            gradient = noise.gradient(LOSS, theta, jr.fold_in(key, k))
            change, state = transform.update(gradient, state, theta)
            return optax.apply_updates(theta, change), state

        return jax.lax.fori_loop(0, steps, step, (POINT, transform.init(POINT)))[0]

    many, keys = long_jit(jax.vmap(run, (0, None, None))), jr.split(key_of(0), 2000)
    for rate in (0.05, 0.025):
        ends = many(keys, rate, update.clock.num_steps(rate, 1.0))
        mean, error = jnp.mean(ends, 0), jnp.std(ends, 0) / 2000**0.5
        errors.append((mean - end, error))
    extrapolated = 2 * errors[1][0] - errors[0][0]
    bound = 4 * jnp.sqrt(4 * errors[1][1] ** 2 + errors[0][1] ** 2) + 2e-3
    assert bool(jnp.all(jnp.abs(extrapolated) <= bound)), (extrapolated, bound)
    plain = mf.solve(mf.LimitDiffusion(GAMMA, noise), POINT, end_time=1.0).final
    assert float(jnp.linalg.norm(plain - end)) > 10 * float(jnp.max(bound)), "decay is seen"


RUN = {"learning_rate": 0.05, "end_time": 0.5, "key": jr.key(1)}


def test_simulate_runs_an_update_on_its_clock():
    """As the bare transform does; the solution says which clock, as the flow's does."""
    noise = mf.LabelNoise(0.3)
    bare = mf.simulate(LOSS, noise, optax.sgd, POINT, **RUN)
    same = mf.simulate(LOSS, noise, updates.SGD(), POINT, **RUN)
    close("θ", same.final, bare.final, 1e-12)
    close("times", same.times, bare.times, 1e-12)
    assert same.clock == bare.clock == "Ση²/(1−β)²"
    flow = mf.LimitDiffusion(GAMMA, noise, updates.SGD(weight_decay=0.5))
    walk = mf.solve(flow, POINT, end_time=0.5)
    assert walk.clock == same.clock
    heavy = mf.simulate(LOSS, noise, updates.SGD(0.9), POINT, **RUN)
    by_hand = mf.simulate(
        LOSS, noise, lambda rate: optax.sgd(rate, 0.9), POINT, **RUN, momentum=0.9
    )
    close("with momentum", heavy.final, by_hand.final, 1e-12)
    equal("steps", int(heavy.stats["num_steps"]), int(by_hand.stats["num_steps"]))
    decayed = mf.simulate(LOSS, noise, updates.SGD(weight_decay=0.5), POINT, **RUN)
    assert float(jnp.linalg.norm(decayed.final)) < float(jnp.linalg.norm(same.final))


def test_clocks_that_differ_are_not_compared():
    descent = mf.solve(mf.GradientFlow(LOSS), POINT + 0.1, end_time=1.0)
    noise, run = mf.LabelNoise(0.3), RUN | {"num_saves": 2}
    flow = mf.LimitDiffusion(GAMMA, noise)
    walk = mf.solve(flow, POINT, end_time=0.5, num_saves=2)
    assert descent.clock == "Ση/(1−β)"
    with refused(ValueError, "compares runs on one clock; got those on Ση"):
        mf.ensembles.weak_error(descent, walk)
    sgd = lambda key: mf.simulate(LOSS, noise, updates.SGD(), POINT, **run | {"key": key})
    many = jax.vmap(sgd)(jr.split(jr.key(0), 200))
    error = mf.ensembles.weak_error(many, walk)
    assert error.error.shape == (3, 3)
    at_most("in standard errors", jnp.max(jnp.abs(error.error) - 5 * error.standard_error), 0.02)
    with refused(ValueError, "saves at the same times"):
        mf.ensembles.weak_error(many, mf.solve(flow, POINT, end_time=1.0, num_saves=2))
    along = mf.solve(mf.RiemannianGradientFlow(GAMMA, jnp.sum), POINT, end_time=0.5)
    assert along.clock is None


def decaying(rate):
    return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(rate))


def clipping(rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))


def signs_of_a_mean(rate):
    return optax.chain(optax.scale_by_lion(), optax.scale_by_learning_rate(rate))


@pytest.mark.parametrize("optimizer", [decaying, clipping, signs_of_a_mean])
def test_bare_transforms_that_are_not_sgd_have_no_clock(optimizer):
    words = "updates.SGD" if optimizer is decaying else "clipping shortens"
    with refused(ValueError, words, "num_steps", "IterationLimit"):
        mf.simulate(LOSS, mf.LabelNoise(0.3), optimizer, POINT, **RUN)
    steps = {k: v for k, v in RUN.items() if k != "end_time"} | {"num_steps": 3}
    mf.simulate(LOSS, mf.LabelNoise(0.3), optimizer, POINT, **steps)


def test_momentum_belongs_to_the_update():
    with refused(ValueError, "momentum only beside a bare Optax optimizer"):
        mf.simulate(LOSS, mf.LabelNoise(0.3), updates.SGD(0.9), POINT, **RUN, momentum=0.9)


def test_the_clock_of_every_flow():
    square = lambda p: jnp.sum(p**2)
    symmetric = mf.symmetry.ExponentialSymmetry(jnp.array([1.0, -1.0, 0.0]))
    flows = (
        (mf.GradientFlow(LOSS), "Ση/(1−β)"),
        (mf.NoetherFlow(symmetric, product, jnp.ones(2), noise_scale=0.1), "Ση/(1−β)"),
        (mf.SGDDiffusion(LOSS, mf.LabelNoise(0.3), 0.1), "Ση²/(1−β)²"),
        (mf.LimitDiffusion(GAMMA, mf.LabelNoise(0.3)), "Ση²/(1−β)²"),
        (mf.IterationLimit(jax.grad(square), lambda p: jnp.eye(3)), "Ση²/(1−β)²"),
        (mf.WeightDecayFlow(GAMMA), "Σηλ"),
        (mf.LimitDiffusion(GAMMA, mf.MinibatchNoise(1), updates.SAM(0.1)), "Σηρ²"),
    )
    for flow, formula in flows:
        equal(type(flow).__name__, flow.clock.formula, formula)
