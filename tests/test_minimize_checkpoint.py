"""A search that was cut off goes on to the last bit as if it had not been."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import manifoldflow as mf
from checks import close, equal, refused
from manifoldflow.optimize import RiemannianGradientDescent, RiemannianOptax
from sgd_runs import same_bits

SPHERE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
START = jnp.array([0.5, 0.6, -0.3, 0.7, 0.4, -0.2])
WEIGHTS = jnp.array([1.0, 2.0, 10.0, 30.0, 100.0, 300.0])
METHODS = {
    "trust region": mf.optimize.RiemannianTrustRegion(initial_radius=1e-3, max_products=1),
    "descent": RiemannianGradientDescent(),
    "adam": RiemannianOptax(optax.adam(0.02)),
}


def quartic(p):
    return jnp.sum(WEIGHTS * (p**4 + p**2))


class Cut(Exception):
    pass


def searched(name, file=None, fn=quartic, start=START, manifold=SPHERE, **options):
    options = {"gradient_tolerance": 1e-6, "observe": {"x": lambda p: p[0]}, **options}
    options.setdefault("method", METHODS[name])
    return mf.minimize(manifold, fn, start, checkpoint=file, **options)


def cut_at(number):
    """A progress function that ends the program at its call `number`."""
    rows = []

    def progress(row):
        rows.append(row)
        if len(rows) == number:
            raise Cut

    return progress


def same_search(value, expected):
    for name in ("final", "points", "observables", "times"):
        same_bits(name, getattr(value, name), getattr(expected, name))
    same_bits("stats", dict(value.stats), dict(expected.stats))
    assert value.result == expected.result, (value.result, expected.result)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_that_was_cut_off_goes_on_to_the_last_bit(tmp_path, name):
    whole = searched(name, tmp_path / "whole")
    assert int(whole.stats["num_steps"] + whole.stats["num_rejected"]) > 16, whole.stats
    file = tmp_path / "run"
    for call in (2, 1):
        with pytest.raises(Cut):
            searched(name, file, progress=cut_at(call))
        time, point = mf.load_checkpoint(file, START)
        assert 0 < float(time) < float(whole.times[-1]), f"time in the file: {time}"
        assert float(SPHERE.defect(point)) < 1e-12
    calls = []
    same_search(searched(name, file, progress=calls.append), whole)
    assert {"time", "coordinates", "value", "gradient_norm", "x"} == set(calls[-1])
    same_search(searched(name, file, progress=calls.append), whole)
    equal("what has ended is not begun anew", float(calls[-1]["time"]), float(whole.times[-1]))
    same_bits("the point in the file", mf.load_checkpoint(file, START)[1], whole.final)
    plain = searched(name)
    close("without a file", whole.final, plain.final, 1e-5)
    close("the start", whole.points[0], plain.points[0], 1e-15)
    assert whole.result == plain.result == mf.RESULTS.successful


def test_what_fails_is_told_and_can_go_on(tmp_path):
    whole = searched("descent", tmp_path / "whole", progress=True)
    file = tmp_path / "run"
    with pytest.raises(eqx.EquinoxRuntimeError, match="max_steps"):
        searched("descent", file, max_steps=11)
    lost = searched("descent", file, max_steps=11, throw=False)
    assert lost.result == mf.RESULTS.max_steps_reached and np.isnan(lost.final).all()
    equal("attempts", int(lost.stats["num_steps"] + lost.stats["num_rejected"]), 11)
    equal("stored", float(mf.load_checkpoint(file, START)[0]) <= 8, True)
    same_search(searched("descent", file), whole)
    nowhere = searched("descent", tmp_path / "nowhere", start=jnp.zeros(6), throw=False)
    assert nowhere.result == mf.RESULTS.rank_zero and np.isnan(nowhere.points).all()
    assert not (tmp_path / "nowhere.npz").exists(), "a start that there is not was written"
    there = searched("descent", tmp_path / "there", start=jnp.eye(6)[0])
    equal("steps from a stationary start", int(there.stats["num_steps"]), 0)
    with refused(ValueError, "outside jit"):
        jax.jit(lambda x: searched("descent", file, start=x).final)(START)


def test_the_checkpoint_of_another_search_is_refused(tmp_path):
    file = tmp_path / "run"
    searched("descent", file, max_steps=8, throw=False)
    for options, words in (
        ({"start": 1.1 * START}, "another start"),
        ({"gradient_tolerance": 1e-7}, "another gradient_tolerance"),
        ({"fn": lambda p: 1.01 * quartic(p)}, "another function"),
        ({"manifold": mf.LevelSet(lambda p: jnp.sum(p**2) - 1.01)}, "another manifold"),
        ({"method": METHODS["adam"]}, "another method"),
        ({"method": METHODS["trust region"]}, "another method"),
        ({"observe": {"x": lambda p: p[1]}}, "another observable 'x'"),
        ({"observe": {"y": lambda p: p[0]}}, "other observables"),
    ):
        with refused(ValueError, words, "Delete it, or give this search another file."):
            searched("descent", file, **options)
    searched("adam", tmp_path / "adam", max_steps=8, throw=False)
    with refused(ValueError, "another method"):
        searched("adam", tmp_path / "adam", method=RiemannianOptax(optax.adam(0.021)))
    with refused(ValueError, "a checkpoint of `minimize`, not a checkpoint of `solve`"):
        mf.solve(mf.RiemannianGradientFlow(SPHERE, quartic), START, end_time=1.0, checkpoint=file)
    content = (tmp_path / "run.npz").read_bytes()
    (tmp_path / "run.npz").write_bytes(content[:-300])
    with refused(ValueError, "cut off or damaged", "`minimize`", "Delete it"):
        searched("descent", file)
    with refused(ValueError, "path of an .npz file", "manifoldflow[orbax]"):
        searched("descent", 3)


def test_orbax_keeps_a_search(tmp_path):
    import orbax.checkpoint as orbax

    whole = searched("adam", tmp_path / "whole")
    with orbax.CheckpointManager(tmp_path / "run") as manager:
        with refused(OSError, "no checkpoint", "another folder"):
            mf.load_checkpoint(manager, START)
        with pytest.raises(Cut):
            searched("adam", manager, progress=cut_at(3))
        same_search(searched("adam", manager), whole)
        with refused(ValueError, "another gradient_tolerance"):
            searched("adam", manager, gradient_tolerance=1e-3)
        time, point = mf.load_checkpoint(manager, START)
        same_bits("point", point, whole.final)
        equal("time", float(time), float(whole.times[-1]))
