"""What failed is NaN, and so are its derivatives; the other members of a batch never notice."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most
from manifoldflow import geometry, symmetry

SPHERE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
TANGENT = jnp.array([0.3, -0.2])
# The first has no normal space to come down along.
STARTS = jnp.array([[0.0, 0.0], [0.6, 0.9]])
FLOW = mf.RiemannianGradientFlow(SPHERE, lambda x: x[0] + x[1] ** 2)
OTHER = jnp.array([0.8, 0.6])
WALK = geometry.Walk(solver=dfx.Heun(), step_size=0.5)


def rotated(x, angle):
    """On the circle for the second start, at its centre for the first."""
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return turn @ x / jnp.linalg.norm(STARTS[1])


def solved(x):
    solution = mf.solve(
        FLOW, x, end_time=0.5, step_size=0.25, solver=dfx.Heun(), throw=False,
        observe={"sum": jnp.sum},
    )  # fmt: skip
    return solution.final, solution.points[1:], solution.observables["sum"][1:]


def walked(x):
    walk = mf.solve(
        mf.BrownianMotion(SPHERE), x, end_time=0.1, step_size=0.05, key=jr.key(0), throw=False
    )
    return walk.final, walk.points[1:]


SEARCHES = {
    "solve": solved,
    "walk": walked,
    "geodesic": lambda x: mf.geodesic(SPHERE, x, TANGENT, jnp.ones(1), walk=WALK, throw=False),
    "closest_point": lambda x: mf.closest_point(SPHERE, x, throw=False),
    "project": lambda x: SPHERE.project(x, throw=False),
    "retract": lambda x: SPHERE.retract(x, TANGENT, throw=False),
    "limit_map": lambda x: mf.limit_map(SPHERE, x, max_steps=10, throw=False),
    "tangent_projection": lambda x: SPHERE.tangent_projection(x, TANGENT, throw=False),
    "logarithm_map": lambda x: mf.logarithm_map(SPHERE, x, OTHER, throw=False),
    "transport_along_geodesic": lambda x: mf.transport_along_geodesic(
        SPHERE, x, TANGENT, OTHER, 1.0, walk=WALK, throw=False
    ),
    "parallel_transport": lambda x: mf.parallel_transport(
        SPHERE, lambda t: rotated(x, t), TANGENT, walk=WALK, throw=False
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_values_and_derivatives(name):
    def both(x):
        value, pullback = jax.vjp(SEARCHES[name], x)
        return value, pullback(jax.tree.map(jnp.ones_like, value))[0]

    # One program for the batch with a failed member and for one without.
    both = jax.jit(jax.vmap(both))
    together, healthy = both(STARTS), both(jnp.stack([STARTS[1], STARTS[1]]))
    for what, members, others in zip(("value", "gradient"), together, healthy):
        for leaf, expected in zip(jax.tree.leaves(members), jax.tree.leaves(others)):
            assert bool(jnp.all(jnp.isnan(leaf[0]))), f"{what} of what failed: {leaf[0]}"
            at_most(f"{what} of the other", jnp.max(jnp.abs(leaf[1] - expected[1])), 1e-14)


def test_a_minimiser_has_values_only():
    """It has no derivative: the value of what failed is NaN, the other's what it is alone."""
    found = jax.jit(
        jax.vmap(lambda x: mf.minimize(SPHERE, lambda p: p[0] + p[1] ** 2, x, throw=False).final)
    )
    together, healthy = found(STARTS), found(jnp.stack([STARTS[1], STARTS[1]]))
    assert bool(jnp.all(jnp.isnan(together[0]))), together
    at_most("the other", jnp.max(jnp.abs(together[1] - healthy[1])), 1e-14)


def test_balance_of_noise():
    """A member with a coordinate that is no number has no equilibrium, and no derivative."""
    one = symmetry.ExponentialSymmetry(jnp.array([1.0, -1.0]))
    data = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])

    def found(x):
        return symmetry.noise_equilibrium(
            one,
            lambda p, e: (p[0] * p[1] * e[0] - e[1]) ** 2,
            x,
            data,
            noise_scale=0.1,
            throw=False,
        )

    both = jax.jit(jax.vmap(jax.value_and_grad(found)))
    starts = jnp.array([[jnp.nan, 1.0], [0.6, 0.9]])
    together, healthy = both(starts), both(jnp.stack([starts[1], starts[1]]))
    for members, others in zip(together, healthy):
        assert bool(jnp.all(jnp.isnan(members[0]))), members
        at_most("the other", jnp.max(jnp.abs(members[1] - others[1])), 1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_search_from_no_number_says_so(dtype):
    """NaN, and numbers whose squares are none: not a point that is merely off the manifold."""
    far = 1e30 if dtype == "float32" else 1e200
    starts = jnp.array([[jnp.nan, 0.5], [far, far], [0.6, 0.9]], dtype)
    searches = {
        "project": lambda x: SPHERE.project_with_info(x)[1].result,
        "retract": lambda x: SPHERE.retract_with_info(x, TANGENT.astype(dtype))[1].result,
    }
    for name, search in searches.items():
        lost, beyond, found = (search(start) for start in starts)
        assert lost == mf.RESULTS.nonfinite, (name, lost)
        assert beyond == mf.RESULTS.nonfinite, (name, beyond)
        assert found == mf.RESULTS.successful, (name, found)
