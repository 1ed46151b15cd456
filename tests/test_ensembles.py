"""An ensemble is its members one by one, however they are batched, cut up and spread."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from processes import finished, start, two_reports

KEYS = jr.split(jr.key(3), 7)


def test_devices_and_chunks_change_nothing():
    """1, 2 and 8 devices, chunks of any size: the same numbers per member, no collectives."""
    report, out = finished(start("ensemble_programs.py", "devices", num_devices=8))
    equal("devices", report["devices"], 8)
    for name, gap in report["gaps"].items():
        at_most(f"{name}: difference from the members one by one", gap, 1e-12)
    for name, found in report["collectives"].items():
        assert found == [], f"{name}: collectives {found}"
    assert report["control"], "a sum over all members is a collective, and none was seen"
    reports = report["others"].pop("reports")
    equal("reports", reports, [{"done": n, "total": 19} for n in (7, 13, 19)])
    equal("lines with a percentage", [out.count(f"\n{n}.00%") for n in (50, 100)], [1, 1])
    for name, gap in report["others"].items():
        at_most(f"{name}: difference from one device", gap, 1e-12)


def test_two_processes():
    """Four devices of two processes give the numbers of one."""
    for report in two_reports("ensemble_programs.py"):
        equal("devices", report["devices"], 4)
        for name, gap in report["gaps"].items():
            at_most(f"{name}: difference from the members one by one", gap, 1e-12)


# --- one device ----------------------------------------------------------------------------


def draw(key, scale=1.0):
    return scale * jr.normal(key, (3,))


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 6, 7, 100])
def test_chunks(chunk_size):
    for keys in (KEYS, KEYS[:1], jr.split(jr.PRNGKey(3), 7)):
        found = mf.ensemble(draw, keys, jnp.asarray(2.0), chunk_size=chunk_size)
        assert isinstance(found, jax.Array)
        close("members", found, jnp.stack([draw(key, 2.0) for key in keys]), 1e-14)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_that_draw_by_the_batch(impl):
    """JAX gives such keys other numbers under vmap: one at a time, or not at all."""
    keys = jr.split(jr.key(3, impl=impl), 4)
    alone = jnp.stack([draw(key) for key in keys])
    assert not np.allclose(jax.vmap(draw)(keys), alone), "no need to refuse them any more"
    close("one at a time", mf.ensemble(draw, keys, chunk_size=1), alone, 1e-14)
    with refused(ValueError, impl, "depend on their chunk", "threefry2x32", "chunk_size=1"):
        mf.ensemble(draw, keys, chunk_size=2)


@pytest.mark.quick
def test_member_keys():
    """Member i has the key fold_in(key, i), whatever the size of the ensemble."""
    for key in (jr.key(5), jr.PRNGKey(5)):
        keys = mf.member_keys(key, 4)
        expected = jnp.stack([jr.fold_in(key, i) for i in range(4)])
        assert keys.dtype == key.dtype
        assert bool(jnp.all(keys == expected))
        assert bool(jnp.all(mf.member_keys(key, 9)[:4] == keys))


@pytest.mark.quick
def test_a_member_does_not_see_the_others():
    """Another batch, in another order, with other members: bitwise the same."""
    walk = lambda key: jnp.cumsum(jr.normal(key, (40,)))[-1]
    keys = mf.member_keys(jr.key(6), 12)
    whole = mf.ensemble(walk, keys, chunk_size=4)
    other = mf.ensemble(walk, keys[jnp.array([7, 2, 11])], chunk_size=4)
    assert (other == whole[jnp.array([7, 2, 11])]).all(), f"{other} in {whole}"


def test_repeated_calls_do_not_retrace():
    """New keys, data and fields of modules are new values, not new programs."""
    traces = []

    def fn(key, data, num_steps):
        traces.append(num_steps)
        return draw(key, data["scale"]) + num_steps

    class Walk(eqx.Module):
        scale: jax.Array

        def __call__(self, key):
            traces.append("module")
            return draw(key, self.scale)

    def bound(data, key):
        traces.append("partial")
        return draw(key, data)

    for i in range(3):
        keys, scale = mf.member_keys(jr.key(i), 6), np.full(3, 1.0 + i)
        for found in (
            mf.ensemble(fn, keys, {"scale": scale}, 2, chunk_size=2) - 2,
            mf.ensemble(Walk(jnp.asarray(scale)), keys, chunk_size=2),
            mf.ensemble(functools.partial(bound, jnp.asarray(scale)), keys, chunk_size=2),
        ):
            close("members", found, jnp.stack([draw(key, scale) for key in keys]), 1e-14)
    assert traces == [2, "module", "partial"], f"each traced once; got {traces}"
    mf.ensemble(fn, keys, {"scale": scale}, 3, chunk_size=2)
    assert traces[-1] == 3, "Python numbers are static, as a number of steps must be"


def walk(key, fatal_key):
    """Down a bowl from a random start; fails for one key."""
    flow = mf.GradientFlow(mf.FunctionLoss(lambda point: point @ point))
    point = jr.normal(key, (2,))
    point = jnp.where(jnp.all(jr.key_data(key) == fatal_key), jnp.nan, point)
    return mf.solve(
        flow,
        point,
        end_time=1.0,
        step_size=0.25,
        solver=dfx.Euler(),
        observe={"height": lambda x: x[0]},
        throw=False,
    )


def test_solutions_and_a_member_that_fails():
    """A Solution goes in and comes out; one failure is seen in that member only."""
    sound = mf.ensemble(walk, KEYS, jnp.zeros(2, jnp.uint32), chunk_size=3)
    found = mf.ensemble(walk, KEYS, jr.key_data(KEYS[4]), chunk_size=3)
    assert isinstance(found, mf.Solution)
    equal("shape", found.points.shape, (7, 2, 2))
    successful = eqx.filter_vmap(lambda solution: solution.is_successful)(found).tolist()
    equal("who arrived", successful, [True] * 4 + [False] + [True] * 2)
    heights, others = found.observables["height"], np.arange(7) != 4
    assert bool(jnp.all(jnp.isnan(found.final_coordinates[4])))
    assert bool(jnp.all(heights[others] == sound.observables["height"][others]))
    stats = mf.ensembles.statistics(found.observables)
    equal("left out and counted", (int(stats.num_failed), int(stats.count)), (1, 6))
    close("mean of those that arrived", stats.mean["height"], heights[others].mean(axis=0), 1e-14)


def test_results_of_every_kind():
    """Equinox modules, numbers and keys; what is no array rides along."""

    def fn(key):
        return eqx.nn.MLP(2, 1, 3, 1, activation=jnp.tanh, key=key), 3, 1.5, key, np.arange(2)

    model, three, number, keys, counts = mf.ensemble(fn, KEYS, chunk_size=3)
    equal("activation", model.activation, jnp.tanh)
    expected = eqx.filter_vmap(lambda model: model(jnp.ones(2)))(model)
    close("model", expected[2], fn(KEYS[2])[0](jnp.ones(2)), 1e-14)
    assert three.tolist() == [3] * 7 and number.tolist() == [1.5] * 7
    assert bool(jnp.all(keys == KEYS)) and counts.shape == (7, 2)


def test_under_jit_vmap_and_grad():
    run = lambda scale: mf.ensemble(draw, KEYS, scale, chunk_size=3)
    scales = jnp.array([1.0, 2.0])
    expected = jnp.stack([run(scale) for scale in scales])
    close("vmap of an ensemble", jax.vmap(run)(scales), expected, 1e-14)
    close("jit of an ensemble", jax.jit(run)(scales[1]), expected[1], 1e-14)
    slope = jax.grad(lambda scale: jnp.sum(run(scale) ** 2))(scales[1])
    close("gradient", slope, 2 * jnp.sum(expected[1] ** 2) / scales[1], 1e-14)


def test_progress(capsys):
    reports = []
    calls = {"done": reports.append, "meter": True, "other meter": dfx.TextProgressMeter(0.5)}
    expected = mf.ensemble(draw, KEYS)
    for progress in calls.values():
        found = mf.ensemble(draw, KEYS, chunk_size=2, progress=progress)
        close("members", found, expected, 1e-14)
        jax.effects_barrier()
    equal("reports", reports, [{"done": n, "total": 7} for n in (2, 4, 6, 7)])
    lines = capsys.readouterr().out.split()
    equal("lines", lines[:5], ["0.00%", "25.00%", "50.00%", "75.00%", "100.00%"])
    equal("lines of a coarse meter", lines[5:], ["0.00%", "75.00%", "100.00%"])


# --- what goes wrong is said ---------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_chunk_size_out_of_range(wrong):
    with refused(ValueError, "chunk_size must be a positive integer", wrong_type=True):
        mf.ensemble(draw, KEYS, chunk_size=wrong)


@pytest.mark.parametrize(
    "wrong", [jr.key(0), jr.PRNGKey(0), KEYS[None], jnp.arange(6.0), jnp.arange(6).reshape(3, 2)]
)
def test_keys_without_an_axis_of_members(wrong):
    with refused(ValueError, "one leading axis of members", "mf.member_keys"):
        mf.ensemble(draw, wrong)


def test_other_wrong_keys():
    with refused(ValueError, "the number of keys must be a positive integer"):
        mf.ensemble(draw, KEYS[:0])
    with refused(ValueError, "num_members must be a positive integer", wrong_type=True):
        mf.member_keys(jr.key(0), 0)
    with refused(ValueError, "leading axis of members", wrong_type=True):
        mf.ensemble(draw, 5)


def test_meshes_with_several_axes():
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    with refused(ValueError, "one axis", "('x', 'y')", "jax.make_mesh"):
        mf.ensemble(draw, KEYS, mesh=jax.sharding.Mesh(devices, ("x", "y")))
    with refused(ValueError, "jax.sharding.Mesh", wrong_type=True):
        mf.ensemble(draw, KEYS, mesh=8)


def test_functions_that_return_no_array():
    for fn in (lambda key: None, lambda key: "done", lambda key: {"activation": jnp.tanh}):
        with refused(ValueError, "at least one array", "stacked over the members"):
            mf.ensemble(fn, KEYS)
    with refused(ValueError, "fn must be a function", wrong_type=True):
        mf.ensemble("draw", KEYS)
    with refused(ValueError, "progress must be a bool", wrong_type=True):
        mf.ensemble(draw, KEYS, progress="yes")
