"""A solve that was cut off goes on to the last bit as if it had not been."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import close, equal, refused
from sgd_runs import same_bits

LOSS = mf.FunctionLoss(lambda p: 0.5 * p[0] ** 2 + p[1] ** 2)
GRADIENT = mf.GradientFlow(LOSS)
NOISY = mf.SGDDiffusion(LOSS, mf.IsotropicNoise(0.3), 0.1)
START = jnp.array([1.0, 0.5])
CASES = {
    "adaptive": (GRADIENT, {"num_saves": 4}),
    "stops early": (GRADIENT, {"num_saves": 4, "step_size": 0.04, "until": lambda p: p[0] < 0.7}),
    "Brownian path": (NOISY, {"num_saves": 4, "solver": dfx.Euler(), "step_size": 0.02}),
    "walk with a way to go": (NOISY, {"save_times": [0.1, 0.15, 0.3], "step_size": 0.02}),
}


class Cut(Exception):
    pass


def solved(case, file=None, **options):
    flow, own = CASES[case]
    own = {"end_time": 0.5, "key": jr.key(0), "observe": {"x": lambda p: p[0]}, **own}
    return mf.solve(flow, START, checkpoint=file, **{**own, **options})


def cut_at(number):
    """A progress function that ends the program at its call `number`."""
    calls = []

    def progress(row):
        calls.append(row)
        if len(calls) == number:
            raise Cut

    return progress


def same_solve(value, expected):
    for name in ("final", "points", "observables", "times"):
        same_bits(name, getattr(value, name), getattr(expected, name))
    assert value.result == expected.result


@pytest.mark.parametrize("case", CASES)
def test_a_solve_that_was_cut_off_goes_on_to_the_last_bit(tmp_path, case):
    whole = solved(case, tmp_path / "whole")
    file = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Cut):
            solved(case, file, progress=cut_at(2))
    rest = solved(case, file)
    same_solve(rest, whole)
    same_solve(solved(case, file), whole)
    fewer = int(rest.stats["num_steps"]) < int(whole.stats["num_steps"])
    assert fewer, "the solve did not go on, but began anew"
    if case in ("adaptive", "walk with a way to go"):
        plain = solved(case)
        close("without a file", whole.points, plain.points, 1e-5)
        close("final", whole.final, plain.final, 1e-5)
        assert whole.result == plain.result


def test_what_fails_is_told_and_can_go_on(tmp_path):
    whole = solved("adaptive", tmp_path / "whole", progress=True)
    file, most = tmp_path / "run", int(whole.stats["num_steps"]) // 2
    with pytest.raises(eqx.EquinoxRuntimeError, match="max_steps"):
        solved("adaptive", file, max_steps=most)
    lost = solved("adaptive", tmp_path / "lost", max_steps=most, throw=False)
    assert lost.result == mf.RESULTS.max_steps_reached
    reached = np.isfinite(lost.points).all(axis=1).tolist()
    equal("saves", reached, sorted(reached, reverse=True))
    assert any(reached) and not all(reached) and np.isnan(lost.final).all()
    same_solve(solved("adaptive", file), whole)
    with refused(ValueError, "outside jit"):
        eqx.filter_jit(lambda x: mf.solve(GRADIENT, x, end_time=1.0, checkpoint=file))(START)


def test_more_saves_go_on_from_fewer(tmp_path):
    times = [0.1, 0.2, 0.4]
    some = {"num_saves": 1, "save_times": times[:2], "end_time": 0.2}
    solved("adaptive", tmp_path / "run", **some)
    options = {"save_times": times, "end_time": 0.4}
    whole = solved("adaptive", tmp_path / "whole", **options)
    same_solve(solved("adaptive", tmp_path / "run", **options), whole)
    back = solved("adaptive", tmp_path / "run", **some)
    same_bits("points", back.points, whole.points[:3])


def test_orbax_keeps_a_solve(tmp_path):
    import orbax.checkpoint as orbax

    whole = solved("adaptive", tmp_path / "whole")
    with orbax.CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(Cut):
            solved("adaptive", manager, progress=cut_at(3))
        same_solve(solved("adaptive", manager), whole)
        with refused(ValueError, "another rtol"):
            solved("adaptive", manager, rtol=1e-3)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.stat().st_size > 20:
            path.write_bytes(path.read_bytes()[:15])
    with orbax.CheckpointManager(tmp_path / "run") as manager:
        with refused(ValueError, "Orbax", "another folder"):
            solved("adaptive", manager)
