"""Stationary points of a loss that are no minima, and ranks smaller than the true one."""

import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import close

RESULTS = mf.RESULTS


def product(x):
    """Zero on a hyperbola; the origin is a saddle with value 1."""
    return (x[0] * x[1] - 1) ** 2


def paraboloid(x):
    """Of rank two in R³, with a third coordinate that is free."""
    return (2 * x[0] ** 2 + x[1] ** 2) / 2 + 0 * x[2]


SADDLES = {
    "product": (product, 1, [0.0, 0.0]),
    "difference": (lambda x: x[0] ** 2 - x[1] ** 2, 1, [0.0, 0.0]),
    "weakly": (lambda x: x[0] ** 2 - 1e-3 * x[1] ** 2 + x[1] ** 4, 1, [0.0, 0.0]),
    "by a cutoff": (product, 0.5, [0.0, 0.0]),
}


@pytest.mark.parametrize(("name", "dtype"), [*zip(SADDLES, [float] * 9), ("weakly", "float32")])
def test_saddles_are_not_taken_for_minima(name, dtype):
    fn, rank, point = SADDLES[name]
    manifold, point = mf.MinimizerManifold(mf.FunctionLoss(fn), rank), jnp.asarray(point, dtype)
    landed, info = manifold.project_with_info(point)
    assert bool(info.result == RESULTS.not_a_minimum), info.result
    assert bool(jnp.all(jnp.isnan(landed)))
    assert not bool(manifold.is_on(point)), "is_on"
    assert not bool(manifold.is_on(point, tol=1e-5)), "is_on with a tolerance"
    if name == "product":
        moved, info = manifold.retract_with_info(point, jnp.zeros(2, dtype))
        assert bool(info.result == RESULTS.not_a_minimum) and bool(jnp.all(jnp.isnan(moved)))


@pytest.mark.parametrize("rank", [None, 1])
def test_limit_of_gradient_flow_at_and_near_a_saddle(rank):
    loss = mf.FunctionLoss(product)
    what = loss if rank is None else mf.MinimizerManifold(loss, rank)
    starts = jnp.array([[0.0, 0.0], [1e-4, 1e-4]])
    limits, info = jax.vmap(lambda x: mf.limit_map_with_info(what, x))(starts)
    assert bool((info.result == RESULTS.not_a_minimum)[0]) and bool(jnp.all(jnp.isnan(limits[0])))
    # The flow leaves the saddle, slowly at first.
    close("limit from nearby", limits[1], jnp.ones(2), 1e-9)


def test_minima_stay_minima():
    """Also where the point is off by a tolerance, or eigenvalues are far apart."""
    hyperbola = mf.MinimizerManifold(mf.FunctionLoss(product), 1)
    for point in ([1.0, 1.0], [10.0, 0.1], [-0.2, -5.0]):
        assert bool(hyperbola.is_on(jnp.asarray(point))), point
    assert bool(hyperbola.is_on(jnp.array([1.001, 1.0]), tol=1e-2))
    flat = mf.FunctionLoss(lambda x: x[0] ** 2 + 1e-8 * x[1] ** 2 + 0 * x[2])
    assert bool(mf.MinimizerManifold(flat, 2).is_on(jnp.array([0.0, 0.0, 3.0])))


def test_rank_smaller_than_the_true_one_is_said():
    point = jnp.array([0.0, 0.0, 0.7])
    loss = mf.FunctionLoss(paraboloid)
    small, right = mf.MinimizerManifold(loss, 1), mf.MinimizerManifold(loss, 2)
    assert bool(right.is_on(point)) and not bool(small.is_on(point))
    _, info = small.project_with_info(point)
    assert bool(info.result == RESULTS.rank_too_small), info.result
    assert int(small.rank(point)) == 2, "the measured rank"
