"""Which limits follow a gradient [LiWangArora2022, Appendix C.4's question], and which do not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from manifoldflow import diagnostics, updates

# Two unit circles: angles a and b, unit tangents (−sin, cos) on each.
PRODUCT = mf.LevelSet(lambda x: jnp.stack([x[:2] @ x[:2] - 1, x[2:] @ x[2:] - 1]))


def at(a, b):
    return jnp.stack([jnp.cos(a), jnp.sin(a), jnp.cos(b), jnp.sin(b)])


class Along(mf.AbstractFlow):
    """Any field along a manifold."""

    field: Callable
    manifold: mf.AbstractManifold = PRODUCT

    def split(self, point):
        return point, None

    def drift(self, point):
        return self.field(point)


def turning(speed):
    """The first circle turns with a speed that depends on the second."""
    return Along(lambda x: speed(x) * jnp.stack([-x[1], x[0], jnp.zeros(()), jnp.zeros(())]))


def test_a_field_that_turns_by_exact_numbers():
    """b = sin(b)·e_a: ⟨∇_u b, w⟩ has the one entry cos b, half of it antisymmetric."""
    a, b = 0.4, 1.1
    found = diagnostics.is_gradient_flow(turning(lambda x: x[3]), at(a, b))
    equal("is it a gradient", bool(found), False)
    close("antisymmetric part", found.antisymmetric, np.cos(b) / np.sqrt(2), 1e-12)
    close("symmetric part", found.symmetric, np.cos(b) / np.sqrt(2), 1e-12)
    # Db[e_a] is −sin b times the normal of the first circle.
    close("size", found.size, 1.0, 1e-12)
    # By random tangents: 300 of them, whose pairs scatter by a few percent.
    rough = diagnostics.is_gradient_flow(turning(lambda x: x[3]), at(a, b), num_tangents=300)
    close("estimated", rough.antisymmetric, found.antisymmetric, 0.15)
    equal("and it is said to be", rough.is_estimate, True)


def test_a_turn_that_is_a_gradient_near_every_point():
    """Constant speed: A = 0, and only a loop sees that there is no potential."""
    flow = turning(lambda x: jnp.asarray(0.3))
    equal("near the point", bool(diagnostics.is_gradient_flow(flow, at(0.4, 1.1))), True)
    round_it = lambda t: at(2 * np.pi * t, 1.1 + jnp.sin(2 * np.pi * t))
    found = diagnostics.is_gradient_flow(flow, at(0.4, 1.1), loop=round_it)
    equal("round a loop", bool(found), False)
    close("circulation", found.circulation, 0.3 * 2 * np.pi, 1e-9)
    other = lambda t: at(0.4, 2 * np.pi * t)  # round the circle that does not turn
    found = diagnostics.is_gradient_flow(flow, at(0.4, 1.1), loop=other)
    equal("round another", (bool(found), abs(found.circulation) < 1e-12), (True, True))
    # A loop that winds too fast for the first nodes: ∮ sin b da with b = 1.1 + 6 sin(40πt).
    winding = lambda t: at(2 * np.pi * t, 1.1 + 6 * jnp.sin(40 * np.pi * t))
    found = diagnostics.is_gradient_flow(turning(lambda x: x[3]), at(0.4, 1.1), loop=winding)
    expected = 2 * np.pi * np.sin(1.1) * scipy.special.j0(6.0)
    close("circulation of a winding loop", found.circulation, expected, 1e-6)


def test_gradients_are_found_to_be():
    height = lambda x: jnp.sin(x[0]) * x[3] + x[1] ** 3
    flow = mf.RiemannianGradientFlow(PRODUCT, height)
    found = diagnostics.is_gradient_flow(flow, at(0.4, 1.1))
    equal("a gradient", bool(found), True)
    at_most("antisymmetric", found.antisymmetric, 1e-14)
    at_least("symmetric", found.symmetric, 0.5)
    bowl = mf.FunctionLoss(lambda x: jnp.cosh(x[0]) * x[1] ** 2)
    equal(
        "of no manifold",
        bool(diagnostics.is_gradient_flow(mf.GradientFlow(bowl), jnp.ones(2))),
        True,
    )
    # A drift of rounding errors alone is none, and has no direction to turn in.
    still = mf.RiemannianGradientFlow(mf.LevelSet(lambda x: x @ x - 1), lambda x: 3 * x @ x)
    equal("no drift at all", bool(diagnostics.is_gradient_flow(still, at(0.3, 0)[:2])), True)


def test_a_curve_is_followed_until_it_closes():
    """On an ellipse the circulation of a constant vanishes, that of a turn is twice the area."""
    ellipse = mf.LevelSet(lambda x: x[0] ** 2 / 9 + x[1] ** 2 - 1)
    point = jnp.array([3 * np.cos(0.2), np.sin(0.2)])
    found = diagnostics.is_gradient_flow(Along(lambda x: jnp.array([-x[1], x[0]]), ellipse), point)
    close("2·area", abs(found.circulation), 6 * np.pi, 1e-7)
    equal("a turn", bool(found), False)
    found = diagnostics.is_gradient_flow(Along(lambda x: jnp.array([1.0, 2.0]), ellipse), point)
    at_most("circulation of a constant", abs(found.circulation), 1e-7 * found.path_integral)
    equal("a constant", bool(found), True)
    parabola = mf.LevelSet(lambda x: x[1] - x[0] ** 2)
    swirl = Along(lambda x: jnp.array([-x[1], x[0]]), parabola)
    found = diagnostics.is_gradient_flow(swirl, jnp.ones(2))
    equal("an open curve has potentials of all its fields", bool(found), True)
    equal("and no circulation", found.circulation, None)


def test_the_motor_has_no_potential():
    """Its drift is a gradient at every point of the circle, and turns: 2π(D−2)/8 round it."""
    motor = mf.models.KPhaseMotor(3)
    flow = mf.LimitDiffusion(motor.manifold, motor.noise)
    found = diagnostics.is_gradient_flow(flow, motor.point(0.3))
    equal("is it a gradient", bool(found), False)
    at_most("antisymmetric part of a curve", found.antisymmetric, 1e-12)
    close("circulation", abs(found.circulation), 2 * np.pi * (motor.dimension - 2) / 8, 1e-6)
    printed = 2 * np.pi * (motor.dimension - 2) / 2  # Lemma C.8
    at_least("the printed speed is rejected", abs(abs(found.circulation) / printed - 1), 0.7)
    assert "NO gradient" in str(found), str(found)


# --- limits on one loss -----------------------------------------------------------------------


def net(w, x):
    return w[0] * jnp.tanh(w[1] * x[0] + w[2] * x[1]) + w[3] * x[0] + w[4] ** 2 * x[1]


INPUTS = jnp.array([[1.0, 0.4], [-0.5, 1.0]])
POINT = jnp.array([1.0, 0.8, 0.6, 0.5, 0.7])
LOSS = mf.LeastSquares(INPUTS, jax.vmap(lambda x: net(POINT, x))(INPUTS), predict=net)
FITS = mf.ZeroLossManifold(LOSS)
LABELS = mf.LabelNoise(0.7, batch_size=1)


def root_diagonal(point, vector):
    """Diag(∇²L)^½ v, Adam's metric."""
    return vector * jnp.sqrt(LOSS.scale * jnp.sum(jax.jacobian(LOSS.residual)(point) ** 2, axis=0))


def test_label_noise_has_a_potential_and_adam_one_in_its_own_metric():
    labels = diagnostics.is_gradient_flow(mf.LimitDiffusion(FITS, LABELS), POINT)
    equal("label noise", bool(labels), True)
    at_least("with a Hessian", labels.symmetric, 0.1)
    flow = mf.LimitDiffusion(FITS, LABELS, updates.Adam())
    plain = diagnostics.is_gradient_flow(flow, POINT)
    equal("Adam", bool(plain), False)
    at_least("by far", plain.antisymmetric / plain.size, 1e-3)
    own = diagnostics.is_gradient_flow(flow, POINT, metric=root_diagonal)
    equal("Adam in its own metric", bool(own), True)
    at_most("to rounding", own.antisymmetric / own.size, 1e-12)
    # −½∇tr Diag(H)^½ is what that metric turns its drift into.
    gradient = mf.riemannian_gradient(FITS, lambda x: jnp.sum(root_diagonal(x, jnp.ones(5))), POINT)
    lowered = FITS.tangent_projection(POINT, root_diagonal(POINT, flow.drift(POINT)))
    close("−½P∇tr Diag(H)^½", lowered, -gradient / 2, 1e-9)


def test_what_cannot_be_asked():
    flow = turning(lambda x: x[3])
    with refused(ValueError, "is_gradient_flow", "loop(0) = loop(1)", "apart"):
        diagnostics.is_gradient_flow(flow, at(0.0, 0.0), loop=lambda t: at(t, t))
    with refused(ValueError, "num_tangents", "at least 2"):
        diagnostics.is_gradient_flow(flow, at(0.0, 0.0), num_tangents=1)
    kinked = lambda t: at(2 * np.pi * jnp.abs(2 * t - 1) ** 0.5 + 2 * np.pi * t, 0.9)
    with refused(ValueError, "cannot integrate", "smooth all round"):
        diagnostics.is_gradient_flow(flow, at(0.0, 0.0), loop=kinked)
    one = mf.LevelSet(lambda x: x[:2] - 1)
    with refused(ValueError, "dimension 1 or more"):
        diagnostics.is_gradient_flow(Along(lambda x: x, one), jnp.ones(2), key=jr.key(1))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_what_is_no_metric(factor):
    flow = mf.RiemannianGradientFlow(mf.LevelSet(lambda x: jnp.sum(x**2) - 1), lambda x: x[0])
    metric = lambda point, vector: factor * vector
    with refused(ValueError, "metric", "symmetric and positive"):
        diagnostics.is_gradient_flow(flow, jnp.array([0.0, 0.6, 0.8]), metric=metric)


def test_places_off_the_manifold_are_refused():
    """The drift of a limit flow says nothing there, nor does a circulation round it."""
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    flow = mf.RiemannianGradientFlow(sphere, lambda x: x[0])
    start = jnp.array([0.0, 0.6, 0.8])
    with refused(ValueError, "point must lie on the manifold", "manifold.project(point)"):
        diagnostics.is_gradient_flow(flow, 1.1 * start)
    wide = lambda t: jnp.array(
        [(1 + jnp.sin(2 * jnp.pi * t)) * jnp.sin(2 * jnp.pi * t), 0.0, jnp.cos(2 * jnp.pi * t)]
    )
    with refused(ValueError, "loop must lie on the manifold", "leaves it at t = 0.125"):
        diagnostics.is_gradient_flow(flow, start, loop=wide)
