"""`simulate`: step for step what Optax does, on the right clock, whatever is saved or shown."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, central_difference, close, equal, flat, norm, refused
from sgd_runs import (
    by_hand,
    heavy_ball,
    INPUTS,
    KEY,
    LINEAR,
    LOSS,
    nesterov,
    NOISE,
    POINT,
    polyak,
    RADIUS,
    run,
    sam,
    sam_in_a_chain,
    same_bits,
    schedule,
    short,
    STILL,
    TARGETS,
    ten_noisy_points,
)

# --- steps ---------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "optimizer, num_steps",
    [(optax.sgd, 1), (optax.sgd, 20), (heavy_ball, 20), (nesterov, 20), (optax.adam, 20)],
)
def test_steps_are_those_of_optax(optimizer, num_steps):
    walk = run(optimizer, num_steps=num_steps)
    expected = by_hand(optimizer(0.1), num_steps)[-1]
    if optimizer is nesterov:
        # XLA's older emitters contract its products and sums differently in two programs.
        close("final point", walk.final, expected, 1e-14)
    else:
        same_bits("final point", walk.final, expected)
    assert bool(walk.is_successful) and walk.result == mf.RESULTS.successful
    counts = {name: int(value) for name, value in walk.stats.items()}
    expected = {"num_steps": num_steps, "num_gradients": num_steps, "diverged_at": -1}
    equal("stats", counts, {"num_rejected": 0, "num_factorizations": 0, **expected})


def test_schedules():
    walk = run(learning_rate=schedule, num_steps=20, num_saves=4)
    close("final point", walk.final, by_hand(optax.sgd(schedule), 20)[-1], 1e-13)
    rates = np.array([schedule(k) for k in range(20)])
    sums = np.concatenate([[0], np.cumsum(rates**2)])
    close("times", walk.times, sums[::5], 1e-14)
    cosine = optax.cosine_decay_schedule(0.1, 10)
    small = by_hand(optax.sgd(cosine), 10, LINEAR, STILL, jnp.ones(3))[-1]
    close("cosine", short(learning_rate=cosine).final, small, 1e-13)


def test_the_value_of_the_loss_for_those_who_ask():
    small = by_hand(polyak(0.1), 10, LINEAR, STILL, jnp.ones(3))[-1]
    close("Polyak's step size", short(polyak).final, small, 1e-13)


@pytest.mark.parametrize("optimizer", [sam, sam_in_a_chain])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_sam_climbs_with_the_batch_and_labels_of_its_step(optimizer, batch_size):
    noise = mf.LabelNoise(0.5, batch_size=batch_size)
    walk = run(optimizer, noise=noise, num_steps=3)
    point, gradient = POINT, jax.jit(lambda x, key: noise.gradient(LOSS, x, key))
    for k in range(3):
        key = jr.fold_in(KEY, k)
        slope = gradient(point, key)
        top = zoo.moved(point, slope, RADIUS / norm(slope))
        point = zoo.moved(point, gradient(top, key), -0.1)
    close("SAM by hand", walk.final, point, 1e-12)
    equal("gradients", int(walk.stats["num_gradients"]), 6)
    one = run(noise=mf.SAMGradient(noise, RADIUS), num_steps=3)
    close("SAMGradient with batches of one", one.final, point, 1e-12)


def test_each_example_climbs_by_itself():
    x = jnp.ones(3)
    noise = mf.LabelNoise(0.5, batch_size=1)
    gradient = jax.jit(lambda x, key: noise.gradient(LINEAR, x, key))
    total = jnp.zeros(3)
    for key in jr.split(KEY, 2):
        slope = gradient(x, key)
        total += gradient(x + RADIUS * slope / jnp.linalg.norm(slope), key) / 2
    both = mf.SAMGradient(noise, RADIUS, num_draws=2)
    close("mean of two climbs", both.gradient(LINEAR, x, KEY), total, 1e-13)
    level = mf.FunctionLoss(lambda x: jnp.sum(x**4))
    climbed = mf.SAMGradient(STILL, RADIUS)
    equal("no climb where flat", climbed.gradient(level, jnp.zeros(2), KEY).tolist(), [0.0, 0.0])
    slope = jax.jacfwd(lambda x: climbed.gradient(level, x, KEY))(jnp.zeros(2))
    assert bool(jnp.all(jnp.isfinite(slope))), slope
    for wrong, words in (({"radius": -1}, "radius"), ({"radius": 1, "num_draws": 0}, "num_draws")):
        with refused(ValueError, words):
            mf.SAMGradient(noise, **wrong)


def test_frozen_leaves_stay():
    free = {"weight": True, "bias": False, "out": True}
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network, trainable=free)
    walk = run(heavy_ball, loss=loss, num_saves=2)
    same_bits("the frozen leaf", walk.final["bias"], POINT["bias"])
    at_least("the others", norm(walk.final["out"] - POINT["out"]), 1e-3)
    assert walk.points["bias"] is None


@pytest.mark.parametrize(
    "optimizer, rate", [(nesterov, 0.1), (optax.adam, 0.1), (optax.sgd, schedule)]
)
def test_single_precision_stays_single(optimizer, rate):
    loss = jax.tree.map(lambda x: x.astype(jnp.float32), LINEAR)
    walk = short(optimizer, loss=loss, point=jnp.ones(3, jnp.float32), learning_rate=rate)
    dtypes = {leaf.dtype for leaf in (walk.points, walk.times, walk.final)}
    equal("dtypes", dtypes, {jnp.dtype("float32")})
    close("as in double", walk.final, short(optimizer, learning_rate=rate).final, 1e-5)


def test_any_model_is_a_point():
    model = zoo.mlp(jr.key(1))
    walk = run(point=model, loss=mf.LeastSquares(INPUTS, TARGETS), num_saves=2)
    assert walk.final(INPUTS[0]).shape == (2,) and walk.point(1).activation is model.activation


# --- the clock -----------------------------------------------------------------------------


@pytest.mark.quick
def test_the_limit_clock_and_its_end():
    close("kη²", short().times, jnp.array([0, 0.1]), 1e-14)
    walk = short(end_time=0.4, num_saves=4)
    equal("steps", int(walk.stats["num_steps"]), 40)
    close("times", walk.times, jnp.linspace(0, 0.4, 5), 1e-14)
    same_bits("the same walk", walk.final, short(num_steps=40).final)
    equal("a schedule", int(short(learning_rate=schedule, end_time=0.1).stats["num_steps"]), 3)


@pytest.mark.parametrize(
    "optimizer",
    [heavy_ball, nesterov, functools.partial(optax.sgd, momentum=0.9), optax.sgd],
)
def test_momentum_rescales_the_clock(optimizer):
    walk = short(optimizer, num_steps=5, momentum=0.9)
    close("kη²/(1−β)²", walk.times, jnp.array([0, 5.0]), 1e-13)
    equal("steps", int(short(optimizer, end_time=5, momentum=0.9).stats["num_steps"]), 5)
    same_bits("the same walk", walk.final, short(optimizer, num_steps=5).final)


def with_decay(rate):
    return optax.chain(optax.add_decayed_weights(0.1), heavy_ball(rate))


def without_bias(rate):
    labels = {"weight": "on", "bias": "off", "out": "on"}
    return optax.multi_transform({"on": optax.sgd(rate), "off": optax.set_to_zero()}, labels)


def averaged(rate):
    return optax.chain(optax.ema(0.9, debias=False), optax.sgd(rate))


@pytest.mark.parametrize(
    "optimizer, momentum", [(heavy_ball, 0.9), (without_bias, None), (averaged, None)]
)
def test_optimizers_whose_clock_is_known(optimizer, momentum):
    walk = run(optimizer, noise=STILL, end_time=1, momentum=momentum)
    equal("steps", int(walk.stats["num_steps"]), 1 if momentum else 100)


def test_weight_decay_belongs_to_an_update():
    """Its limit has a drift that plain SGD has not."""
    with refused(ValueError, "num_steps", "weight decay", "updates.SGD"):
        run(with_decay, end_time=1.0, momentum=0.9)


@pytest.mark.parametrize(
    "optimizer", [optax.adam, optax.lion, optax.rmsprop, sam, polyak, optax.lars, optax.sign_sgd]
)
def test_optimizers_without_a_limit_clock_take_a_number_of_steps(optimizer):
    with refused(ValueError, "num_steps", "not proportional"):
        run(optimizer, end_time=1.0)
    with refused(ValueError, "num_steps", "kηρ²"):
        run(noise=mf.SAMGradient(NOISE, RADIUS), end_time=1.0)


@pytest.mark.parametrize("optimizer", [heavy_ball, nesterov])
def test_momentum_that_the_clock_does_not_know(optimizer):
    for momentum in (None, 0.5):
        with refused(ValueError, "10 times as far", "momentum=0.9"):
            run(optimizer, end_time=1.0, momentum=momentum)


# --- saves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_saves", [1, 3, 4, 10])
def test_saves_do_not_change_the_walk(num_saves):
    observe = {"loss": LINEAR, "outer": lambda point: {"it": jnp.outer(point, point)}}
    walk = short(heavy_ball, noise=NOISE, num_saves=num_saves, observe=observe)
    same_bits("final", walk.final, ten_noisy_points()[10])
    steps = [i * 10 // num_saves for i in range(num_saves + 1)]
    close("times", walk.times, 0.01 * jnp.array(steps), 1e-14)
    for i, step in enumerate(steps):
        here = ten_noisy_points()[step]
        same_bits(f"save {i} of {num_saves}", walk.point(i), here)
        close("what is observed", walk.observables["loss"][i], LINEAR(here), 1e-12)
    equal("shape", walk.observables["outer"]["it"].shape, (num_saves + 1, 3, 3))


def test_progress(capsys):
    rows = []
    walk = short(num_saves=5, observe={"loss": LINEAR}, progress=rows.append)
    jax.effects_barrier()
    close("times", jnp.asarray([row["time"] for row in rows]), walk.times, 1e-14)
    close("loss", jnp.asarray([row["loss"] for row in rows]), walk.observables["loss"], 1e-13)
    plain = short(num_steps=1030)
    same_bits("with a meter", short(num_steps=1030, progress=True).final, plain.final)
    jax.effects_barrier()
    lines = capsys.readouterr().out.split()
    assert 40 < len(lines) < 60 and lines[-1] == "100.00%", lines
    shown = jax.vmap(lambda key: short(num_steps=12, num_saves=3, key=key, progress=True).times)
    shown(jr.split(KEY, 2))
    jax.effects_barrier()
    equal("under vmap", capsys.readouterr().out.split()[-1], "100.00%")


# --- transformations of JAX ----------------------------------------------------------------


def test_vmap_over_keys_is_a_loop():
    keys = jr.split(KEY, 3)
    walks = jax.jit(jax.vmap(lambda key: run(heavy_ball, key=key, num_saves=3)))(keys)
    for i, key in enumerate(keys):
        alone = run(heavy_ball, key=key, num_saves=3)
        close(f"member {i}", jax.tree.map(lambda x: x[i], walks.points), alone.points, 1e-12)
    at_least("members differ", norm(walks.points["bias"][0] - walks.points["bias"][1]), 1e-3)


def test_inside_jit():
    walk = jax.jit(lambda x: short(heavy_ball, point=x, end_time=5.0, momentum=0.9))(jnp.ones(3))
    close("end_time inside jit", walk.final, short(heavy_ball, num_steps=5).final, 1e-13)
    with refused(ValueError, "num_steps", "traced"):
        jax.jit(lambda rate: short(learning_rate=rate, end_time=1.0).times)(0.1)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivatives(mode):
    def final_loss(log_rate):
        rate = 0.05 * jnp.exp(log_rate)
        walk = short(heavy_ball, noise=NOISE, learning_rate=rate, num_steps=7, num_saves=3)
        return LINEAR(walk.final)

    expected = central_difference(lambda t: final_loss(jnp.asarray(t)), 1e-3)
    close("d loss / d ln η", mode(final_loss)(0.0), expected, 1e-8)


num_traces = 0


def counted_predict(point, x):
    global num_traces
    num_traces += 1
    return zoo.network(point, x)


def test_new_values_do_not_retrace():
    def one(seed, rate, std, radius_or_partial):
        inputs, targets = jr.normal(jr.key(seed), INPUTS.shape), TARGETS + seed
        loss = mf.LeastSquares(inputs, targets, predict=counted_predict)
        noise = mf.LabelNoise(std, batch_size=2)
        return run(radius_or_partial, loss=loss, noise=noise, learning_rate=rate, key=jr.key(seed))

    first = one(0, 0.1, 1.0, functools.partial(optax.sgd, momentum=0.9))
    before = num_traces
    second = one(1, jnp.asarray(0.2), 0.3, functools.partial(optax.sgd, momentum=0.9))
    equal("traces of predict in the second call", num_traces - before, 0)
    at_least("with its own answer", norm(flat(first.final) - flat(second.final)), 1e-2)
    assert before > 0, "the counter does not count"
