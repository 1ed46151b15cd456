"""Every leaf keeps its dtype: points in float32 beside others under x64, and mixed ones.

What a function gives is known from tracing it; two are also run.
"""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import manifoldflow as mf
from checks import at_most, equal
from manifoldflow import _tree, geometry, linalg

CIRCLE = mf.LevelSet(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2) - 1)
WELL = mf.MinimizerManifold(CIRCLE.loss, 1)
WALK = geometry.GeodesicOptions(solver=dfx.Heun(), step_size=0.5)


def first(p):
    return jnp.sum(p["a"])


def solved(flow, p, **options):
    solution = mf.solve(flow, p, num_saves=2, throw=False, **options)
    return solution.final, solution.points


def minimized(p, method=None):
    solution = mf.minimize(CIRCLE, first, p, method=method, throw=False)
    return solution.final, solution.points


FLOW, MOTION = mf.RiemannianGradientFlow(CIRCLE, first), mf.BrownianMotion(CIRCLE)
FUNCTIONS = {
    "project": lambda p, o, t: CIRCLE.project(p),
    "retract": lambda p, o, t: CIRCLE.retract(p, t),
    "newton_correct": lambda p, o, t: CIRCLE.newton_correct(p)[0],
    "tangent_projection": lambda p, o, t: CIRCLE.tangent_projection(p, t),
    "random_tangent": lambda p, o, t: CIRCLE.random_tangent(p, jr.key(0)),
    "riemannian_gradient": lambda p, o, t: mf.riemannian_gradient(CIRCLE, first, p),
    "project on minimisers": lambda p, o, t: WELL.project(p),
    "limit_map": lambda p, o, t: mf.limit_map(CIRCLE, p),
    "closest_point": lambda p, o, t: mf.closest_point(CIRCLE, p),
    "exponential_map": lambda p, o, t: mf.exponential_map(CIRCLE, p, t),
    "geodesic": lambda p, o, t: mf.geodesic(CIRCLE, p, t, jnp.ones(1), walk=WALK),
    "logarithm_map": lambda p, o, t: mf.logarithm_map(CIRCLE, p, o),
    "transport": lambda p, o, t: mf.transport_along_geodesic(CIRCLE, p, t, t, 1.0, walk=WALK),
    "inverse_retract": lambda p, o, t: mf.inverse_retract(
        geometry.ProjectionRetraction(), CIRCLE, p, o
    ),
    "parallel_transport": lambda p, o, t: mf.parallel_transport(
        CIRCLE, lambda s: CIRCLE.project(_tree.add(p, _tree.scale(s, t))), t, walk=WALK
    ),
    "solve": lambda p, o, t: solved(FLOW, p, end_time=0.5),
    "solve to an early end": lambda p, o, t: solved(
        FLOW, p, end_time=0.5, until=mf.Stationary(1e-3)
    ),
    "walk": lambda p, o, t: solved(MOTION, p, end_time=0.1, step_size=0.05, key=jr.key(0)),
    "minimize": lambda p, o, t: minimized(p),
    "minimize by descent": lambda p, o, t: minimized(p, mf.RiemannianGradientDescent()),
    "minimize by optax": lambda p, o, t: minimized(p, mf.RiemannianOptax(optax.adam(0.1))),
}
MIXED, NARROW = ("float32", "float64"), ("float32", "float32")


def problem(dtypes):
    point = lambda *values: {
        name: jnp.asarray([value], dtype) for name, value, dtype in zip("ab", values, dtypes)
    }
    return point(0.6, 0.8), point(0.8, 0.6), point(0.08, -0.06)


# Several seconds each to trace: one kind of point will do.
LONG = {"geodesic", "transport", "parallel_transport", "inverse_retract", "solve to an early end"}
LONG |= {"minimize by descent", "minimize by optax", "logarithm_map"}
CASES = [(name, dtypes) for name in FUNCTIONS for dtypes in (MIXED, NARROW)]
CASES = [(name, dtypes) for name, dtypes in CASES if dtypes == MIXED or name not in LONG]


@pytest.mark.quick
@pytest.mark.parametrize("name, dtypes", CASES)
def test_leaves_keep_their_dtype(name, dtypes):
    found = eqx.filter_eval_shape(FUNCTIONS[name], *problem(dtypes))
    for leaves in found if isinstance(found, tuple) else [found]:
        equal(name, tuple(str(leaves[leaf].dtype) for leaf in "ab"), dtypes)


@pytest.mark.parametrize("dtypes", [MIXED, NARROW])
def test_values(dtypes):
    """The closest point of 1.5·p is p; the largest eigenvalue of ∇²½f² there is 4."""
    point, *_ = problem(dtypes)
    found = mf.closest_point(CIRCLE, _tree.scale(1.5, point))
    at_most("‖closest − p‖", _tree.norm(_tree.subtract(found, point)), 3e-7)
    equal("dtypes", tuple(str(found[leaf].dtype) for leaf in "ab"), dtypes)
    largest = linalg.largest_eigenvalues(CIRCLE.loss.hessian(point))
    assert bool(largest.is_successful), largest.residuals
    at_most("|λ − 4|", jnp.abs(largest.values[0] - 4), 1e-5)


def test_distance_in_single_precision_under_x64():
    point, other, _ = problem(NARROW)
    found = mf.distance(CIRCLE, point, other)
    equal("dtype", str(found.dtype), "float32")
    at_most("error", jnp.abs(found - (jnp.arctan2(0.8, 0.6) - jnp.arctan2(0.6, 0.8))), 1e-5)
