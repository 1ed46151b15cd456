"""Retractions: their order, their inverses, and where they differ."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, refused
from manifoldflow import manifolds

RETRACTIONS = [mf.NewtonRetraction(), mf.ProjectionRetraction(), mf.LimitMapRetraction()]
NAMES = ["Newton", "projection", "limit map"]

# The loss ½f² is steeper on one side of the curve: Φ differs from the closest point.
bowl = mf.LevelSet(lambda x: x[1] - 0.4 * x[0] ** 2 + x[1] * x[2] - 0.3 * x[2] ** 2 * x[0])
ellipsoid = mf.LevelSet(lambda x: jnp.sum((x / jnp.array([1.0, 1.5, 0.8])) ** 2) - 1)


@pytest.fixture
def point():
    return bowl.project(jnp.array([0.5, 0.2, 0.3]))


@pytest.mark.parametrize("retraction", RETRACTIONS, ids=NAMES)
def test_second_order(retraction, point):
    check = mf.diagnostics.check_retraction(bowl, retraction, point, jr.key(0))
    assert check and abs(check.slope - 3) <= 0.1, check
    assert retraction.order == 2


class FirstOrder(mf.AbstractRetraction):
    """To the side by |v|², which a second-order check must see."""

    @property
    def order(self):
        return 2

    def with_info(self, manifold, point, vector):
        skew = jnp.cross(manifold.normal_projection(point, jnp.ones(3)), vector)
        return manifold.retract_with_info(point, vector + jnp.linalg.norm(vector) * skew)

    def inverse_with_info(self, manifold, point, other):
        raise AssertionError("not asked for")


def test_a_retraction_of_first_order_is_rejected(point):
    check = mf.diagnostics.check_retraction(bowl, FirstOrder(), point, jr.key(0))
    assert not check and abs(check.slope - 2) <= 0.1, check
    assert "FAILS" in str(check) and "expected 3" in str(check)


@pytest.mark.parametrize("retraction", RETRACTIONS, ids=NAMES)
def test_the_inverse_undoes_it(retraction, point):
    vector = 0.2 * bowl.tangent_projection(point, jnp.array([1.0, 0.3, -0.5]))
    there = retraction(bowl, point, vector)
    assert bool(bowl.is_on(there))
    close("R⁻¹(R(v))", mf.inverse_retract(retraction, bowl, point, there), vector, 1e-9)


@pytest.mark.parametrize("retraction", RETRACTIONS, ids=NAMES)
def test_no_inverse_far_away(retraction):
    """The other side of an ellipsoid is no retraction of any tangent here."""
    here, there = jnp.array([1.0, 0.0, 0.0]), jnp.array([-1.0, 0.0, 0.0])
    with refused(RuntimeError):
        mf.inverse_retract(retraction, ellipsoid, here, there)
    lost = mf.inverse_retract(retraction, ellipsoid, here, there, throw=False)
    assert bool(jnp.isnan(lost).all())


def second_difference(fn, h=1e-3):
    return (fn(h) - 2 * fn(0.0) + fn(-h)) / h**2


def test_closest_point_and_limit_map_differ_for_normal_displacements(point):
    """∂²[n, n] is 0 for the closest point, −P∂²(∇L)[𝓛_H⁻¹(nnᵀ)] for Φ."""
    normal = bowl.normal_projection(point, jnp.array([0.3, 1.0, 0.2]))
    normal = normal / jnp.linalg.norm(normal)
    nearest = second_difference(lambda t: mf.closest_point(bowl, point + t * normal))
    at_most("closest point", jnp.linalg.norm(nearest), 1e-5)
    limit = second_difference(lambda t: mf.limit_map(bowl, point + t * normal))
    expected = mf.limit_map_second_derivative(bowl, point, normal[:, None])
    close("Φ", limit, expected, 1e-4)
    assert float(jnp.linalg.norm(expected)) > 0.01, "the two do not differ here"


@pytest.mark.quick
def test_closest_point_is_the_closest():
    """The gap is normal, and no other of many points of the ellipsoid is nearer."""
    angles = jr.uniform(jr.key(0), (2, 4000)) * jnp.array([[jnp.pi], [2 * jnp.pi]])
    sine = jnp.sin(angles[0])
    unit = jnp.stack([sine * jnp.cos(angles[1]), sine * jnp.sin(angles[1]), jnp.cos(angles[0])], 1)
    cloud = unit * jnp.array([1.0, 1.5, 0.8])
    for target in (jnp.array([1.2, 0.9, 0.5]), jnp.array([0.5, 0.6, 0.3])):
        found = mf.closest_point(ellipsoid, target)
        gap = target - found
        at_most("tangent part of the gap", jnp.linalg.norm(
            ellipsoid.tangent_projection(found, gap)), 1e-9)  # fmt: skip
        nearest = jnp.min(jnp.linalg.norm(cloud - target, axis=1))
        assert float(jnp.linalg.norm(gap)) <= float(nearest) + 1e-9


def test_derivative_of_the_closest_point():
    target, change = jnp.array([1.2, 0.9, 0.5]), jnp.array([0.3, -0.4, 0.2])
    weights = jnp.array([1.0, 2.0, -1.0])

    @jax.jit
    def value_and_derivatives(target):
        """All from one program: along the change, and backwards."""
        value, along = jax.linearize(lambda x: mf.closest_point(ellipsoid, x), target)
        (pulled,) = jax.linear_transpose(along, target)(weights)
        return value, along(change), pulled

    (above, *_), (below, *_) = (value_and_derivatives(target + t * change) for t in (1e-5, -1e-5))
    expected = (above - below) / 2e-5
    _, forward, pulled = value_and_derivatives(target)
    close("forward", forward, expected, 1e-6)
    close("reverse", pulled @ change, weights @ expected, 1e-6)


def test_one_failed_member_of_a_batch():
    """An empty set: nothing to be found, and said so."""
    empty = mf.LevelSet(lambda x: jnp.sum(x**2) + 1)
    with refused(RuntimeError, "No point of the manifold"):
        mf.closest_point(empty, jnp.ones(3))
    targets = jnp.array([[1.2, 0.9, 0.5], [jnp.nan, 0.0, 0.0]])
    found = jax.vmap(lambda x: mf.closest_point(ellipsoid, x, throw=False))(targets)
    assert bool(jnp.isfinite(found[0]).all()) and bool(jnp.isnan(found[1]).all())
    _, info = jax.vmap(lambda x: mf.geometry.closest_point_with_info(ellipsoid, x))(targets)
    assert info.is_successful.tolist() == [True, False]


def test_reverse_mode_in_single_precision():
    """Where rules of derivatives solve by loops, which have no transpose of their own."""
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    point, vector = jnp.array([0.0, 0.0, 1.0], jnp.float32), jnp.array([0.5, 0, 0], jnp.float32)
    slope = jax.jit(jax.grad(lambda v: mf.NewtonRetraction()(sphere, point, v)[2]))(vector)
    close("retract", slope[0], -0.5 / np.sqrt(0.75), 1e-5)
    project = jax.grad(lambda x: sphere.project(x)[0])
    slopes = jax.jit(jax.vmap(project))(jnp.array([[0.5, 0.5, 1.0], [0.5, 1.0, 0.5]], jnp.float32))
    expected = jnp.array([[5.0, -1.0, -2.0], [5.0, -2.0, -1.0]]) / 6
    close("project, over a batch", slopes, expected, 1e-5)
    slope = jax.jit(jax.grad(lambda v: mf.exponential_map(sphere, point, v)[0]))(vector)
    close("exponential map", slope[0], np.cos(0.5), 1e-4)


class RadialRetraction(manifolds.AbstractLandingRetraction):
    """Back to the unit sphere along the radius."""

    def land(self, manifold, point):
        landed = point / jnp.linalg.norm(point)
        one, defect = jnp.asarray(1), manifold.defect(landed)
        return landed, mf.Info(mf.RESULTS.successful, defect, one, one)


@pytest.mark.quick
def test_a_landing_of_ones_own():
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    point = jnp.array([0.0, 0.6, 0.8])
    check = mf.diagnostics.check_retraction(sphere, RadialRetraction(), point, jr.key(0))
    assert check and abs(check.slope - 3) <= 0.1, check
