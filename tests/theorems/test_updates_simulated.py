"""Plain scans of the updates' own transforms end where `LimitDiffusion` of the update does.

Two residuals r = (xy − 1, yz + ½) in three weights, label noise; runs at η and η/2 are extrapolated
to η → 0, and what is left of the bias is O(η²), or O(η^{3/2}) where steps have one length.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, norm, refused
from manifoldflow import updates
from quick import long_jit

SEEDS, TIME, STD = 1000, 0.3, 0.5
key_of = functools.partial(jr.key, impl="unsafe_rbg")  # draws in a third of the time
MODES = jnp.eye(2)


def chain(p, mode):
    return mode[0] * p[0] * p[1] + mode[1] * p[1] * p[2]


LOSS = mf.LeastSquares(MODES, jnp.array([1.0, -0.5]), predict=chain)
GAMMA = mf.ZeroLossManifold(LOSS)
START = jnp.array([1 / 0.6, 0.6, -0.5 / 0.6])
ONE, ALL = mf.LabelNoise(STD, batch_size=1), mf.LabelNoise(STD)


@functools.partial(long_jit, static_argnames="num_seeds")
def ends(update, noise, rate, num_steps, key, num_seeds=SEEDS, push=0.0):
    """Where the runs of some seeds end, (seeds, 3); `push` starts them off the manifold."""
    normal = jnp.sum(jax.jacfwd(LOSS.residual)(START), axis=0)
    begin = START + push * normal  # along the normal space: Φ is START + O(push²)

    def run(key):
        transform = optax.with_extra_args_support(update.transform(rate))

        def step(k, carry):
            point, state = carry
            slope = lambda p: noise.gradient(LOSS, p, jr.fold_in(key, k))
            change, state = transform.update(slope(point), state, point, grad_fn=slope)
            return optax.apply_updates(point, change), state

        return jax.lax.fori_loop(0, num_steps, step, (begin, transform.init(begin)))[0]

    return jax.vmap(run)(jr.split(key, num_seeds))


def limit(update, noise, time=TIME):
    return mf.solve(mf.LimitDiffusion(GAMMA, noise, update), START, end_time=time, rtol=1e-8).final


def meets(what, run, rate, expected, bias, others=()):
    """2 E[…](η/2) − E[…](η), within four standard errors and a bias of `bias`."""
    coarse, fine = np.asarray(run(rate)), np.asarray(run(rate / 2))
    errors = [np.std(v, axis=0) / np.sqrt(len(v)) for v in (coarse, fine)]
    found = 2 * fine.mean(axis=0) - coarse.mean(axis=0)
    bound = 4 * np.hypot(errors[0], 2 * errors[1]) + bias
    excess = np.max(np.abs(found - expected) / bound)
    numbers = f"{found} ± {np.hypot(errors[0], 2 * errors[1])}, expected {expected}"
    at_most(f"{what}: {numbers}, in bounds", excess, 1.0)
    for name, other in dict(others).items():
        at_least(f"{what}: {name} is rejected", np.max(np.abs(found - other) / bound), 1.5)


def simulated(update, noise, seed, time=TIME):
    def run(rate):
        steps = update.clock.num_steps(rate, time)
        return ends(update, noise, rate, steps, key_of(seed))

    return run


def test_adam():
    options = {"b1": 0.5, "averaging": 5.0, "eps": 0.1, "weight_decay": 0.3}
    update, rate, time = updates.Adam(**options), 0.03, 0.6
    wrong = {"averaging": "fast", "weight_decay": 0.0, "eps": 0.0}
    others = {
        name: limit(updates.Adam(**(options | {name: value})), ALL, time)
        for name, value in wrong.items()
    }
    run = simulated(update, ALL, 1, time)
    meets("Adam", run, rate, limit(update, ALL, time), 4 * rate**2, others)


@pytest.mark.parametrize("num", [0, 1])
def test_one_example_at_a_time(num):
    update, rate, time = [(updates.ClippedSGD(0.7), 0.05, 1.0), (updates.Muon(), 0.03, 0.6)][num]
    others = {"SGD": limit(updates.SGD(), ONE, time), "the start": START}
    what = type(update).__name__
    run = simulated(update, ONE, 2 + num, time)
    meets(what, run, rate, limit(update, ONE, time), 0.3 * rate**1.5, others)


def test_signs():
    """Steps lie in the plane of two sign vectors: the part across it stays as it is."""
    update, rate = updates.SignSGD(), 0.02
    rows = jnp.sign(jax.jacfwd(LOSS.residual)(START))
    across = jnp.cross(rows[0], rows[1])
    found = ends(update, ONE, rate, update.clock.num_steps(rate, TIME), key_of(4), 200)
    at_most("across the signs", jnp.max(jnp.abs((found - START) @ across)), 1e-10)
    at_least("along them", norm(found - START), rate)
    close("the limit", limit(update, ONE), START, 1e-12)


@functools.partial(long_jit, static_argnames="num_workers")
def rounds(rate, num_workers, num_local, num_rounds, key):
    def local(k, points):
        keys = jr.split(jr.fold_in(key, k), points.shape[:2])
        slopes = jax.vmap(jax.vmap(lambda p, k: ALL.gradient(LOSS, p, k)))(points, keys)
        return points - rate * slopes

    def one_round(number, points):
        workers = jnp.repeat(points[:, None], num_workers, axis=1)
        first = number * num_local
        return jax.lax.fori_loop(first, first + num_local, local, workers).mean(axis=1)

    return jax.lax.fori_loop(0, num_rounds, one_round, jnp.tile(START, (SEEDS, 1)))


def test_local_sgd():
    alpha, workers, time = 0.4, 4, 1.92
    update = updates.LocalSGD(workers, alpha)

    def run(rate):
        num_local = round(alpha / rate)
        return rounds(rate, workers, num_local, round(time / rate**2 / num_local), key_of(5))

    # With this noise it is the program of `ONE`; the limit is that with `ALL`.
    others = {"SGD": limit(updates.SGD(), mf.LabelNoise(STD / 2**0.5, batch_size=1), time)} | {
        f"α = {a}": limit(updates.LocalSGD(workers, a), ALL, time) for a in (0.0, 4 * alpha)
    }
    meets("local SGD", run, 0.08, limit(update, ALL, time), 3e-3, others)


@pytest.mark.parametrize("per_example", [True, False])
def test_sam(per_example):
    """Rates η and η/2 with ρ² = η/20 each."""
    noise = mf.MinibatchNoise(1 if per_example else 2)
    time = 0.2
    other = updates.SAM(0.05, per_example=not per_example)
    other = limit(other, mf.MinibatchNoise(2 if per_example else 1), time)

    def run(rate):
        update = updates.SAM(float(np.sqrt(rate / 20)), per_example=per_example)
        steps = update.clock.num_steps(rate, time)
        return ends(update, noise, rate, steps, key_of(6), 100 if per_example else 1, rate / 4)

    expected = limit(updates.SAM(0.05, per_example=per_example), noise, time)
    meets("SAM", run, 0.05, expected, 4e-3, {"the other": other, "the start": START})


def test_normalised_gradients():
    update, noise, time = updates.NormalizedGD(), mf.MinibatchNoise(2), 1.0

    def run(rate):
        return ends(update, noise, rate, update.clock.num_steps(rate, time), key_of(7), 1, rate / 4)

    largest = lambda p: GAMMA.local(p).hessian_eigenvalues()[-1]
    expected = limit(update, noise, time)
    others = {
        "half the rate": limit(update, noise, time / 2),
        "of λ₁": mf.solve(
            mf.RiemannianGradientFlow(GAMMA, lambda p: largest(p) / 4), START, end_time=time
        ).final,
    }
    meets("normalised", run, 0.02, expected, 1e-4, others)


# --- the transforms ------------------------------------------------------------------------


def stepped(transform, point, num_steps, **extras):
    state = transform.init(point)
    for k in range(num_steps):
        change, state = transform.update(slope(point, k), state, point, **extras)
        point = optax.apply_updates(point, change)
    return point


def slope(point, k):
    return {"W": jnp.sin(3 * point["W"] + k), "b": jnp.cos(point["b"] - k)}


POINT = {"W": jnp.arange(6.0).reshape(3, 2) / 4 - 0.6, "b": jnp.array([0.3, -1.0])}


def test_adam_is_optax():
    """AdamW with 1 − β₂ = bη and λ = wη; a schedule changes β₂ in every step."""
    rate = 0.1
    for averaging, b2 in ((2.0, 1 - 2.0 * rate), ("fast", 1 - rate**1.5), (1e3, 0.0)):
        update = updates.Adam(0.8, averaging, eps=1e-3, weight_decay=0.7)
        theirs = optax.adamw(rate, b1=0.8, b2=b2, eps=1e-3, weight_decay=0.7 * rate)
        found = stepped(update.transform(rate), POINT, 4)
        close(f"Adam, {averaging}", found, stepped(theirs, POINT, 4), 1e-12)
    schedule = optax.linear_schedule(0.2, 0.1, 4)
    transform, point = updates.Adam(0.0, averaging=2.0).transform(schedule), POINT
    found, v, weight = stepped(transform, point, 3), 0.0, 1.0
    for k in range(3):
        eta, g = float(schedule(k)), slope(point, k)["b"]
        v, weight = v + 2 * eta * (g**2 - v), weight * (1 - 2 * eta)
        point = point | {"b": point["b"] - eta * g / jnp.sqrt(v / (1 - weight))}
    close("with a schedule", found["b"], point["b"], 1e-6)


def test_adam_leaves_what_has_no_gradient():
    transform = updates.Adam().transform(0.1)
    change, _ = transform.update(jnp.array([0.0, 2.0]), transform.init(jnp.ones(2)), jnp.ones(2))
    close("first step", change, [0.0, -0.1], 1e-12)


def test_steps_of_the_others():
    rate, g = 0.1, slope(POINT, 0)
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(rate))
    close("clipped", stepped(updates.ClippedSGD(0.5).transform(rate), POINT, 3),
          stepped(clip, POINT, 3), 1e-12)  # fmt: skip
    close("not clipped", stepped(updates.ClippedSGD(50.0).transform(rate), POINT, 3),
          stepped(optax.sgd(rate), POINT, 3), 1e-12)  # fmt: skip
    step = lambda update: jax.tree.map(
        lambda a, b: (b - a) / rate, stepped(update.transform(rate), POINT, 1), POINT
    )
    close("signs", step(updates.SignSGD()), jax.tree.map(jnp.sign, g), 1e-12)
    left, _, right = np.linalg.svd(g["W"], full_matrices=False)
    muon = step(updates.Muon())
    close("polar factor", muon["W"], left @ right, 1e-9)
    close("of a vector", muon["b"], g["b"] / norm(g["b"]), 1e-12)
    close("one length", step(updates.NormalizedGD()), jax.tree.map(lambda x: x / norm(g), g), 1e-12)
    for update in (updates.Muon(), updates.NormalizedGD(), updates.ClippedSGD(1.0)):
        transform = update.transform(rate)
        zeros = jax.tree.map(jnp.zeros_like, POINT)
        change, _ = transform.update(zeros, transform.init(POINT), POINT)
        at_most(f"{type(update).__name__} of no gradient", norm(change), 0.0)


def test_sam_takes_the_gradient_at_the_top():
    transform, radius = updates.SAM(0.3).transform(0.1), 0.3
    top = jax.tree.map(lambda p, g: p + radius * g / norm(slope(POINT, 0)), POINT, slope(POINT, 0))
    found = stepped(transform, POINT, 1, grad_fn=lambda p: slope(p, 0))
    close("SAM", found, jax.tree.map(lambda p, g: p - 0.1 * g, POINT, slope(top, 0)), 1e-12)
    with refused(ValueError, "grad_fn", "simulate"):
        stepped(transform, POINT, 1)


RUN = {"learning_rate": 0.02, "key": jr.key(1)}


def test_simulate_runs_updates_on_their_clocks():
    start = START + 0.01
    for update, noise, clock in (
        (updates.Adam(averaging=2.0), ALL, "Ση²"), (updates.Muon(), ONE, "Ση²"),
        (updates.ClippedSGD(1.0), ONE, "Ση²"), (updates.SignSGD(), ONE, "Ση²"),
        (updates.NormalizedGD(), mf.MinibatchNoise(2), "Ση²"),
        (updates.SAM(0.1), mf.MinibatchNoise(1), "Σηρ²"),
    ):  # fmt: skip
        end = update.clock.gain * 10 * 0.02**update.clock.power
        walk = mf.simulate(LOSS, noise, update, start, **RUN, end_time=end)
        equal("steps", int(walk.stats["num_steps"]), 10)
        equal("gradients", int(walk.stats["num_gradients"]), 20 if clock == "Σηρ²" else 10)
        assert walk.clock.startswith(clock), walk.clock
        flow = mf.LimitDiffusion(GAMMA, noise, update)
        equal("the flow's clock", mf.solve(flow, START, end_time=0.01).clock, walk.clock)
    same = mf.simulate(LOSS, mf.SAMGradient(mf.MinibatchNoise(1), 0.1), optax.sgd, start, **RUN,
                       num_steps=10)  # fmt: skip
    close("SAM as SAMGradient", same.final, walk.final, 1e-12)
    with refused(ValueError, "LocalSGD has no Optax transform", "vmap over the workers"):
        mf.simulate(LOSS, ALL, updates.LocalSGD(2, 0.1), START, **RUN, num_steps=2)
