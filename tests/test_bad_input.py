"""What goes wrong is said: what was got, and how to mend it."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
import zoo
from checks import refused
from manifoldflow import losses

INPUTS, TARGETS = zoo.data()
POINT = zoo.network_point(jr.key(5))


def least_squares(inputs=INPUTS, targets=TARGETS, predict=zoo.network, **options):
    return mf.LeastSquares(inputs, targets, predict=predict, **options)


# --- data ----------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "build", [mf.LeastSquares, lambda x, y: mf.PerExampleLoss(x, y, zoo.softmax)]
)
def test_data_of_different_lengths(build):
    with refused(ValueError, "one common", "leading example axis", "[4,3]", "[3,2]", "Stack"):
        build(INPUTS, TARGETS[:3])
    with refused(ValueError, "non-empty leading example axis"):
        build(INPUTS, jnp.float64(1.0))
    with refused(ValueError, "non-empty leading example axis"):
        build(INPUTS[:0], TARGETS[:0])


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_data_that_are_not_finite(wrong):
    with refused(ValueError, "NaN or infinite", "(2, 1)", "Remove or impute"):
        mf.LeastSquares(INPUTS.at[2, 1].set(wrong), TARGETS)
    with refused(ValueError, "NaN or infinite", "(3, 0)"):
        mf.LeastSquares(INPUTS, TARGETS.at[3, 0].set(wrong))

    @eqx.filter_jit
    def inside(targets):
        return least_squares(targets=targets)(POINT)

    with refused(eqx.EquinoxRuntimeError, "NaN or infinite"):
        jax.block_until_ready(inside(TARGETS.at[0, 0].set(wrong)))


@pytest.mark.quick
def test_scale_of_a_loss():
    with refused(ValueError, "scale must be finite and not negative", "-1.0"):
        least_squares(scale=-1.0)
    with refused(ValueError, "scalar", "(2,)"):
        least_squares(scale=jnp.ones(2))


def test_column_targets_are_never_broadcast():
    """(N, 1) against (N,): the classic."""
    model = eqx.nn.MLP(3, "scalar", 6, 1, key=jr.key(0))
    with refused(ValueError, "shape ()", "shape (1,)", "never broadcast"):
        mf.LeastSquares(INPUTS, TARGETS[:, :1])(model)
    with refused(ValueError, "shape (1,)", "shape ()", "Reshape the targets"):
        mf.LeastSquares(INPUTS, TARGETS[:, 0])(eqx.nn.MLP(3, 1, 6, 1, key=jr.key(0)))
    with refused(ValueError, "shape (3,)", "shape (2,)"):
        mf.LeastSquares(INPUTS, TARGETS)(eqx.nn.MLP(3, 3, 6, 1, key=jr.key(0)))


# --- points and tangents -------------------------------------------------------------------


@pytest.mark.quick
def test_complex_points():
    with refused(ValueError, "Complex leaves", "c128", "real and imaginary parts"):
        mf.LevelSet(zoo.sphere).project(jnp.ones(3) + 1j)


def test_points_without_coordinates():
    with refused(ValueError, "at least one floating-point array", "integer arrays are not"):
        mf.LevelSet(zoo.sphere).project(jnp.arange(3))
    with refused(ValueError, "Python numbers"):
        mf.LevelSet(lambda p: p["x"] ** 2 - 1).project({"x": 1.0})


def test_a_constraint_that_cannot_be_called():
    with refused(TypeError, "needs a function of the point; got int", "fn(point) - c"):
        mf.LevelSet(3)


def test_points_that_cannot_be_called():
    with refused(ValueError, "dict", "not callable", "predict=lambda"):
        mf.LeastSquares(INPUTS, TARGETS)(POINT)


def test_tangents_of_another_structure():
    manifold = mf.ZeroLossManifold(least_squares())
    for wrong in (jnp.ones(3), {"weight": POINT["weight"]}, {**POINT, "bias": jnp.ones(7)}):
        for method in (manifold.tangent_projection, manifold.retract, manifold.normal_projection):
            with refused(ValueError, "structure and shapes", "got", "filter_grad"):
                method(POINT, wrong)


def test_trainable_that_does_not_fit():
    with refused(ValueError, "`trainable`", "prefix"):
        least_squares(trainable={"weights": True})(POINT)


# --- models --------------------------------------------------------------------------------


def test_dropout_in_training_mode():
    layers = [eqx.nn.Linear(3, 2, key=jr.key(0)), eqx.nn.Dropout(0.5)]
    model = eqx.nn.Sequential(layers)
    loss = mf.LeastSquares(INPUTS, TARGETS)
    with refused(ValueError, "Dropout in training mode", "inference_mode"):
        loss(model)
    assert np.isfinite(float(loss(eqx.nn.inference_mode(model)))), "inference mode is fine"


def test_models_that_return_more_than_an_array():
    with refused(ValueError, "one array", "tuple", "predict"):
        least_squares(predict=lambda p, x: (zoo.network(p, x), None))(POINT)


def test_functions_that_are_not_scalar():
    with refused(ValueError, "scalar value", "(3,)"):
        mf.FunctionLoss(lambda x: x)(jnp.ones(3))


def test_hard_labels():
    """They have a loss, but no manifold: said where that is asked for, with two ways out."""
    ways = "smooth the labels", "ResampledLabels", "OutputManifold(predict, inputs, like=point)"
    hard = mf.PerExampleLoss(INPUTS, jax.nn.one_hot(jnp.arange(4) % 3, 3), zoo.softmax)
    for ask in (mf.ZeroLossManifold, losses.ResidualForm, lambda loss: mf.limit_map(loss, POINT)):
        with refused(ValueError, "minimum is at infinity", "minimizer_fn", *ways):
            ask(hard)
    squares = lambda f, y: jnp.sum((f - y) ** 2)
    with refused(ValueError, "one floating array", "minimizer_fn", *ways):
        mf.ZeroLossManifold(mf.PerExampleLoss(INPUTS, jnp.arange(4), squares))
    with refused(ValueError, "minimizer_fn gives", "gradient is still"):
        mf.ZeroLossManifold(
            mf.PerExampleLoss(INPUTS, TARGETS, squares, minimizer_fn=lambda y: y + 1)
        )


def test_weight_decay_has_no_zero_loss_manifold():
    decayed = mf.PerExampleLoss(
        INPUTS, jax.nn.softmax(TARGETS), zoo.softmax, predict=zoo.network, weight_decay=0.1
    )
    with refused(ValueError, "weight decay", "WeightDecayFlow", "MinimizerManifold(loss, rank)"):
        mf.ZeroLossManifold(decayed)
    with refused(ValueError, "weight_decay must be finite and not negative", "-1"):
        mf.PerExampleLoss(INPUTS, TARGETS, zoo.softmax, weight_decay=-1)


def test_manifolds_of_traced_targets():
    def inside(targets):
        return mf.ZeroLossManifold(mf.PerExampleLoss(INPUTS, targets, zoo.softmax)).loss.minimizers

    with refused(ValueError, "inside jit or vmap", "Build ZeroLossManifold(loss) outside"):
        jax.jit(inside)(jax.nn.softmax(TARGETS))


def test_losses_of_an_example_that_are_no_number():
    for loss_fn in (lambda f, y: f - y, lambda f, y: jnp.argmax(f)):
        loss = mf.PerExampleLoss(INPUTS, TARGETS, loss_fn, predict=zoo.network)
        for use in (loss, loss.gradient, loss.trace_gauss_newton):
            with refused(ValueError, "one real number for one example", "(2,)"):
                use(POINT)


# --- manifolds -----------------------------------------------------------------------------


def test_more_residuals_than_parameters():
    with refused(
        ValueError, "at most as many", "8 residuals", "2 coordinates", "Use fewer examples"
    ):
        mf.ZeroLossManifold(least_squares(predict=lambda p, x: p * x[:2])).project(jnp.ones(2))


def test_manifolds_of_the_wrong_loss():
    with refused(ValueError, "FunctionLoss", "MinimizerManifold(loss, rank)", wrong_type=True):
        mf.ZeroLossManifold(mf.FunctionLoss(zoo.sphere))
    for rank in (0, -1, True):
        with refused(ValueError, "positive integer", repr(rank)):
            mf.MinimizerManifold(mf.FunctionLoss(zoo.cosh_loss), rank)
    with refused(ValueError, "rank 9", "5 coordinates"):
        mf.MinimizerManifold(mf.FunctionLoss(zoo.cosh_loss), 9).project(jnp.ones(5))
    with refused(ValueError, "needs a loss or a manifold", "FunctionLoss", wrong_type=True):
        mf.limit_map(zoo.sphere, jnp.ones(3))


def missed(manifold, start):
    point, info = manifold.project_with_info(start)
    assert bool(jnp.all(jnp.isnan(point))), f"{point} with {info.result}"
    return info.result


def test_manifolds_that_cannot_be_reached():
    start = jnp.array([0.3, -0.2])
    empty = mf.LevelSet(lambda x: jnp.sum(x**2) + 1)
    assert bool(missed(empty, start) != mf.RESULTS.successful)
    with refused(eqx.EquinoxRuntimeError, "No point of the manifold was found", "limit_map"):
        jax.block_until_ready(empty.project(start))
    inputs = jnp.array([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])  # one input, two targets
    loss = mf.LeastSquares(inputs, jnp.array([0.0, 1.0]), predict=jnp.dot)
    manifold = mf.ZeroLossManifold(loss)
    assert bool(missed(manifold, jnp.ones(3)) == mf.RESULTS.not_on_manifold)
    assert not bool(manifold.is_on(jnp.array([0.5, 0.0, 0.0]))), "best compromise counts as a fit"
    flat = mf.LevelSet(lambda x: jnp.zeros(1) * x[0] + 1)
    assert bool(missed(flat, start) == mf.RESULTS.rank_zero)


def test_saddles_are_not_minima():
    loss = mf.FunctionLoss(lambda x: (x[0] ** 2 - x[1] ** 2) / 2)
    result = missed(mf.MinimizerManifold(loss, 2), jnp.array([0.1, 0.1]))
    assert bool(result == mf.RESULTS.not_a_minimum), result


# --- noise and flows -----------------------------------------------------------------------


def test_noise():
    for noise in (mf.LabelNoise, mf.IsotropicNoise):
        with refused(ValueError, "std must be finite and not negative", "-0.5"):
            noise(-0.5)
    for batch_size in (0, -2):
        with refused(ValueError, "batch_size", repr(batch_size), "positive integer"):
            mf.LabelNoise(1.0, batch_size=batch_size)
    noise = mf.LabelNoise(1.0, batch_size=9)
    with refused(ValueError, "batch_size=9", "4", "batch_size=None"):
        noise.gradient(least_squares(), POINT, jr.key(0))
    with refused(ValueError, "batch_size=9"):
        mf.LimitDiffusion(mf.ZeroLossManifold(least_squares()), noise)


def test_limit_diffusion_needs_a_loss():
    for noise in (mf.LabelNoise(1.0), mf.IsotropicNoise()):
        with refused(ValueError, "LevelSet", "RiemannianGradientFlow"):
            mf.LimitDiffusion(mf.LevelSet(zoo.sphere), noise)


@pytest.mark.parametrize("end_time", [0.0, -1.0, jnp.nan, jnp.inf])
def test_end_time(end_time):
    with refused(ValueError, "end_time must be positive and finite", str(end_time)):
        mf.solve(zoo.descent_flow(), jnp.asarray(zoo.START), end_time=end_time)


def solve(**options):
    return mf.solve(zoo.descent_flow(), jnp.asarray(zoo.START), end_time=1.0, **options)


def test_options_of_solve():
    with refused(ValueError, "save_times must increase", "[0.5, 0.2]"):
        solve(save_times=[0.5, 0.2])
    with refused(ValueError, "at most end_time=1.0"):
        solve(save_times=[0.5, 2.0])
    with refused(ValueError, "sequence of times", "(0,)"):
        solve(save_times=[])
    with refused(ValueError, "num_saves", "0"):
        solve(num_saves=0)
    with refused(ValueError, "rtol must be positive", "-1"):
        solve(rtol=-1.0)
    with refused(ValueError, "Euler estimates no error", "step_size", "HalfSolver"):
        solve(solver=dfx.Euler())
    with refused(ValueError, "functions of a point", "'h'", wrong_type=True):
        solve(observe={"h": 3.0})


def test_step_size():
    for step_size in (0.0, -0.1):
        with refused(ValueError, "step_size", "positive"):
            solve(step_size=step_size)


def test_a_start_in_another_basin():
    empty = mf.LevelSet(lambda x: jnp.sum(x**2) + 1)
    flow = mf.RiemannianGradientFlow(empty, zoo.height)
    walk = mf.solve(flow, jnp.asarray(zoo.START), end_time=1.0, throw=False)
    assert bool(walk.result == mf.RESULTS.not_on_manifold), walk.result
    assert bool(jnp.all(jnp.isnan(walk.final))), walk.final
