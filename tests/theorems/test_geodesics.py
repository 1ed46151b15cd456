"""Geodesics and parallel transport by what they keep, not only by where they stay.

A curve can lie on a surface to rounding and still be no geodesic: Clairaut's, Joachimsthal's
and the angle of holonomy tell.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial

import manifoldflow as mf
from checks import at_most, close, refused

MAJOR, MINOR = 2.0, 0.7
AXES = jnp.array([1.0, 1.3, 0.8, 2.0, 1.6])


def ring(major, minor, x):
    return (jnp.hypot(x[0], x[1]) - major) ** 2 + x[2] ** 2 - minor**2


def torus_of(major, minor):
    """A sphere if major is 0."""
    return mf.LevelSet(Partial(ring, major, minor))


def weighted(weights, x):
    return jnp.sum(weights * x**2) - 1


def quadric(weights):
    """One program for all of a dimension."""
    return mf.LevelSet(Partial(weighted, weights))


torus = torus_of(jnp.array(MAJOR), jnp.array(MINOR))
ellipsoid = quadric(1 / AXES**2)
sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)


def on_torus(u=0.4, v=0.9):
    r = MAJOR + MINOR * jnp.cos(v)
    return jnp.array([r * jnp.cos(u), r * jnp.sin(u), MINOR * jnp.sin(v)])


def clairaut(x, v):
    """r²·du/dt, the angular momentum about the axis."""
    return x[0] * v[1] - x[1] * v[0]


def joachimsthal(x, v):
    return jnp.sum(x**2 / AXES**4) * jnp.sum(v**2 / AXES**2)


def velocity_at(manifold, point, velocity, time, **options):
    return mf.transport_along_geodesic(manifold, point, velocity, velocity, time, **options)


@pytest.mark.parametrize(
    ("manifold", "start", "invariant"),
    [(torus, on_torus(), clairaut), (ellipsoid, None, joachimsthal)],
    ids=["Clairaut, torus", "Joachimsthal, ellipsoid in five dimensions"],
)
def test_invariants_at_time_6(manifold, start, invariant):
    if start is None:
        start = manifold.project(jr.normal(jr.key(3), (5,)))
    velocity = manifold.random_tangent(start, jr.key(1))
    velocity = velocity / jnp.linalg.norm(velocity)
    (end,) = mf.geodesic(manifold, start, velocity, jnp.array([6.0]))
    moving = velocity_at(manifold, start, velocity, 6.0)
    close("invariant", invariant(end, moving), invariant(start, velocity), 1e-6)
    close("speed", jnp.linalg.norm(moving), 1.0, 1e-6)
    at_most("distance from the manifold", manifold.defect(end), 1e-12)
    assert bool(manifold.is_tangent(end, moving, tol=1e-7))  # two solves, with other steps


def latitude(angle, t):
    phase = 2 * jnp.pi * t
    sine = jnp.sin(angle)
    return jnp.array([sine * jnp.cos(phase), sine * jnp.sin(phase), jnp.cos(angle)])


@jax.jit
def carried_round(angle, vector):
    """One program for all angles."""
    return mf.parallel_transport(sphere, functools.partial(latitude, angle), vector)


@pytest.mark.parametrize("angle", [0.5, 1.0, 1.4])
def test_holonomy_of_latitude_circles(angle):
    """A vector carried round a circle at polar angle θ turns by 2π(1 − cos θ)."""
    east, south = jnp.array([0.0, 1.0, 0.0]), jnp.array([jnp.cos(angle), 0.0, -jnp.sin(angle)])
    carried = carried_round(angle, south)
    turned = jnp.arctan2(jnp.vdot(carried, east), jnp.vdot(carried, south)) % (2 * jnp.pi)
    close("holonomy", turned, (2 * np.pi * (1 - np.cos(angle))) % (2 * np.pi), 1e-6)
    close("length", jnp.linalg.norm(carried), 1.0, 1e-6)


@pytest.mark.parametrize(
    ("solver", "order", "coarsest"),
    [(dfx.Heun(), 2, 1 / 8), (dfx.Bosh3(), 3, 1 / 8), (dfx.Dopri5(), 5, 1 / 3)],
)
def test_the_order_of_the_solver_is_kept(solver, order, coarsest):
    start = on_torus()
    velocity = torus.tangent_projection(start, jnp.array([0.5, 1.0, 0.6]))
    exact = mf.exponential_map(
        torus, start, velocity, walk=mf.GeodesicOptions(rtol=1e-13, atol=1e-13)
    )
    steps = coarsest / jnp.array([1.0, 2.0, 4.0])
    walk = lambda h: mf.GeodesicOptions(solver, step_size=h)
    end = jax.jit(lambda h: mf.exponential_map(torus, start, velocity, walk=walk(h)))
    ends = [end(h) for h in steps]
    errors = [float(jnp.linalg.norm(end - exact)) for end in ends]
    slope = np.polyfit(np.log(np.asarray(steps)), np.log(errors), 1)[0]
    assert slope > order - 0.3, f"observed order {slope:.2f}, errors {errors}"


def test_great_circles_and_times_of_any_kind():
    point, velocity = jnp.array([0.6, 0.8, 0.0]), jnp.array([0.0, 0.0, 2.0])

    def circle(times):
        times = jnp.asarray(times)[:, None]
        return jnp.cos(2 * times) * point + jnp.sin(2 * times) * velocity / 2

    # As many of each kind: one program.
    for times in ([0.5, 1.0, 2.5], [0.0, 0.3, 0.3], [-0.5, -1.0, -1.0], [0.0, 0.0, 0.0]):
        close(f"{times}", mf.geodesic(sphere, point, velocity, times), circle(times), 1e-8)
    times = jnp.array([0.2, 0.5, 1.0])
    traced = jax.jit(lambda ts: mf.geodesic(sphere, point, velocity, ts))(times)
    close("traced times", traced, circle(times), 1e-8)
    constant = jax.jit(lambda v: mf.geodesic(sphere, point, v, times))(velocity)
    close("times that jit closes over", constant, circle(times), 1e-8)
    for times in ([1.0, 0.5], [-1.0, 1.0]):
        with refused(ValueError, "times must lead away from 0"):
            mf.geodesic(sphere, point, velocity, times)


def test_the_logarithm_takes_the_options_of_its_geodesics():
    """It inverts the map of these options, and not that of exact geodesics."""
    walk = mf.geometry.GeodesicOptions(solver=dfx.Heun(), step_size=0.5)
    point, other = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.6, 0.8])
    vector = mf.logarithm_map(sphere, point, other, walk=walk)
    close("there", mf.exponential_map(sphere, point, vector, walk=walk), other, 1e-8)
    length = float(mf.distance(sphere, point, other, walk=walk))
    close("its length", length, jnp.linalg.norm(vector), 1e-12)
    assert abs(length - np.pi / 2) > 1e-4, length


def test_exponential_and_logarithm():
    point = ellipsoid.project(jr.normal(jr.key(3), (5,)))
    vector = ellipsoid.random_tangent(point, jr.key(2))
    vector = 0.7 * vector / jnp.linalg.norm(vector)
    other = mf.exponential_map(ellipsoid, point, vector)
    close("log(exp v)", mf.logarithm_map(ellipsoid, point, other), vector, 1e-7)
    close("distance", mf.distance(ellipsoid, point, other), 0.7, 1e-7)
    close("symmetric", mf.distance(ellipsoid, other, point), 0.7, 1e-7)


def test_derivative_of_the_distance():
    """∇_q d(p, q) is the unit velocity at which the geodesic arrives."""
    point, vector = jnp.array([0.6, 0.8, 0.0]), jnp.array([0.8, -0.6, 0.5])
    length = jnp.linalg.norm(vector)
    other = jnp.cos(length) * point + jnp.sin(length) * vector / length
    arriving = -jnp.sin(length) * point + jnp.cos(length) * vector / length
    slope = jax.jit(jax.grad(lambda q: mf.distance(sphere, point, q)))
    gradient = slope(other)
    close("∇d", sphere.tangent_projection(other, gradient), arriving, 1e-6)
    # To second order its implicit step is not the logarithm.
    with refused(NotImplementedError, "first derivatives only"):
        jax.jacrev(slope)(other)


def test_a_geodesic_that_is_not_there():
    """Two sheets of a hyperboloid: an error that says so, and NaN; members of a batch are in
    test_failed_members."""
    sheets, here = quadric(jnp.array([1.0, -1.0, -1.0, -1.0, -1.0])), jnp.eye(5)[0]
    there, beyond = jnp.array([[jnp.sqrt(2.0), 1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0, 0.0]])
    with refused(RuntimeError, "Shooting found no geodesic"):
        mf.logarithm_map(sheets, here, beyond)
    search = lambda q: mf.geometry.logarithm_map_with_info(sheets, here, q)
    (found, good), (lost, bad) = search(there), search(beyond)
    assert bool(jnp.isfinite(found).all()) and bool(jnp.isnan(lost).all())
    assert bool(good.is_successful) and not bool(bad.is_successful)
    assert "Shooting found no geodesic" in mf.RESULTS[bad.result]


def test_transport_keeps_inner_products_and_undoes_itself():
    point = ellipsoid.project(jr.normal(jr.key(3), (5,)))
    u, v, w = (ellipsoid.random_tangent(point, jr.key(i)) for i in range(3))
    carry = lambda x: mf.transport_along_geodesic(ellipsoid, point, u, x, 1.3)
    close("⟨v, w⟩", jnp.vdot(carry(v), carry(w)), jnp.vdot(v, w), 1e-7)
    end = mf.geodesic(ellipsoid, point, u, [1.3])[0]
    back = mf.transport_along_geodesic(ellipsoid, end, carry(u), carry(v), -1.3)
    close("there and back", back, v, 1e-7)


def test_paths_that_leave_the_manifold_are_refused():
    with refused(ValueError, "The path must lie on the manifold", "at time 0.5"):
        mf.parallel_transport(
            sphere, lambda t: jnp.array([1 - 2 * t, 2 * t * (1 - t), 0.0]), jnp.eye(3)[1]
        )


def test_derivatives_of_a_geodesic():
    """In its velocity, by both modes, against differences; in the time, against γ′.

    In time also where a solver would not take a step, and backwards, round an equator.
    """
    point, velocity = on_torus(), jnp.array([0.5, 1.0, 0.6])
    change = torus.tangent_projection(point, jnp.array([0.3, -0.2, 1.0]))
    h, weights = 1e-5, jnp.array([1.0, -2.0, 0.5])
    forward = mf.GeodesicOptions(adjoint=dfx.ForwardMode())

    @jax.jit
    def pushed(velocity):
        end = lambda v: mf.exponential_map(torus, point, v, walk=forward)
        return jax.jvp(end, (velocity,), (change,))

    @jax.jit
    def pulled(major, minor, point, velocity, time):
        path = lambda v, t: mf.geodesic(torus_of(major, minor), point, v, t[None])[0]
        end = lambda v, t: jnp.vdot(weights, path(v, t))
        return jax.grad(end, argnums=(0, 1))(velocity, time)

    differences = (pushed(velocity + h * change)[0] - pushed(velocity - h * change)[0]) / (2 * h)
    close("forward mode", pushed(velocity)[1], differences, 1e-6)
    in_velocity, _ = pulled(MAJOR, MINOR, point, velocity, 1.0)
    expected = jnp.vdot(weights, differences)
    close("reverse mode", jnp.vdot(in_velocity, change), expected, 1e-6)
    point, velocity = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.6, 0.0])
    times = jnp.array([0.0, 1.5, -1.5])
    slopes = jnp.stack([pulled(0.0, 1.0, point, velocity, time)[1] for time in times])
    turned = 0.6 * times
    moving = -0.6 * weights[0] * jnp.sin(turned) + 0.6 * weights[1] * jnp.cos(turned)
    close("γ′", slopes, moving, 1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_both_precisions(dtype):
    point = jnp.array([0.6, 0.8, 0.0], dtype)
    velocity = jnp.array([0.0, 0.0, 1.0], dtype)
    end = mf.geodesic(sphere, point, velocity, jnp.array([3.0], dtype))[0]
    assert end.dtype == dtype
    expected = np.cos(3.0) * np.array([0.6, 0.8, 0.0]) + np.sin(3.0) * np.array([0, 0, 1.0])
    close("great circle", end, expected, 1e-3 if dtype == jnp.float32 else 1e-8)


def test_closed_forms_have_derivatives_where_they_vanish():
    sphere, torus = mf.models.Sphere(2), mf.models.FlatTorus([1.0, 2.0])
    point = jnp.array([0.0, 0.0, 1.0])
    straight = lambda v: sphere.exponential(point, v)[2]
    bend = jax.hessian(straight)(jnp.zeros(3))
    close("−|v|²/2 of a great circle", bend, -jnp.eye(3), 1e-12)
    close("at itself", jax.grad(sphere.distance)(point, point), jnp.zeros(3), 1e-12)
    here, there = jnp.array([1.0, 0.0, 2.0, 0.0]), jnp.array([1.0, 0.0, 0.0, 2.0])
    slope = jax.grad(torus.distance, argnums=1)(here, there)
    close("one circle agrees", slope @ jnp.array([0.0, 0.0, -1.0, 0.0]), 1.0, 1e-12)


def test_no_way_between_two_components():
    rotations = mf.models.SpecialOrthogonal(3)
    assert jnp.isinf(rotations.distance(jnp.eye(3), -jnp.eye(3)))
