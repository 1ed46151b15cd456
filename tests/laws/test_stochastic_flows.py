"""Stochastic flows: two drivers, one Solution; keys, saves, failures, bad input."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused

sphere = mf.LevelSet(lambda p: jnp.sum(p["x"] ** 2) - 1)
START = {"x": jnp.array([0.6, 0.0, 0.8]), "name": "kept"}
FLOW = mf.BrownianMotion(sphere)


def solved(**options):
    options = dict(end_time=1.0, num_saves=4, step_size=0.05, key=jr.key(0)) | options
    return mf.solve(FLOW, START, **options)


def test_saves_are_steps_and_lie_on_the_manifold():
    for solver in (None, dfx.EulerHeun()):
        walk = solved(solver=solver)
        close("times", walk.times, jnp.linspace(0, 1, 5), 1e-12)
        radii = jnp.linalg.norm(walk.points["x"], axis=1)
        at_most("distance from the sphere", jnp.max(jnp.abs(radii - 1)), 1e-12)
        equal("steps", int(walk.stats["num_steps"]), 20)
        equal("what rides along", walk.final["name"], "kept")
        close("the last save is the end", walk.points["x"][-1], walk.final["x"], 1e-12)


def test_save_times_that_end_early():
    """The path goes on to end_time, in steps no longer than asked."""
    walk = solved(save_times=jnp.array([0.3, 0.4]))
    equal("saves", walk.times.shape, (3,))
    equal("steps: six for the longest leg, in each of three", int(walk.stats["num_steps"]), 36)
    assert float(jnp.linalg.norm(walk.points["x"][-1] - walk.final["x"])) > 1e-3


def test_the_number_of_saves_does_not_change_the_path():
    few, many = solved(num_saves=1), solved(num_saves=20)
    close("end", few.final["x"], many.final["x"], 1e-12)


@pytest.mark.quick
def test_same_key_same_path_and_vmap_is_a_loop():
    keys = jr.split(jr.key(3), 3)
    end = lambda key: solved(key=key, throw=False).final["x"]
    batched = jax.jit(jax.vmap(end))(keys)
    for index, key in enumerate(keys):
        close("vmap against loop", batched[index], end(key), 1e-12)
    assert float(jnp.linalg.norm(batched[0] - batched[1])) > 1e-2, "two keys gave one path"


def test_observables_and_early_end():
    walk = solved(observe={"height": lambda p: p["x"][2]}, until=lambda p: p["x"][2] < 0.5)
    assert walk.result == mf.RESULTS.stopped_early, walk.result
    close("observed", walk.observables["height"], walk.points["x"][:, 2], 1e-12)
    assert float(walk.observables["height"][-1]) < 0.5
    assert float(walk.times[-1]) < 1.0


def test_checkpoint_goes_on_bitwise(tmp_path):
    class Killed(Exception):
        pass

    def kill(row):
        if float(row["time"]) > 0.45:
            raise Killed

    whole = solved()
    path = tmp_path / "walk.npz"
    with pytest.raises(Exception, match="Killed|callback"):
        jax.block_until_ready(solved(checkpoint=path, progress=kill).final["x"])
    resumed = solved(checkpoint=path)
    equal("same bits", resumed.points["x"].tobytes(), whole.points["x"].tobytes())


def test_no_retracing():
    traces = []

    def fn(p):
        traces.append(None)
        return jnp.sum(p["x"] ** 2) - 1

    flow = mf.BrownianMotion(mf.LevelSet(fn))
    for seed in range(2):
        mf.solve(flow, START, end_time=1.0, key=jr.key(seed))
        count = len(traces) if seed == 0 else count  # noqa: F821
    equal("traces after another key", len(traces), count)


def test_sgd_diffusion_is_an_ornstein_uhlenbeck_process():
    """dX = −X/η dt + dW: stationary variance η/2, met by Euler at η/(2 − h/η)."""
    rate, step = 0.2, 0.02
    flow = mf.SGDDiffusion(
        mf.FunctionLoss(lambda p: 0.5 * jnp.sum(p**2)), mf.IsotropicNoise(), rate
    )
    run = lambda key: (
        mf.solve(flow, jnp.zeros(500), end_time=2.0, step_size=step, key=key, throw=False).final
    )
    final = run(jr.key(0))
    variance, expected = float(jnp.var(final)), rate / (2 - step / rate)
    at_most(
        "|variance/expected − 1|, standard errors",
        abs(variance / expected - 1) * (500 / 2) ** 0.5,
        4,
    )


def test_unstable_steps_say_so():
    flow = mf.SGDDiffusion(
        mf.FunctionLoss(lambda p: 0.25 * jnp.sum(p**4)), mf.IsotropicNoise(100.0), 0.01
    )
    walk = mf.solve(flow, jnp.ones(3), end_time=1.0, step_size=0.1, key=jr.key(0), throw=False)
    assert walk.result == mf.RESULTS.nonfinite, walk.result
    assert bool(jnp.all(jnp.isnan(walk.final)))


def test_isotropic_noise_walks_the_zero_loss_manifold():
    """The general limit: on the manifold, adaptive or not, and differentiable in its drift."""
    model = eqx.nn.MLP(2, "scalar", 4, 1, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(jr.normal(jr.key(1), (3, 2)), jnp.array([0.1, -0.2, 0.3]))
    manifold = mf.ZeroLossManifold(loss)
    flow = mf.LimitDiffusion(manifold, mf.IsotropicNoise(0.3))
    start = manifold.project(model)
    walk = mf.solve(flow, start, end_time=0.1, step_size=0.02, key=jr.key(2))
    at_most("loss at the end", loss(walk.final), 1e-12)
    moved = jax.tree.leaves(walk.points)[0]
    assert float(jnp.linalg.norm(moved[-1] - moved[0])) > 1e-2


def test_bad_input():
    with refused(ValueError, "stochastic", "key=jax.random.key"):
        mf.solve(FLOW, START, end_time=1.0)
    with refused(ValueError, "neither as an Itô nor as a Stratonovich"):
        solved(solver=dfx.Tsit5())
    with refused(ValueError, "adaptive steps", "HalfSolver"):
        solved(rtol=1e-3)
    with refused(ValueError, "concrete numbers"):
        jax.jit(lambda t: solved(end_time=t).final["x"])(1.0)
    everything = mf.LevelSet(lambda p: p["x"] - 1)
    with refused(ValueError, "dimension 0"):
        mf.solve(mf.BrownianMotion(everything), START, end_time=1.0, key=jr.key(0))
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, FLOW.diffusion(START).in_structure(), jr.key(0))
    with refused(ValueError, "Heun solves stratonovich", "ito form"):
        terms = FLOW.terms(START, path, form="ito")
        solver = mf.Projected(dfx.Heun(), sphere, like=START)
        dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, FLOW.split(START)[0])
    with refused(ValueError, "stochastic", "VirtualBrownianTree"):
        FLOW.terms(START)
    with refused(ValueError, "deterministic", "path"):
        mf.GradientFlow(mf.FunctionLoss(lambda p: p["x"] @ p["x"])).terms(START, path)


def test_adaptive_steps_where_asked_for():
    """Reproducible in law only; here that they end on the saves and on the manifold."""
    walk = solved(solver=dfx.HalfSolver(dfx.EulerHeun()), rtol=1e-2, atol=1e-2, step_size=None)
    radii = jnp.linalg.norm(walk.points["x"], axis=1)
    at_most("distance from the sphere", jnp.max(jnp.abs(radii - 1)), 1e-12)
    assert int(walk.stats["num_rejected"]) > 0
