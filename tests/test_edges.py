"""Where types, times and files are not quite what was meant: never a silent wrong answer."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import checks
import manifoldflow as mf
from checks import at_least, at_most, close, equal
from manifoldflow.__main__ import main

SPHERE = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
START = jnp.array([0.6, 0.8, 0.0])


def predict(point, x):
    return jnp.tanh(x @ point["w"]) @ point["b"]


def problem(dtype=jnp.float64):
    inputs, targets = jr.normal(jr.key(0), (3, 4)), jr.normal(jr.key(1), (3,))
    point = {"w": jr.normal(jr.key(2), (4, 6)), "b": jr.normal(jr.key(3), (6,))}
    return inputs, targets, jax.tree.map(lambda leaf: leaf.astype(dtype), point)


def test_complex_numbers_are_not_cut():
    inputs, targets, point = problem()
    with pytest.raises(ValueError, match="one real array"):
        mf.LeastSquares(inputs, targets + 1j, predict=predict)
    loss = mf.LeastSquares(inputs + 1j, targets, predict=lambda p, x: predict(p, jnp.abs(x)))
    plain = mf.LeastSquares(jnp.abs(inputs + 1j), targets, predict=predict)
    checks.close("complex inputs ride along", loss(point), plain(point), 1e-12)
    complex_output = mf.LeastSquares(inputs, targets, predict=lambda p, x: predict(p, x) + 0j)
    with pytest.raises(ValueError, match="complex"):
        complex_output(point)
    with pytest.raises(ValueError, match="real"):
        SPHERE.tangent_projection(START, START + 1j)


def test_mixed_precision_points():
    inputs, targets, point = problem()
    loss = mf.LeastSquares(inputs, targets, predict=predict)
    mixed = {"w": point["w"].astype(jnp.float32), "b": point["b"]}
    landed = mf.ZeroLossManifold(loss).project(mixed)
    assert landed["w"].dtype == jnp.float32 and landed["b"].dtype == jnp.float64
    checks.at_most("loss where float32 leaves land", loss(landed), 1e-12)
    checks.at_most("loss at their limit", loss(mf.limit_map(loss, mixed)), 1e-12)


def test_half_precision_is_refused():
    inputs, targets, point = problem(jnp.bfloat16)
    loss = mf.LeastSquares(inputs, targets, predict=predict)
    with pytest.raises(ValueError, match="float32 or float64; got bfloat16"):
        mf.ZeroLossManifold(loss).project(point)


def test_time_runs_forwards_under_jit():
    flow = mf.RiemannianGradientFlow(SPHERE, lambda p: p[0])
    solve = eqx.filter_jit(lambda t: mf.solve(flow, START, end_time=t, throw=False))
    for end_time in (-1.0, 0.0):
        walk = solve(jnp.asarray(end_time))
        assert walk.result == mf.RESULTS.bad_end_time, f"{end_time}: {walk.result}"
        assert not np.isfinite(walk.final).any(), f"{end_time}: a final point {walk.final}"
    assert solve(jnp.asarray(1.0)).result == mf.RESULTS.successful


def test_failed_members_have_no_gradient():
    """A derivative of zero would pass for a stationary point."""

    def height(level):
        sphere = mf.LevelSet(jax.tree_util.Partial(lambda a, p: jnp.sum(p**2) - a, level))
        return jnp.sum(sphere.project(jnp.ones(3), throw=False))

    slopes = jax.vmap(jax.grad(height))(jnp.array([1.0, -1.0, 4.0]))
    expected = jnp.sqrt(3) / 2 / jnp.sqrt(jnp.array([1.0, 4.0]))
    checks.close("d/da √(3a)", slopes[jnp.array([0, 2])], expected, 1e-9)
    assert np.isnan(slopes[1]), f"an empty sphere has derivative {slopes[1]}"


def test_a_checkpoint_knows_its_flow_and_observables(tmp_path):
    path = tmp_path / "new folder" / "walk"
    flow = mf.RiemannianGradientFlow(SPHERE, lambda p: p[0])
    first = mf.solve(flow, START, end_time=1.0, checkpoint=path)
    again = mf.solve(flow, START, end_time=1.0, checkpoint=path)
    checks.close("a finished walk, asked for again", again.final, first.final, 1e-12)
    other = mf.RiemannianGradientFlow(SPHERE, lambda p: -p[0])
    with pytest.raises(ValueError, match="another flow"):
        mf.solve(other, START, end_time=1.0, checkpoint=path)
    with pytest.raises(ValueError, match="other observables"):
        mf.solve(flow, START, end_time=1.0, checkpoint=path, observe={"x": lambda p: p[0]})


def test_numbers_of_any_type_do_not_retrace():
    inputs, targets, point = problem()
    traces = []

    def counted(point, x):
        traces.append(1)
        return predict(point, x)

    loss = mf.LeastSquares(inputs, targets, predict=counted)
    manifold = mf.ZeroLossManifold(loss)
    start = manifold.project(point)

    def walk(std, tolerance):
        flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std))
        mf.solve(flow, start, end_time=0.1, until=mf.Stationary(tolerance))
        mf.limit_map(loss, point, rtol=tolerance)

    walk(1.0, 1e-3)
    count = len(traces)
    walk(2, 2e-3)
    checks.equal("traces after the first call", len(traces) - count, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "tsit5"}, "Diffrax solver"),
        ({"progress": "yes"}, "progress must be"),
        ({"max_steps": 0}, "max_steps must be a positive integer"),
        ({"observe": [1]}, "observe must map names"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"end_time": jnp.ones(2)}, "one number"),
    ],
)
def test_wrong_options(options, words):
    flow = mf.RiemannianGradientFlow(SPHERE, lambda p: p[0])
    with checks.refused(ValueError, words, wrong_type=True):
        mf.solve(flow, START, **{"end_time": 1.0, **options})


def test_other_wrong_objects():
    with pytest.raises(ValueError, match="positive integer"):
        mf.MinimizerManifold(mf.FunctionLoss(jnp.sum), 1.5)
    with pytest.raises(ValueError, match="minim"):
        quartic = lambda f, y: jnp.sum((f - y) ** 4)
        mf.ZeroLossManifold(mf.PerExampleLoss(jnp.ones((3, 2)), jnp.ones((3, 1)), quartic))
    with pytest.raises(ValueError, match="scale must be positive"):
        mf.LeastSquares(jnp.ones((3, 2)), jnp.ones(3), scale=0.0)
    with checks.refused(ValueError, "residuals", wrong_type=True):
        mf.explain(mf.FunctionLoss(jnp.sum), START)


def test_signs_are_two_classes(tmp_path, capsys):
    inputs = np.random.default_rng(0).normal(size=(12, 3))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=np.where(inputs[:, 0] > 0, 1, -1))
    options = ["--examples", "6", "--width", "1", "--data", str(tmp_path / "data.npz")]
    assert main([*options, "--out", str(tmp_path)]) == 2  # too narrow, said after counting
    out, err = capsys.readouterr()
    assert "2 classes" in out and re.search(r"12 residuals", err), (out, err)


def test_the_other_throw_compiles_nothing():
    traced = []

    def circle(x):
        traced.append(1)
        return jnp.sum(x**2) - 1

    manifold = mf.LevelSet(circle)
    flow = mf.RiemannianGradientFlow(manifold, height)
    on, v = jnp.array([0.6, 0.8]), jnp.array([0.08, -0.06])
    ways = {
        "project": lambda throw: manifold.project(2 * on, throw=throw),
        "retract": lambda throw: manifold.retract(on, v, throw=throw),
        "limit_map": lambda throw: mf.limit_map(manifold, 2 * on, throw=throw),
        "exponential_map": lambda throw: mf.exponential_map(manifold, on, v, throw=throw),
        "minimize": lambda throw: mf.minimize(manifold, height, on, throw=throw),
        "solve": lambda throw: mf.solve(flow, on, end_time=0.1, throw=throw),
    }
    for name, way in ways.items():
        way(True)
        before = len(traced)
        way(False)
        equal(f"traces of {name} with the other throw", len(traced), before)


def test_steps_end_on_the_saves():
    """No save is interpolated: each is a landed end of a step, with equal steps between two."""
    flow = mf.RiemannianGradientFlow(mf.LevelSet(lambda x: jnp.sum(x**2) - 1), height)
    start = jnp.array([0.6, 0.8])
    walk = mf.solve(flow, start, end_time=0.5, save_times=[0.1, 0.25, 0.5], step_size=0.1)
    equal("steps", int(walk.stats["num_steps"]), 1 + 2 + 3)
    defects = jax.vmap(lambda x: jnp.abs(jnp.linalg.norm(x) - 1))(walk.points)
    at_most("defects of the saves", defects.max(), 1e-14)
    many = mf.solve(flow, start, end_time=0.5, num_saves=50)
    at_least("steps", int(many.stats["num_steps"]), 50)
    close("the last save is the end", many.points[-1], many.final, 1e-14)
    # With θ = (cos a, sin a): a' = −cos a.
    angle = lambda t: 2 * jnp.arctan(jnp.tanh((t0 - t) / 2))
    t0 = 2 * jnp.arctanh(jnp.tan(jnp.arcsin(0.8) / 2))
    close("heights", many.points[:, 1], jnp.sin(angle(many.times)), 1e-5)
    whole = mf.solve(flow, start, end_time=0.5).final
    close("as without saves", many.final, whole, 1e-5)


def height(x):
    return x[1]
