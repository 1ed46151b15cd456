"""Sets that are no manifolds, constraints that repeat, empty sets, NaN: never a silent answer."""

import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import close, refused

sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
double = mf.LevelSet(lambda x: (jnp.sum(x**2) - 1) ** 2)
cone = mf.LevelSet(lambda x: x[0] ** 2 + x[1] ** 2 - x[2] ** 2)

ONES = jnp.ones(3)
QUESTIONS = {
    "second fundamental form": lambda m, x: mf.second_fundamental_form(m, x, ONES, ONES),
    "mean curvature": mf.mean_curvature,
    "scalar curvature": mf.scalar_curvature,
    "Ricci curvature": lambda m, x: mf.ricci_curvature(m, x, ONES),
    "covariant Hessian": lambda m, x: mf.covariant_hessian(m, jnp.sum, x).mv(ONES),
    "Laplacian": lambda m, x: mf.laplace_beltrami(m, jnp.sum, x),
    "shape operator": lambda m, x: mf.shape_operator(m, x, ONES).mv(ONES),
}  # fmt: skip


@pytest.mark.parametrize(
    "start", [[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.1, 0.3, 0.1], [0.36, 0.48, 0.8]]
)
def test_a_constraint_that_vanishes_with_its_slope(start):
    """(|x|² − 1)²: the same sphere, written so that J = 0 on it."""
    start = jnp.array(start)
    with refused(RuntimeError, "The constraint's Jacobian vanishes", "f in place of f²"):
        double.project(start)
    assert bool(double.project_with_info(start)[1].result == mf.RESULTS.rank_zero)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_units_of_the_constraint_do_not_matter(factor):
    """Neither for what is a double zero, nor for what is not."""
    start = jnp.array([1.0, 1.0, 0.3])
    scaled = mf.LevelSet(lambda x: factor * (jnp.sum(x**2) - 1))
    close("project", scaled.project(start), sphere.project(start), 1e-12)
    twice = mf.LevelSet(lambda x: factor * (jnp.sum(x**2) - 1) ** 2)
    assert bool(twice.project_with_info(start)[1].result == mf.RESULTS.rank_zero)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tip_of_a_cone(name):
    with refused(RuntimeError, "The constraint's Jacobian vanishes"):
        QUESTIONS[name](cone, jnp.zeros(3))


def test_the_rest_of_a_cone_is_flat():
    point = jnp.array([3.0, 4.0, 5.0])
    u, v = cone.random_tangent(point, jr.key(0)), cone.random_tangent(point, jr.key(1))
    close("K + 1", 1 + mf.sectional_curvature(cone, point, u, v), 1.0, 1e-12)


@pytest.mark.parametrize("name", QUESTIONS)
def test_nan(name):
    with refused(RuntimeError, "NaN or infinity"):
        QUESTIONS[name](sphere, jnp.array([jnp.nan, 0.0, 1.0]))


def test_an_empty_set():
    empty = mf.LevelSet(lambda x: jnp.sum(x**2) + 1)
    with refused(RuntimeError, "No point of the manifold was found"):
        empty.project(jnp.array([0.5, 0.2, 0.1]))
    with refused(RuntimeError):
        mf.geodesic(empty, jnp.array([0.5, 0.2, 0.1]), jnp.ones(3), [1.0])


def test_a_repeated_constraint_is_handled_by_rank():
    repeated = mf.LevelSet(lambda x: jnp.stack([jnp.sum(x**2) - 1, 3 * (jnp.sum(x**2) - 1)]))
    point, u = jnp.array([0.6, 0.8, 0.0]), jnp.array([0.0, 0.0, 1.0])
    close("mean curvature", mf.mean_curvature(repeated, point), -2 * point, 1e-9)
    close("scalar curvature", mf.scalar_curvature(repeated, point), 2.0, 1e-9)
    end = mf.exponential_map(repeated, point, u)
    close("geodesic", end, jnp.cos(1.0) * point + jnp.sin(1.0) * u, 1e-8)
    check = mf.diagnostics.check_dimension(repeated, point)
    assert not check and (check.rank, check.codimension) == (1, 2)
    assert mf.diagnostics.check_dimension(sphere, point)


def test_parallel_tangents_span_no_plane():
    point, u = jnp.array([0.6, 0.8, 0.0]), jnp.array([0.0, 0.0, 1.0])
    for v in (2 * u, jnp.zeros(3), point):
        with refused(RuntimeError, "two independent tangents"):
            mf.sectional_curvature(sphere, point, u, v)
    # Nearly parallel ones still do.
    near = u + 1e-6 * jnp.array([0.8, -0.6, 0.0])
    close("K", mf.sectional_curvature(sphere, point, u, near), 1.0, 1e-9)
    close("K", mf.sectional_curvature(sphere, point, 1e-170 * u, 1e160 * near), 1.0, 1e-9)


def test_wrong_shapes_are_named():
    point = jnp.array([0.6, 0.8, 0.0])
    with refused(ValueError, "structure and shapes"):
        mf.second_fundamental_form(sphere, point, jnp.ones(2), jnp.ones(3))
    with refused(ValueError, "The field's value", "structure and shapes"):
        mf.divergence(sphere, lambda x: jnp.ones(2), point)
    with refused(ValueError, "num_samples"):
        mf.scalar_curvature(sphere, point, key=jr.key(0), num_samples=1)
