"""What is refused and what is not: layers, optimisers, loops, leaves without numbers."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest

import manifoldflow as mf
import processes
from checks import close, refused
from manifoldflow import _tree, linalg, models, theory

KEY = jr.key(0)
INPUTS, TARGETS = jr.normal(KEY, (2, 3)), jnp.zeros(2)
POINT = jnp.array([0.5, -0.3, 0.2])


def tanh_loss(**options):
    return mf.LeastSquares(INPUTS, TARGETS, predict=lambda p, x: jnp.tanh(p @ x), **options)


def test_dropout_of_nothing_is_no_dropout():
    quiet = [eqx.nn.Linear(3, 1, key=KEY), eqx.nn.Dropout(0.0)]
    loss = mf.LeastSquares(INPUTS, TARGETS[:, None])
    close("loss", loss(eqx.nn.Sequential(quiet)), loss(eqx.nn.Sequential(quiet[:1])), 1e-15)
    attention = eqx.nn.MultiheadAttention(1, 3, key=KEY)
    of_sequences = mf.LeastSquares(
        INPUTS[:, None], jnp.zeros((2, 1, 3)), predict=lambda m, x: m(x, x, x)
    )
    assert np.isfinite(float(of_sequences(attention)))
    loud = eqx.nn.Sequential([quiet[0], eqx.nn.Dropout(0.5)])
    with refused(ValueError, "Dropout in training mode", "inference_mode"):
        loss(loud)


class _Training:
    """As a layer of Flax NNX looks from outside."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


_Training.__module__ = "flax.nnx.nn.stochastic"


@pytest.mark.parametrize("mode", [{"deterministic": False}, {"use_running_average": False}])
def test_layers_of_nnx_in_training_mode(mode):
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=lambda p, x: p["w"] @ x)
    evaluated = {"w": POINT, "layer": _Training(inner=_Training(**dict.fromkeys(mode, True)))}
    assert np.isfinite(float(loss(evaluated)))
    with refused(ValueError, "_Training in training mode", "model.eval()"):
        loss({"w": POINT, "layer": _Training(inner=_Training(**mode))})


def run(optimizer, noise=None, **options):
    noise = mf.IsotropicNoise(0.0) if noise is None else noise
    return mf.simulate(tanh_loss(), noise, optimizer, POINT, learning_rate=0.1, key=KEY, **options)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda rate: optax.chain(optax.sgd(rate), optax.scale_by_backtracking_linesearch(5)),
        optax.lbfgs,
    ],
    ids=["backtracking", "lbfgs"],
)
def test_line_searches(optimizer):
    """They get the value, and the run is that of Optax's own loop."""
    found = run(optimizer, num_steps=2).final
    loss, transform = tanh_loss(), optimizer(0.1)

    def step(carry, _):
        x, state = carry
        value, slope = jax.value_and_grad(loss)(x)
        update, state = transform.update(slope, state, x, value=value, grad=slope, value_fn=loss)
        return (optax.apply_updates(x, update), state), None

    expected = jax.lax.scan(step, (POINT, transform.init(POINT)), length=2)[0][0]
    close("two steps", found, expected, 1e-12)


def test_a_transforms_own_error_is_its_own():
    def broken(updates, state, params=None):
        raise TypeError("mine")

    def optimizer(rate):
        return optax.GradientTransformation(optax.sgd(rate).init, broken)

    for end in ({"num_steps": 2}, {"end_time": 0.1}):
        with pytest.raises(TypeError, match="mine"):
            run(optimizer, **end)
    with refused(ValueError, "not proportional to the gradients"):
        run(optax.adam, end_time=0.1)


def test_leaves_without_numbers():
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=lambda p, x: jnp.tanh(p["w"] @ x))
    full, empty = {"w": POINT}, {"w": POINT, "e": jnp.zeros((0, 2))}
    close("trace", loss.trace_gauss_newton(empty), loss.trace_gauss_newton(full), 1e-14)
    vector = {"w": jnp.ones(3), "e": jnp.zeros((0, 2))}
    manifold = mf.ZeroLossManifold(loss)
    found = manifold.tangent_projection(empty, vector)
    assert found["e"].shape == (0, 2)
    close("Pv", found["w"], manifold.tangent_projection(full, {"w": jnp.ones(3)})["w"], 1e-14)


def test_loops_of_unknown_length():
    def predict(p, x):
        return jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * p[0]), (0, x @ p)
        )[1]

    loss = mf.LeastSquares(INPUTS, TARGETS, predict=predict)
    words = "lax.while_loop", "lax.scan", "fixed number of steps"
    with refused(ValueError, *words):
        loss.gradient(POINT)
    with refused(ValueError, *words):
        loss.trace_gauss_newton(POINT)
    with refused(ValueError, *words):
        mf.simulate(
            loss, mf.IsotropicNoise(), optax.sgd, POINT, learning_rate=0.1, num_steps=1, key=KEY
        )


@jax.custom_vjp
def squashed(x):
    return jnp.tanh(x)


squashed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))


def test_models_without_forward_mode():
    """First-order work takes reverse mode alone; what takes more says so."""
    loss = mf.LeastSquares(INPUTS, TARGETS, predict=lambda p, x: squashed(p @ x))
    close("∇L", loss.gradient(POINT), tanh_loss().gradient(POINT), 1e-14)
    trace = jax.grad(lambda p: loss.trace_gauss_newton(p))(POINT)
    close("∇tr", trace, jax.grad(lambda p: tanh_loss().trace_gauss_newton(p))(POINT), 1e-12)
    close("tr∇²L", loss.trace_hessian(POINT), tanh_loss().trace_hessian(POINT), 1e-12)
    unit = lx.MatrixLinearOperator(jnp.eye(3))
    with refused(ValueError, "no forward mode", "custom_jvp", "diffrax.DirectAdjoint()"):
        linalg.second_derivative_sum(loss.residual, POINT, unit, unit)


def test_examples_out_of_range():
    loss = tanh_loss()
    assert loss.select([1, -2]).num_examples == 2
    for indices in ([2], [-3], 1.5, [], np.ones(3, bool)):
        with refused(ValueError, "numbers of some of the 2 examples"):
            loss.select(indices)


def test_numbers_that_mean_nothing():
    for tolerance in (np.nan, -1.0, "text"):
        with refused(ValueError, "Stationary: tolerance"):
            mf.Stationary(tolerance)
    with refused(ValueError, "real numbers"):
        mf.LabelNoise(1j)
    for rank in (-1, 1.5, True, 3):
        with refused(ValueError, "rank must be", wrong_type=True):
            linalg.pseudo_inverse(jnp.eye(2), rank)
    with refused(ValueError, "an array (n, n)", wrong_type=True):
        linalg.pseudo_inverse(jnp.ones((2, 3)))
    with refused(ValueError, "input_covariance", "below 0"):
        theory.deep_linear_sharpness([np.eye(2), np.eye(2)], -np.eye(2))
    with refused(ValueError, "covariance", "below 0"):
        theory.ornstein_uhlenbeck_covariance(np.eye(2), -np.eye(2), learning_rate=0.1)
    with refused(ValueError, "covariance", "below 0"):
        theory.approximate_symmetry_displacement(
            *(np.ones(2), np.eye(2), -np.eye(2), np.eye(2), np.ones(2)),
            noise_scale=1.0,
            strength=1.0,
        )
    for covariance in (np.ones(3), np.asarray([1.0, -1.0])):
        with refused(ValueError, "input_covariance"):
            models.LinearStream(np.eye(2), covariance, np.eye(2))


FLOAT = """
import warnings, jax.numpy as jnp, manifoldflow as mf
loss = mf.FunctionLoss(lambda p: p["a"][0] ** 2 * p["b"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        loss.gradient({"a": [jnp.ones(())], "b": 0.5})
assert len(caught) == 1 and "['b'] is a Python float" in str(caught[0].message), caught
"""


def test_a_python_float_in_a_dict_is_said_once():
    done = processes.Running(["-c", FLOAT]).finished()
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_modules_own_floats_are_not_said(monkeypatch):
    monkeypatch.setattr(_tree, "_mentioned", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mf.split([eqx.nn.LayerNorm(3), eqx.nn.Dropout(0.5)])
        with pytest.raises(UserWarning, match=r"\[0\] is a Python float"):
            mf.split([0.5, POINT])


def test_strict_promotion_of_dtypes():
    """The library promotes as usual inside, where it adds counts and truth values."""
    loss = tanh_loss()
    manifold, noise = mf.ZeroLossManifold(loss), mf.LabelNoise(std=0.5, batch_size=1)

    def run(point):
        start = manifold.project(point)
        walk = mf.solve(mf.LimitDiffusion(manifold, noise), start, end_time=0.1, num_saves=2)
        options = {"learning_rate": 0.1, "num_steps": 3, "key": KEY}
        ended = mf.simulate(loss, noise, optax.sgd, walk.final, **options).final
        return ended, mf.minimize(manifold, lambda p: jnp.sum((p - 1) ** 2), start).final

    usual = run(POINT)
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(Exception, match="promotion"):
            jnp.ones(2, bool) + jnp.ones(2, int)
        for name, value, expected in zip(("simulate", "minimize"), run(POINT), usual):
            close(name, value, expected, 1e-12)
