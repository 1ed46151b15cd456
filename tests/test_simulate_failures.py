"""`simulate` says when SGD diverges, and refuses what it cannot run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import close, equal, refused
from sgd_runs import KEY, LOSS, NOISE, POINT, run, same_bits, Silent, STILL

# --- divergence ----------------------------------------------------------------------------

PARABOLA = mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2)


def parabola(rate, start=1.0, **options):
    """θ_k = (1 − η)^k θ₀."""
    options = {"num_steps": 40, "num_saves": 4, "throw": False, "noise": STILL, **options}
    point = start * jnp.ones(2)
    return run(point=point, loss=PARABOLA, learning_rate=rate, **options)


def test_divergence_is_said_and_at_which_step():
    """(1 − 4)^17 > 10⁸ > (1 − 4)^16: step number 16 goes too far."""
    walk = parabola(4.0)
    assert walk.result == mf.RESULTS.diverged and not bool(walk.is_successful), walk.result
    equal("diverged at", int(walk.stats["diverged_at"]), 16)
    equal("steps done", int(walk.stats["num_steps"]), 16)
    close("saves before", walk.points[:2, 0], jnp.array([1, 3.0**10]), 1e-12)
    for rest in (walk.points[2:], walk.final):
        assert bool(jnp.all(jnp.isnan(rest))), rest
    equal("counted from the size of the start", int(parabola(4.0, 100.0).stats["diverged_at"]), 16)
    with refused(eqx.EquinoxRuntimeError, "diverged", "step 16", "learning rate"):
        parabola(4.0, throw=True)
    with refused(eqx.EquinoxRuntimeError, "diverged", "diverged_at"):
        jax.block_until_ready(
            eqx.filter_jit(lambda rate: parabola(rate, throw=True).final)(jnp.asarray(4.0))
        )
    assert parabola(1.9).result == mf.RESULTS.successful


def test_values_that_are_not_finite():
    root = mf.FunctionLoss(lambda x: jnp.sum(jnp.sqrt(x)))  # 1, 0.6, 0.083, below 0, NaN
    observe = {"count": lambda x: jnp.asarray(7), "x": lambda x: x}
    walk = run(
        point=jnp.ones(1), loss=root, noise=STILL, learning_rate=0.8, num_steps=6, num_saves=6,
        observe=observe, throw=False,
    )  # fmt: skip
    assert walk.result == mf.RESULTS.diverged
    at = int(walk.stats["diverged_at"])
    xs = np.asarray(walk.points[:, 0])
    assert np.all(np.isfinite(xs[: at + 1])) and xs[at] < 0 < xs[at - 1], (at, xs)
    assert np.all(np.isnan(xs[at + 1 :])), xs
    equal("observed integers", walk.observables["count"].tolist(), [7] * (at + 1) + [0] * (6 - at))
    at_start = run(point=jnp.array([jnp.nan]), loss=root, noise=STILL, throw=False)
    equal("NaN at the start", int(at_start.stats["diverged_at"]), 0)


def test_nothing_moves_after_divergence():
    visited = []

    def watched(loss, point):
        jax.debug.callback(lambda x: visited.append(float(x[0])), point)
        return loss.gradient(point)

    parabola(4.0, noise=Silent(watched), num_steps=20)
    jax.effects_barrier()
    expected = [3.0**k for k in range(17)] + 3 * [3.0**16]
    equal("where gradients were taken", sorted(map(abs, visited)), expected)


def test_one_member_that_diverges_leaves_the_others_alone():
    rates = jnp.array([0.5, 4.0, 1.5, -1.0, jnp.nan])
    walks = jax.vmap(parabola)(rates)
    fine = [True, False, True, False, False]
    equal("successful", (walks.result == mf.RESULTS.successful).tolist(), fine)
    equal("diverged", (walks.result == mf.RESULTS.diverged).tolist(), [False, True] + 3 * [False])
    wrong_rate = walks.result == mf.RESULTS.bad_learning_rate
    equal("bad rate", wrong_rate.tolist(), [False, False, False, True, True])
    for i in (0, 2):
        close(f"member {i}", walks.points[i], parabola(rates[i]).points, 1e-13)
    assert bool(jnp.all(jnp.isnan(walks.final[jnp.array([1, 3, 4])]))), walks.final


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [{}, {"num_steps": 5, "end_time": 1.0}])
def test_either_steps_or_time(ends):
    with refused(ValueError, "either num_steps or end_time"):
        mf.simulate(LOSS, NOISE, optax.sgd, POINT, learning_rate=0.1, key=KEY, **ends)


@pytest.mark.parametrize("rate", [-0.1, 0.0, jnp.nan, jnp.inf, jnp.ones(2), lambda step: -1.0])
def test_bad_learning_rates(rate):
    with refused(ValueError, "learning"):
        run(learning_rate=rate)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_steps": 0}, "num_steps must be a positive integer"),
        ({"num_saves": 11}, "num_saves=11 exceeds the 10 steps"),
        ({"num_saves": 0}, "num_saves"),
        ({"end_time": -1.0}, "end_time"),
        ({"momentum": 1.0}, "momentum must be a number in [0, 1)"),
        ({"observe": {"a": 1}}, "functions of a point"),
        ({"progress": 3}, "progress must be"),
        ({"key": jr.split(KEY, 2)}, "one random key"),
        ({"key": None}, "one random key"),
        ({"noise": mf.LabelNoise(1.0, batch_size=9)}, "exceeds the 4 examples"),
        ({"loss": PARABOLA}, "LabelNoise"),
        ({"loss": sum}, "simulate lowers a loss"),
        ({"noise": 0.1}, "IsotropicNoise(0.0)"),
    ],
)  # fmt: skip
def test_bad_options(options, words):
    with refused(ValueError, words, wrong_type=True):
        run(**options)


def test_optimizers_that_are_none():
    for wrong in (optax.sgd(0.1), 0.1):
        with refused(ValueError, "maps a learning rate", "learning_rate=", wrong_type=True):
            run(wrong)
    with refused(ValueError, "must return an Optax transform"):
        run(lambda rate: rate)


def test_a_noise_of_the_wrong_shape():
    wrong = mf.FunctionLoss(
        lambda x: jnp.sum(x["weight"]), trainable={"weight": True, "bias": False, "out": False}
    )

    of_another = Silent(lambda loss, point: wrong.gradient(point))
    with refused(ValueError, "The noise's gradient", "structure and shapes"):
        run(noise=of_another)


def test_raw_keys_are_keys():
    raw = jr.key_data(KEY)
    same_bits("a key of words", run(key=raw).final, run().final)
