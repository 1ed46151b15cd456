"""Walks keep the outputs and lower what they are asked to; objectives are what they say."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, refused
from manifoldflow import walks

INPUTS = jr.normal(jr.key(1), (6, 3))
LABELS = jnp.arange(6) % 2
CROSS_ENTROPY = mf.PerExampleLoss(INPUTS, LABELS, lambda f, y: jax.nn.logsumexp(f) - f[y])
NETWORK = eqx.nn.MLP(3, 2, 8, 1, activation=jnp.tanh, key=jr.key(0))


def times(w, x):
    return w[0] * w[1] * x


def product(data=1.0):
    """w₀w₁x = 1: a hyperbola, whose shortest point is (1, 1)."""
    return mf.LeastSquares(jnp.full(1, data), jnp.ones(1), predict=times)


@functools.cache
def two_walks():
    """To the shortest point, from two starts at once."""
    walk = lambda start: mf.walk(product(), start, objective="weight_norm", stationarity=1e-4)
    return jax.jit(jax.vmap(walk))(jnp.array([[4.0, 0.25], [0.5, 2.0]]))


def fitted():
    """A network on its zero-loss manifold, and the loss."""
    loss = mf.LeastSquares(INPUTS, jnp.sin(2 * INPUTS[:, :2]))
    return loss, mf.ZeroLossManifold(loss).project(NETWORK)


@pytest.mark.parametrize("per", ["row", "channel", "tensor"])
def test_rounding_is_the_mean_rise_of_the_loss(per):
    """Over random offsets of the grids, of a linear model: there the loss is quadratic.

    In every grid one weight is the largest by far, so that its norm of order 32 is the maximum.
    Errors of one grid share an offset: they do not meet in G where inputs are orthogonal.
    """
    weights = jnp.array([[5.0, 1.0, 0.5], [4.0, -0.5, 0.3]])
    inputs = jnp.linalg.qr(INPUTS)[0]
    loss = mf.LeastSquares(inputs, inputs @ weights.T, predict=lambda w, x: w @ x)
    grid = walks.Rounding(5, per)
    risen = jax.vmap(lambda key: loss(grid.rounded(weights, key)))(jr.split(jr.key(3), 20_000))
    error = float(jnp.std(risen)) / len(risen) ** 0.5
    gap = abs(float(jnp.mean(risen)) - float(grid(loss, weights)))
    at_most(f"mean rise less F, F = {grid(loss, weights):.3e}", gap, 4 * error)


def test_rounding_is_half_the_diagonal_of_the_gauss_newton_matrix_times_the_variance():
    """Weights with one that is largest by far: there the norm of order 32 is the maximum."""
    loss, point = fitted()
    point = eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        point,
        [layer.weight.at[:, 0].set(5.0) for layer in point.layers],
    )
    squares = loss.jacobian(point).rows()
    expected = sum(
        float(jnp.sum((5.0 / 7) ** 2 / 12 * loss.scale * layer.weight**2)) / 2
        for layer in squares.layers
    )
    close("F", walks.Rounding(4, "row")(loss, point), expected, 1e-9)


def test_rounding_is_differentiated_in_the_step_as_well():
    loss, point = fitted()
    grid, step = walks.Rounding(4, "tensor"), 1e-5
    weight = point.layers[0].weight
    scaled = lambda scale: eqx.tree_at(lambda m: m.layers[0].weight, point, scale * weight)
    fn = lambda scale: grid(loss, scaled(scale))
    slope = jax.grad(fn)(1.0)
    close("dF", slope, (fn(1 + step) - fn(1 - step)) / (2 * step), 1e-6)


def test_rounding_keeps_vectors_and_zeros():
    point = {"w": jnp.array([[0.0, 0.0], [1.0, 0.3]]), "b": jnp.array([0.123]), "n": 3}
    found = walks.Rounding(3).rounded(point)
    close("w", found["w"], jnp.array([[0.0, 0.0], [1.0, 1 / 3]]), 1e-12)
    equal("b", found["b"].tolist(), [0.123])
    slope = jax.grad(lambda w: walks.Rounding(3)(zero_rows(), w))(point["w"])
    assert jnp.all(jnp.isfinite(slope)), slope


def test_objectives_of_ones_own():
    class LargestBias(walks.AbstractObjective):
        name = property(lambda self: "largest bias")

        def __call__(self, loss, point):
            return jnp.max(jnp.abs(point))

    found = mf.walk(product(), jnp.array([4.0, 0.25]), objective=LargestBias(), max_steps=2)
    assert walks.before_after(found).values["largest bias"][1] < 4


@pytest.mark.parametrize("objective", [walks.Flatness(), walks.LargestEigenvalue()])
def test_one_residual_has_one_eigenvalue(objective):
    """G = ∇f∇fᵀ: its trace and its largest eigenvalue are ‖∇f‖² = w₀² + w₁²."""
    close("objective", objective(product(), jnp.array([2.0, 0.5])), 4.25, 1e-12)


def zero_rows():
    return mf.LeastSquares(jnp.eye(2), jnp.ones((2, 2)), predict=lambda w, x: w @ x)


def test_the_largest_eigenvalue_and_its_derivative():
    loss, point = fitted()
    objective = walks.LargestEigenvalue()
    top = lambda p: loss.scale * jnp.linalg.eigvalsh(loss.jacobian(p).gram())[-1]
    close("λ₁", objective(loss, point), top(point), 1e-9)
    found, expected = (eqx.filter_grad(fn)(point) for fn in (lambda p: objective(loss, p), top))
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    at_most("dλ₁", max(float(jnp.max(jnp.abs(a - b))) for a, b in leaves), 1e-7)


@pytest.mark.parametrize("method", [None, mf.RiemannianTrustRegion(), "flow"])
def test_the_shortest_point_of_a_hyperbola(method):
    options = {"objective": "weight_norm", "stationarity": 1e-4}
    found = mf.walk(product(), jnp.array([4.0, 0.25]), method=method, **options)
    close("final", found.final, jnp.ones(2), 1e-3)
    assert found.is_successful


def test_a_flow_is_the_riemannian_gradient_flow():
    loss, start = product(), jnp.array([2.0, 0.5])
    flow = mf.RiemannianGradientFlow(mf.ZeroLossManifold(loss), loss.trace_gauss_newton)
    expected = mf.solve(flow, start, end_time=0.05, num_saves=2)
    found = mf.walk(loss, start, method="flow", end_time=0.05, num_saves=2)
    close("points", found.points, expected.points, 1e-9)
    traces = found.observables["trace of G"]
    close("objective", traces[-1], loss.trace_gauss_newton(expected.final), 1e-9)


OBJECTIVES = ["flatness", walks.Rounding(4), lambda m: jnp.sum(m.layers[0].bias ** 2)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_under_a_cross_entropy_stay(objective):
    """There is no zero loss; the budget ends the walk where it is."""
    found = mf.walk(CROSS_ENTROPY, NETWORK, objective=objective, max_steps=5)
    table = walks.before_after(found)
    name = walks._objectives.objective_of(objective).name
    before, after = table.values[name]
    at_most(f"{name}: after / before", after / before, 0.8)
    at_most("largest change of an output", table.values["largest change of an output"][1], 1e-10)
    close("loss", table.values["loss"][1], table.values["loss"][0], 1e-10)
    assert str(table).startswith("5 steps. The step limit was reached first."), str(table)


def test_a_spent_budget_of_a_flow_keeps_what_was_reached():
    found = mf.walk(
        product(),
        jnp.array([4.0, 0.25]),
        method="flow",
        end_time=1e3,
        num_saves=1000,
        max_steps=3,
        stationarity=1e-9,
    )
    equal("result", bool(found.result == mf.RESULTS.max_steps_reached), True)
    assert np.isfinite(found.final).all() and np.isfinite(found.points).all(), found.points
    equal("final is the last save", found.final.tolist(), found.points[-1].tolist())


def test_a_stochastic_walk_is_sgd_on_its_gradient():
    """On the hyperbola w₀w₁ = 1 with tr G = w₀² + w₁², along which flatness leads to (1, 1)."""
    start, method = jnp.array([2.0, 0.5]), walks.StochasticWalk(0.05)
    options = {"learning_rate": 0.05, "key": jr.key(0)}
    found = mf.walk(product(), start, method=method, max_steps=4000, num_saves=2, **options)
    assert found.observables["trace of G"].shape == (3,)
    # In the time 0.05·0.05·4000 = 10 of Y' = −P∇tr G all is over; L + λ·tr G is least where
    # w₀w₁ − 1 = −2λ.
    close("final", found.final, jnp.full(2, (1 - 2 * 0.05) ** 0.5), 1e-6)
    for wrong in (
        {"key": jr.key(0)},
        {**options, "objective": "weight_norm"},
        {**options, "manifold": mf.ZeroLossManifold(product())},
    ):
        with refused(ValueError, "walk", "StochasticWalk"):
            mf.walk(product(), start, method=method, **wrong)
    with refused(ValueError, "walk", "learning_rate", "StochasticWalk"):
        mf.walk(product(), start, learning_rate=0.1)


def test_a_walk_that_rounding_stalls_says_so_and_keeps_its_point():
    """On a sphere, where no step lowers the gradient to 1e-30 of its first value."""
    sphere, scales = mf.LevelSet(lambda w: w @ w - 1), jnp.array([-3.0, -1.0, 0.5, 1.0, 2.0, 4.0])
    objective = lambda w: jnp.sum(scales * w**2) + 0.5 * jnp.sum(w) ** 2 + jnp.sum(w**3)
    options = {"manifold": sphere, "objective": objective, "max_steps": 1000}
    start = sphere.project(jnp.array([0.3, -0.8, 0.5, 0.4, -0.6, 0.9]))
    loss = mf.FunctionLoss(lambda w: (w @ w - 1) ** 2)
    found = mf.walk(loss, start, stationarity=1e-30, **options)
    equal("result", bool(found.result == mf.RESULTS.stalled), True)
    assert not found.is_successful
    close("final", found.final, mf.walk(loss, start, stationarity=1e-6, **options).final, 1e-5)
    assert "level of rounding" in str(walks.before_after(found)), walks.before_after(found)


def test_a_walk_that_fails_raises_or_gives_nan():
    """An objective that is NaN where the walk must go, and one that is so from the start on."""
    objective = lambda w: jnp.where(w[0] > 3.0, jnp.sum(w**2), jnp.nan)
    options = {"objective": objective, "method": "flow", "end_time": 10.0}
    with pytest.raises(eqx.EquinoxRuntimeError):
        mf.walk(product(), jnp.array([4.0, 0.25]), **options)
    found = mf.walk(product(), jnp.array([4.0, 0.25]), throw=False, **options)
    assert not found.is_successful and np.isnan(found.final).all(), found.final
    with refused(ValueError, "walk", "objective", "finite", "nan"):
        mf.walk(product(), jnp.array([4.0, 0.25]), objective=lambda w: jnp.nan * w[0])


def test_the_change_of_outputs_is_measured():
    """On another manifold they may change: w₀ = 2 with w₁ from ½ to 0 takes w₀w₁ from 1 to 0."""
    line = mf.LevelSet(lambda w: w[0] - 2.0)
    options = {"objective": "weight_norm", "manifold": line, "stationarity": 1e-6}
    found = mf.walk(product(), jnp.array([2.0, 0.5]), **options)
    change = found.observables["largest change of an output"]
    close("change", change, jnp.array([0.0, 1.0]), 1e-6)


def squares(factor, w):
    return factor * jnp.sum(w**2)


def test_units_do_not_matter():
    """The same way for an objective in other units."""
    start = jnp.array([4.0, 0.25])
    objective = lambda factor: jax.tree_util.Partial(squares, jnp.asarray(factor))
    run = lambda factor: mf.walk(product(), start, objective=objective(factor), method="flow")
    expected = run(1.0)
    for factor in (1e8, 1e-8):
        close(f"objective times {factor}", run(factor).final, expected.final, 1e-4)


def test_jit_and_vmap():
    close("finals", two_walks().final, jnp.ones((2, 2)), 1e-3)


@pytest.mark.parametrize("progress", [True, False])
def test_a_walk_says_that_it_compiles(progress, capsys):
    run = lambda start: mf.walk(product(), start, max_steps=1, progress=progress)
    run(jnp.array([4.0, 0.25]))
    jax.effects_barrier()
    lines = capsys.readouterr().out.splitlines()
    expected = ["walk: compiling, and running …"] if progress else []
    assert lines[:1] == expected, lines
    jax.eval_shape(run, jnp.array([4.0, 0.25]))
    assert "compiling" not in capsys.readouterr().out, "within another program nothing begins"


def test_bad_input():
    start = jnp.array([4.0, 0.25])
    for options, words in (
        ({"objective": "sharpness"}, ("objective", "flatness", "sharpness")),
        ({"method": "sgd"}, ("method", "flow", "sgd")),
        ({"end_time": 1.0}, ("end_time", "flow")),
        ({"method": "flow", "objective": lambda w: -1.0 + 0 * w[0]}, ("end_time", "positive")),
        ({"observe": {"loss": lambda w: w[0]}}, ("observe", "loss")),
        ({"stationarity": 0}, ("stationarity",)),
    ):
        with refused(ValueError, "walk", *words):
            mf.walk(product(), start, **options)
    with refused(ValueError, "trace of G", "FunctionLoss"):
        circle = mf.LevelSet(lambda w: w @ w - 1)
        mf.walk(mf.FunctionLoss(lambda w: (w @ w - 1) ** 2), start, manifold=circle)
    with refused(ValueError, "Rounding", "bits", "17"):
        walks.Rounding(17)
    with refused(ValueError, "Rounding", "per", "block"):
        walks.Rounding(4, "block")


def test_before_after_takes_one_solution():
    with refused(ValueError, "before_after", "batch", "(2,)"):
        walks.before_after(two_walks())
