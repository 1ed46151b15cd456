"""A run of SGD that was cut off goes on to the last bit as if it had not been."""

import os
import signal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
import processes
from checks import close, equal, refused
from sgd_runs import heavy_ball, KEY, LINEAR, NOISE, run, same_bits, short

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import conftest
from test_simulate_resume import watched

def progress(row):
    if row["time"] > 0.05:
        os.kill(os.getpid(), signal.SIGKILL)

watched({file!r}, progress=progress)
"""


def noisy(**options):
    return short(heavy_ball, **{"noise": NOISE, "num_steps": 10, **options})


def watched(file=None, **options):
    return noisy(checkpoint=file, observe={"loss": LINEAR}, num_saves=5, **options)


def same_walk(value, expected):
    same_bits("final", value.final, expected.final)
    same_bits("points", value.points, expected.points)
    same_bits("observables", value.observables, expected.observables)
    same_bits("times", value.times, expected.times)
    same_bits("stats", dict(value.stats), dict(expected.stats))


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path):
    file = os.fspath(tmp_path / "folder" / "run.npz")
    script = KILLED.format(paths=[os.path.dirname(os.path.abspath(__file__))], file=file)
    done = processes.Running(["-c", script]).finished()
    equal(f"exit of the killed run {done.stderr[-500:]}", done.returncode, -signal.SIGKILL)
    time, point = mf.load_checkpoint(file, jnp.ones(3))
    assert 0 <= float(time) <= 0.06 + 1e-9, f"time in the file: {time}"
    whole = watched()
    same_bits("the point in the file", point, whole.point(round(float(time) / 0.02)))
    rows = []
    same_walk(watched(file, progress=rows.append), whole)
    jax.effects_barrier()
    equal("rows of the rest", len(rows), 5 - round(float(time) / 0.02))
    same_walk(watched(file), whole)
    same_walk(watched(resume=file), whole)


def with_its_own_key(rate):
    return optax.chain(optax.add_noise(0.1, 0.5, jr.key(3)), optax.adam(rate))


@pytest.mark.parametrize("first", [3, 7])
@pytest.mark.parametrize("optimizer", [optax.adam, with_its_own_key])
def test_a_short_run_is_the_beginning_of_a_long_one(tmp_path, optimizer, first):
    file = tmp_path / "short"
    short(optimizer, noise=NOISE, num_steps=first, checkpoint=file)
    walk = short(optimizer, noise=NOISE, num_steps=12, resume=file, progress=True)
    same_walk(walk, short(optimizer, noise=NOISE, num_steps=12))


def test_saves_that_the_file_has(tmp_path):
    file = tmp_path / "run"
    noisy(num_saves=5, checkpoint=file)
    same_walk(noisy(num_steps=20, num_saves=10, resume=file), noisy(num_steps=20, num_saves=10))
    same_walk(noisy(num_steps=4, num_saves=2, resume=file), noisy(num_steps=4, num_saves=2))
    same_walk(noisy(num_steps=20, num_saves=2, resume=file), noisy(num_steps=20, num_saves=2))
    with refused(ValueError, "after 0, 2, 4, 6, 8, 10 steps", "not after 5", "num_saves"):
        noisy(num_steps=20, num_saves=4, resume=file)


def test_half_precision_survives_the_file(tmp_path):
    point, loss = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (jnp.ones(3), LINEAR))
    options = {"point": point, "loss": loss}
    noisy(num_steps=5, checkpoint=tmp_path / "run", **options)
    walk = noisy(resume=tmp_path / "run", **options)
    assert walk.final.dtype == jnp.bfloat16
    same_bits("final", walk.final, noisy(**options).final)


def test_a_run_that_diverged_stays_so(tmp_path):
    options = {"throw": False, "learning_rate": 1e3}
    whole = noisy(num_steps=20, num_saves=20, **options)
    assert whole.result == mf.RESULTS.diverged
    noisy(checkpoint=tmp_path / "run", num_saves=10, **options)
    same_walk(
        noisy(num_steps=20, num_saves=2, resume=tmp_path / "run", **options),
        noisy(num_steps=20, num_saves=2, **options),
    )
    last = int(whole.stats["diverged_at"])
    assert 1 < last < 9, last
    before = noisy(num_steps=last, num_saves=last, resume=tmp_path / "run", **options)
    assert before.result == mf.RESULTS.successful
    same_walk(before, noisy(num_steps=last, num_saves=last, **options))


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run"
    noisy(checkpoint=file)
    other_loss = mf.LeastSquares(LINEAR.inputs, LINEAR.targets + 0.1, predict=jnp.dot)
    for options, words in (
        ({"key": jr.key(1)}, "another key"),
        ({"point": 1.1 * jnp.ones(3)}, "another start"),
        ({"loss": other_loss}, "loss"),
        ({"noise": mf.LabelNoise(0.6)}, "noise"),
        ({"learning_rate": 0.11}, "learning rate"),
        ({"momentum": 0.9}, "momentum"),
        ({"observe": {"loss": LINEAR}}, "other observables"),
    ):
        for how in ("checkpoint", "resume"):
            with refused(ValueError, words):
                noisy(**{how: file}, **options)
    noisy(checkpoint=tmp_path / "schedule", learning_rate=optax.constant_schedule(0.1))
    with refused(ValueError, "another learning rate or momentum"):
        later = lambda step: jnp.where(step < 5, 0.1, 0.2)
        noisy(resume=tmp_path / "schedule", learning_rate=later)
    with refused(ValueError, "a point or an optimizer of another structure"):
        short(noise=NOISE, resume=file)
    with refused(ValueError, "a point or an optimizer of another structure"):
        run(heavy_ball, resume=file)
    with refused(ValueError, "no checkpoint", "nowhere"):
        noisy(resume=tmp_path / "nowhere")
    np.savez(tmp_path / "other.npz", times=np.zeros(3))
    with refused(ValueError, "not a checkpoint of `simulate`"):
        noisy(resume=tmp_path / "other")
    with refused(ValueError, "outside jit"):
        jax.jit(lambda x: noisy(point=x, checkpoint=file).final)(jnp.ones(3))


def test_orbax_keeps_the_same(tmp_path):
    import orbax.checkpoint as orbax

    options = orbax.CheckpointManagerOptions(max_to_keep=2)
    with orbax.CheckpointManager(tmp_path / "run", options=options) as manager:
        same_walk(watched(manager), watched())
        same_walk(watched(resume=manager), watched())
    with orbax.CheckpointManager(tmp_path / "run", options=options) as manager:
        walk = noisy(num_steps=20, num_saves=10, observe={"loss": LINEAR}, resume=manager)
        same_walk(walk, noisy(num_steps=20, num_saves=10, observe={"loss": LINEAR}))
        with refused(ValueError, "another key", str(tmp_path)):
            noisy(observe={"loss": LINEAR}, key=jr.key(1), checkpoint=manager)


def test_checkpoints_that_are_none():
    for option in ("checkpoint", "resume"):
        with refused(ValueError, option, "path of an .npz file", "manifoldflow[orbax]"):
            noisy(**{option: 3})


def test_models_and_their_final_points(tmp_path):
    walk = run(num_saves=2, num_steps=4, checkpoint=tmp_path / "run")
    same_walk(walk, run(num_saves=2, num_steps=4))
    time, point = mf.load_checkpoint(tmp_path / "run", walk.final)
    close("time", time, walk.times[-1], 1e-14)
    same_bits("point", point, walk.final)


def test_legs_of_any_length_are_one_program(tmp_path):
    num_traces = 0

    def predict(x, z):
        nonlocal num_traces
        num_traces += 1
        return jnp.dot(x, z)

    loss = mf.LeastSquares(LINEAR.inputs, LINEAR.targets, predict=predict)
    noisy(loss=loss, num_saves=3, checkpoint=tmp_path / "run")
    before = num_traces
    noisy(loss=loss, num_steps=20, num_saves=6, resume=tmp_path / "run", key=KEY)
    equal("traces when resumed", num_traces - before, 0)
