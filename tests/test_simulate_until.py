"""`simulate(until=…)`: each run ends by itself, at the step that a loop by hand ends at."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from sgd_runs import heavy_ball, KEY, LINEAR, NOISE, same_bits, schedule, short, ten_noisy_points

LOUD = mf.LabelNoise(3.0)


def is_out(point):
    return point[0] < -1.2


def ended(until=is_out, **options):
    options = {"noise": NOISE, "num_steps": 10, "num_saves": 5, "until": until, **options}
    return short(heavy_ball, observe={"loss": LINEAR}, **options)


def exit_step(points):
    return next(k for k, point in enumerate(points) if k and is_out(point))


def test_the_run_ends_with_the_step_that_leaves():
    """The saves before are those of the free run; those after repeat the final point."""
    free, walk, last = ten_noisy_points(), ended(), exit_step(ten_noisy_points())
    assert 2 < last < 9, last
    assert walk.result == mf.RESULTS.stopped_early and bool(walk.is_successful), walk.result
    equal("steps", int(walk.stats["num_steps"]), last)
    equal("gradients", int(walk.stats["num_gradients"]), last)
    equal("diverged at", int(walk.stats["diverged_at"]), -1)
    same_bits("final point", walk.final, free[last])
    steps = [min(step, last) for step in (0, 2, 4, 6, 8, 10)]
    for i, step in enumerate(steps):
        same_bits(f"save {i}", walk.point(i), free[step])
        close(f"observed at save {i}", walk.observables["loss"][i], LINEAR(free[step]), 1e-12)
    close("times", walk.times, 0.01 * jnp.array(steps), 1e-14)
    rate = ended(learning_rate=schedule)
    sums = np.cumsum([schedule(k) ** 2 for k in range(10)])
    done = int(rate.stats["num_steps"])
    assert done < 10, done
    close("time of the end under a schedule", rate.times[-1], sums[done - 1], 1e-13)


def test_a_run_that_is_not_ended_is_as_without():
    walk, free = ended(lambda point: point[0] > 1e3), ended(None)
    assert walk.result == mf.RESULTS.successful
    same_bits("the whole run", walk, free)
    never = ended(lambda point: point[0] > 1e30, learning_rate=1e3, throw=False, num_steps=20)
    assert never.result == mf.RESULTS.diverged and bool(jnp.all(jnp.isnan(never.final)))
    close("its times", never.times, 1e6 * jnp.arange(0, 21, 4.0), 1e-14)


def test_stationary():
    """The norm of the whole gradient, whatever the noise of the step."""
    walk = ended(mf.Stationary(0.02), num_steps=400, noise=mf.IsotropicNoise(1e-3))
    slopes = [jnp.linalg.norm(LINEAR.gradient(x)) for x in (walk.final, walk.point(0))]
    assert walk.result == mf.RESULTS.stopped_early and slopes[0] <= 0.02 < slopes[1], slopes
    before = ended(None, num_steps=int(walk.stats["num_steps"]) - 1, noise=mf.IsotropicNoise(1e-3))
    at_least("one step before", jnp.linalg.norm(LINEAR.gradient(before.final)), 0.02)


def test_each_member_ends_by_itself():
    keys, count = jr.split(KEY, 8), {"traces": 0}

    def until(point):
        count["traces"] += 1
        return is_out(point)

    many = jax.jit(jax.vmap(lambda key: ended(until, key=key, noise=LOUD)))
    walks, traces = many(keys), count["traces"]
    steps = walks.stats["num_steps"].tolist()
    assert len(set(steps)) > 2 and 10 in steps, steps
    for i in (0, int(np.argmin(steps)), int(np.argmax(steps))):
        alone = ended(until, key=keys[i], noise=LOUD)
        equal(f"steps of member {i}", steps[i], int(alone.stats["num_steps"]))
        close(f"points of member {i}", walks.points[i], alone.points, 1e-12)
        close(f"times of member {i}", walks.times[i], alone.times, 1e-14)
        assert bool((walks.result == alone.result)[i]), alone.result
    before = count["traces"]
    ended(until, key=jr.key(9), noise=LOUD)
    many(jr.split(jr.key(8), 8))
    equal("traces for new keys", count["traces"], before)
    assert traces > 0, "the counter does not count"


def test_derivatives_go_through_the_steps_before_the_end():
    last = exit_step(ten_noisy_points())
    final = lambda rate, **options: ended(learning_rate=rate, **options).final[0]
    expected = jax.grad(lambda rate: final(rate, until=None, num_steps=last))(0.1)
    close("d final / d η", jax.grad(final)(0.1), expected, 1e-10)


@pytest.mark.parametrize("until", [is_out, mf.Stationary(0.6)])
def test_checkpoints_of_runs_that_are_ended(tmp_path, until):
    """Before the end, at it, after it: the same to the last bit."""
    file, rows = tmp_path / "run", []
    whole = ended(until, num_saves=10)
    last = int(whole.stats["num_steps"])
    assert 2 < last < 9, last
    for num_steps in (last - 1, last + 1):
        ended(until, num_saves=num_steps, num_steps=num_steps, checkpoint=file)
    same_bits("all of it", ended(until, num_saves=10, checkpoint=file), whole)
    shorter = ended(until, num_saves=1, num_steps=last - 1, resume=file)
    assert shorter.result == mf.RESULTS.successful, shorter.result
    same_bits("a shorter one", shorter.final, whole.point(last - 1))
    ended(until, num_saves=10, checkpoint=tmp_path / "told", progress=rows.append)
    equal("saves that are shown", len(rows), last)
    for other in (None, lambda point: point[0] < -1.1, mf.Stationary(0.4)):
        with refused(ValueError, "another until"):
            ended(other, num_saves=10, resume=file)


def test_saves_are_shown_until_the_end():
    rows = []
    walk = ended(progress=rows.append)
    jax.effects_barrier()
    shown = 1 + int(walk.stats["num_steps"] - 1) // 2
    close("times", jnp.asarray([row["time"] for row in rows]), walk.times[:shown], 1e-14)


@pytest.mark.quick
def test_what_cannot_end_a_run():
    with refused(ValueError, "simulate: until must be", wrong_type=True):
        ended(0.1)
    for run in (
        ended,
        lambda until: mf.solve(mf.GradientFlow(LINEAR), jnp.ones(3), end_time=1.0, until=until),
    ):
        with refused(ValueError, "one truth value", "(3,)", "jnp.all"):
            run(lambda point: point < 0.9)
        with refused(ValueError, "truth value", "float", "Compare it"):
            run(lambda point: jnp.sum(point))


def test_no_instruction_more_without_it():
    from test_program_size import size

    run = lambda **options: lambda x: mf.simulate(
        LINEAR, NOISE, optax.sgd, x, learning_rate=0.1, num_steps=9, num_saves=3, key=KEY,
        throw=False, **options,
    )  # fmt: skip
    plain, asked = size(run(), jnp.ones(3))[1], size(run(until=is_out), jnp.ones(3))[1]
    # 1124 with JAX 0.10 before there was `until`, 1230 with it.
    at_most("without", plain, 1_124)
    at_most("with", asked - plain, 150)
