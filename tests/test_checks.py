"""The numerical checks for users: what they say of the right thing and of the wrong one."""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, refused
from manifoldflow import _tree
from manifoldflow.plotting import plot_check

matplotlib.use("Agg")

torus = mf.LevelSet(lambda x: (jnp.hypot(x[0], x[1]) - 2) ** 2 + x[2] ** 2 - 0.5)
POINT = torus.project(jnp.array([1.5, 1.0, 0.4]))


def height(x):
    return x[2] + 0.3 * jnp.sin(x[0])


def test_a_wrong_gradient_is_found():
    gradient = mf.riemannian_gradient(torus, height, POINT)
    assert mf.diagnostics.check_gradient(torus, height, POINT, jr.key(0))
    wrong = mf.diagnostics.check_gradient(
        torus, height, POINT, jr.key(0), gradient=1.001 * gradient
    )
    assert not wrong and wrong.slope < 1.5, wrong
    assert isinstance(wrong, mf.diagnostics.SlopeCheck)
    assert wrong.sizes.shape == wrong.errors.shape and wrong.window[0] < wrong.window[1]


def test_single_precision():
    point = POINT.astype(jnp.float32)
    for check in (mf.diagnostics.check_gradient, mf.diagnostics.check_hessian):
        assert check(torus, height, point, jr.key(0)), str(check(torus, height, point, jr.key(0)))
    assert mf.diagnostics.check_geodesic(torus, point, torus.random_tangent(point, jr.key(1)))


def test_hessians_in_single_precision_whatever_the_draw():
    """Only large steps are above rounding, where errors of the next order bend the line."""
    wave = lambda x: x[2] * x[0] + jnp.sin(x[1])
    point = torus.project(jnp.array([1.9, 0.9, 0.4], jnp.float32))
    hessian = mf.covariant_hessian(torus, wave, point)

    def num_held(operator):
        check = lambda key: mf.diagnostics.check_hessian(torus, wave, point, key, hessian=operator)
        return sum(bool(check(jr.key(seed))) for seed in range(20))

    right, wrong = num_held(hessian), num_held(hessian * jnp.float32(1.1))
    assert right >= 18, f"right Hessians: {right} of 20 pass"
    assert wrong == 0, f"wrong Hessians: {wrong} of 20 pass"


def test_constant_functions_have_no_error_to_measure():
    check = mf.diagnostics.check_gradient(torus, lambda x: jnp.asarray(3.0), POINT, jr.key(0))
    assert check and np.isnan(check.slope)


def test_geodesics_and_other_curves():
    velocity = torus.random_tangent(POINT, jr.key(1))
    velocity = velocity / jnp.linalg.norm(velocity)
    good = mf.diagnostics.check_geodesic(torus, POINT, velocity, time=2.0)
    assert good and isinstance(good, mf.diagnostics.GeodesicCheck)
    at_most("speed", good.speed_error, 1e-8)
    at_most("transport", good.transport_error, 1e-8)
    at_most("defect", good.defect, 1e-12)

    def bent(t):  # on the manifold, with the right start, but no geodesic
        return torus.project(POINT + t * velocity)

    bad = mf.diagnostics.check_geodesic(torus, POINT, velocity, path=bent)
    assert not bad and bad.transport_error > 1e-3 and bad.defect < 1e-10


def test_a_model_is_a_point():
    inputs = jnp.array([[0.8, 0.6], [-0.5, 0.85]])
    predict = lambda p, x: jnp.sum(jnp.sinh(p["w"] @ x))
    loss = mf.LeastSquares(inputs, jnp.array([1.5, -1.0]), predict=predict)
    manifold = mf.ZeroLossManifold(loss)
    point = manifold.project({"w": jr.normal(jr.key(0), (3, 2)), "name": "net"})
    check = mf.diagnostics.check_hessian(manifold, loss.trace_gauss_newton, point, jr.key(1))
    assert check, check
    dimension = mf.diagnostics.check_dimension(manifold, point)
    assert isinstance(dimension, mf.diagnostics.DimensionCheck) and dimension.rank == 2
    velocity = manifold.random_tangent(point, jr.key(2))
    assert mf.diagnostics.check_geodesic(manifold, point, _tree.scale(0.3, velocity))


def test_no_direction_to_go():
    two_points = mf.LevelSet(lambda x: x**2 - 1)
    with refused(ValueError, "dimension 0"):
        mf.diagnostics.check_gradient(two_points, jnp.sum, jnp.ones(1), jr.key(0))
    with refused(ValueError, "needs a velocity"):
        mf.diagnostics.check_geodesic(torus, POINT, jnp.zeros(3))


@pytest.mark.parametrize("expected", [2, 3])
def test_the_picture(expected):
    check = mf.diagnostics.check_gradient if expected == 2 else mf.diagnostics.check_hessian
    axes = plot_check(check(torus, height, POINT, jr.key(0)))
    assert axes.get_xlabel() and axes.get_ylabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(f"slope {expected}" in label for label in labels), labels
    jax.block_until_ready(POINT)
    matplotlib.pyplot.close(axes.figure)
