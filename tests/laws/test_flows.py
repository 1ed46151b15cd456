"""`solve`: stays on the manifold, composes with JAX, reports, stops, resumes."""

import functools
import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
import processes
import zoo
from checks import at_least, at_most, close, equal, norm, refused
from zoo import descent, height

START = jnp.asarray(zoo.START)
FLOW = zoo.descent_flow()
# With as many saves everywhere: tests with the same options share a program.
follow = functools.partial(mf.solve, FLOW, end_time=0.5, num_saves=4)
BOWL = mf.GradientFlow(mf.FunctionLoss(lambda x: x @ x))


def test_label_noise_flow_stays_on_the_manifold_and_flattens():
    place = zoo.place("mlp")
    loss, manifold = place.manifold.loss, place.manifold
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1))
    observe = {
        "trace": loss.trace_gauss_newton,
        "first weight": lambda model: model.layers[0].weight,
    }
    walk = mf.solve(flow, place.point, end_time=1.0, num_saves=5, observe=observe)
    assert bool(walk.result == mf.RESULTS.successful), walk.result
    defect = lambda y: manifold.defect(eqx.combine(y, place.point))
    defects = eqx.filter_jit(eqx.filter_vmap(defect))(walk.points)
    at_most(f"defects at the saves {defects}", jnp.max(defects), 1e-8)
    traces = np.asarray(walk.observables["trace"])
    at_most(f"the trace falls: {traces}", np.max(np.diff(traces)), 0.0)
    trace = eqx.filter_jit(loss.trace_gauss_newton)
    for i in (0, 2, 5):
        at_most(f"observed at save {i}", abs(traces[i] - trace(walk.point(i))), 1e-10)
    equal("shape of an array that is observed", walk.observables["first weight"].shape, (6, 6, 3))
    assert callable(walk.final) and walk.final.activation is place.point.activation
    close(
        "final is the last save",
        place.coordinates_of(walk.final),
        place.coordinates_of(walk.point(-1)),
        1e-8,
    )


def test_gradient_flow_has_no_manifold():
    rates = jnp.array([1.0, 2.0, 5.0])
    loss = mf.FunctionLoss(lambda x: jnp.sum(rates * x**2) / 2)
    walk = mf.solve(mf.GradientFlow(loss), jnp.ones(3), end_time=1.0, num_saves=4)
    close("exponential decay", walk.points, jnp.exp(-rates * walk.times[:, None]), 1e-5)


@pytest.mark.quick
def test_save_times_and_their_points():
    times = [0.03, 0.2, 0.21, 0.5]
    walk = follow(START, save_times=times)
    equal("times", np.asarray(walk.times).tolist(), [0.0, *times])
    expected = jax.jit(jax.vmap(descent, (None, 0)))(START, walk.times)
    close("points between steps", walk.points, expected, 1e-5)
    radii = np.linalg.norm(walk.points, axis=1)
    at_most("they lie on the manifold", np.max(np.abs(radii - 1)), 1e-12)


def test_save_times_inside_jit():
    """Arrays that are known while tracing, and a traced end whose multiples round above it."""
    times = jnp.linspace(0.1, 0.5, 3)
    walk = jax.jit(lambda x: mf.solve(BOWL, x, end_time=0.5, save_times=times).times)(START)
    close("times", walk[1:], times, 1e-15)
    end = lambda t: mf.solve(BOWL, START, end_time=t, num_saves=10, throw=False).times[-1]
    equal("last time", float(jax.jit(end)(0.1)), 0.1)


@pytest.mark.quick
def test_the_start_is_projected():
    walk = follow(1.1 * START)
    close("from off the sphere", walk.final, descent(START, 0.5), 1e-5)


def test_single_precision_stays_single():
    start = START.astype(jnp.float32)
    walk = mf.solve(FLOW, start, end_time=0.5)
    dtypes = {leaf.dtype for leaf in (walk.points, walk.times, walk.final)}
    equal("dtypes", dtypes, {jnp.dtype("float32")})
    close("float32", walk.final, descent(START, 0.5), 2e-3)


def quietly(start):
    return follow(start, throw=False)


@functools.cache
def members():
    """Three starts, and the walks from them all in one program."""
    starts = jnp.stack([START, jnp.zeros(3), jnp.array([0.0, -0.6, 0.8])])
    return starts, jax.jit(jax.vmap(quietly))(starts)


def test_jit_and_vmap_and_one_failed_member():
    """The sphere has no normal space at the origin; that member alone fails."""
    starts, walks = members()
    fine = np.asarray(walks.result == mf.RESULTS.successful)
    equal("successful", fine.tolist(), [True, False, True])
    assert np.all(np.isnan(walks.points[1, 1:])), walks.points[1]
    compiled = jax.jit(quietly)
    for i in (0, 2):
        eager = quietly(starts[i]).points
        close(f"vmap against loop, member {i}", walks.points[i], eager, 1e-6)
        close(f"jit against eager, member {i}", compiled(starts[i]).points, eager, 1e-9)


def test_failures_are_named():
    walk = follow(START, max_steps=2, throw=False)
    assert bool(walk.result == mf.RESULTS.max_steps_reached), walk.result
    assert bool(jnp.all(jnp.isnan(walk.points[-1]))) and bool(jnp.all(jnp.isnan(walk.final)))
    close("the start is still there", walk.points[0], START, 1e-12)
    with refused(eqx.EquinoxRuntimeError, "max_steps"):
        jax.block_until_ready(follow(START, max_steps=2).final)
    with refused(eqx.EquinoxRuntimeError, "derivative has full rank"):
        jax.block_until_ready(follow(jnp.zeros(3)).final)


def test_fixed_steps_that_run_into_infinity_are_a_failure():
    loss = mf.FunctionLoss(lambda x: -jnp.sum(x**4))
    walk = mf.solve(mf.GradientFlow(loss), jnp.ones(2), end_time=5.0, step_size=0.1, throw=False)
    assert bool(walk.result == mf.RESULTS.nonfinite), walk.result


num_traces = 0


def counted_predict(point, x):
    global num_traces
    num_traces += 1
    return jnp.dot(x, point**3)


def test_new_data_of_the_same_shapes_do_not_retrace():
    def run(seed, std, end_time, rtol):
        x, y = jr.normal(jr.key(seed), (2, 4)), jr.normal(jr.key(seed + 1), (2,))
        loss = mf.LeastSquares(x, y, predict=counted_predict)
        flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=std, batch_size=1))
        start = mf.limit_map(loss, jnp.ones(4) + 0.1 * seed)
        return mf.solve(flow, start, end_time=end_time, rtol=rtol).final

    first = run(0, 1.0, 0.1, 1e-6)
    before = num_traces
    assert before > 0, "the counter does not count"
    second = run(3, 0.5, 0.2, 1e-5)
    equal("traces of predict in the second call", num_traces - before, 0)
    at_least("the second call has its own answer", norm(first - second), 1e-3)


def test_until_a_predicate():
    walk = mf.solve(FLOW, START, end_time=5.0, num_saves=50, until=lambda x: height(x) < 0)
    assert bool(walk.result == mf.RESULTS.stopped_early) and bool(walk.is_successful), walk.result
    assert float(height(walk.final)) < 0, f"height at the end {height(walk.final)}"
    heights = np.asarray(walk.points) @ (3 * zoo.POLE)
    stopped = int(np.argmax(heights < 0))
    assert 0 < stopped < 25, f"stopped at save {stopped}: {heights}"
    tail, times = np.asarray(walk.points[stopped + 1 :]), np.asarray(walk.times)
    at_most("remaining saves repeat the final point", np.max(np.abs(tail - walk.final)), 1e-12)
    at_most("and its time", np.max(times) - times[stopped + 1], 1e-12)


def test_until_stationary():
    until = mf.Stationary(1e-3)
    walk = mf.solve(FLOW, START, end_time=1e3, num_saves=3, until=until, observe={"h": height})
    speed = norm(jax.jit(FLOW.drift)(walk.final))
    at_most("speed at the end", speed, 1e-3)
    at_least("speed at the end", speed, 1e-6)
    at_most("time at the end", walk.times[-1], 10.0)
    close("observables are repeated too", walk.observables["h"][-1], height(walk.final), 1e-9)


def test_progress_gets_every_save_in_order():
    rows = []
    walk = mf.solve(
        FLOW, START, end_time=0.5, num_saves=5, observe={"h": height}, progress=rows.append
    )
    jax.effects_barrier()
    close("times of the rows", jnp.asarray([row["time"] for row in rows]), walk.times, 1e-12)
    close(
        "observables of the rows",
        jnp.asarray([row["h"] for row in rows]),
        walk.observables["h"],
        1e-12,
    )


def test_diffrax_progress_meters(capsys):
    mf.solve(FLOW, START, end_time=0.5, progress=True)
    jax.effects_barrier()
    assert "100.00%" in capsys.readouterr().out


# --- checkpoints ---------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import conftest
from test_flows import checkpointed

def progress(row):
    if row["time"] > 0.25:  # that is 0.3, whichever way it is rounded
        os.kill(os.getpid(), signal.SIGKILL)

checkpointed({file!r}, progress)
"""


def checkpointed(file, progress=False, start=START, num_saves=5):
    return mf.solve(
        FLOW, start, end_time=0.5, num_saves=num_saves, observe={"h": height},
        progress=progress, checkpoint=file,
    )  # fmt: skip


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    file = os.fspath(tmp_path / "run.npz")
    laws = os.path.dirname(os.path.abspath(__file__))
    script = KILLED.format(paths=[laws, os.path.dirname(laws)], file=file)
    done = processes.Running(["-c", script]).finished()
    equal(f"exit of the killed run {done.stderr[-500:]}", done.returncode, -signal.SIGKILL)
    time, point = mf.load_checkpoint(file, START)
    assert 0.1 - 1e-9 <= float(time) <= 0.3 + 1e-9, f"time in the file: {time}"
    close("the point in the file", point, descent(START, time), 1e-5)
    resumed, whole = checkpointed(file), checkpointed(os.fspath(tmp_path / "whole.npz"))
    close("times", resumed.times, whole.times, 1e-12)
    close("points", resumed.points, whole.points, 1e-5)
    close("observables", resumed.observables["h"], whole.observables["h"], 1e-5)
    at_most(
        "fewer steps than the whole run", resumed.stats["num_steps"], whole.stats["num_steps"] - 1
    )
    time, point = mf.load_checkpoint(file, START)
    close("the file ends at the end", point, whole.final, 1e-5)
    again = checkpointed(file)
    close("a finished run", again.points, resumed.points, 1e-9)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = os.fspath(tmp_path / "run")
    checkpointed(file)
    with refused(ValueError, "another start", "Delete it"):
        checkpointed(file, start=-START)
    with refused(ValueError, "other save times"):
        checkpointed(file, num_saves=4)
    with refused(ValueError, "another structure"):
        mf.load_checkpoint(file + ".npz", {"x": START, "y": START})
    with refused(ValueError, "outside jit"):
        jax.jit(lambda x: checkpointed(file, start=x).final)(START)


def test_a_checkpoint_is_read_by_the_name_it_was_given(tmp_path):
    file = os.fspath(tmp_path / "run")
    walk = checkpointed(file)
    close(
        "load_checkpoint without the suffix", mf.load_checkpoint(file, START)[1], walk.final, 1e-6
    )


def test_a_solution_is_an_output_of_jit_and_vmap():
    starts, walks = members()
    equal("shape of the points", walks.points.shape, (3, 5, 3))
    close("batched final points", walks.final[2], descent(starts[2], 0.5), 1e-5)
    equal(
        "names in stats",
        sorted(walks.stats),
        sorted(["num_steps", "num_rejected", "num_gradients", "num_factorizations", "max_defect"]),
    )
    counts = np.asarray(walks.stats["num_factorizations"])
    at_least("factorisations of those that arrived", np.min(counts[[0, 2]]), 1)
