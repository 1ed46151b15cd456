"""Where the constraint's derivative vanishes there are no tangents: that is said, or NaN."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import close, norm, refused
from manifoldflow import geometry

CONE = mf.LevelSet(lambda x: jnp.sum(x**2))
TIP, OTHER = jnp.zeros(3), jnp.array([0.0, 0.6, 0.8])
VECTOR = jnp.array([1.0, 2.0, 3.0])

ASKED = {
    "tangent_projection": lambda p: CONE.tangent_projection(p, VECTOR),
    "normal_projection": lambda p: CONE.normal_projection(p, VECTOR),
    "random_tangent": lambda p: CONE.random_tangent(p, jr.key(0)),
    "riemannian_gradient": lambda p: mf.riemannian_gradient(CONE, jnp.sum, p),
    "limit_map_derivative": lambda p: mf.limit_map_derivative(CONE, p, VECTOR),
    "divergence": lambda p: mf.divergence(CONE, lambda x: x, p),
    "covariant_derivative": lambda p: mf.covariant_derivative(CONE, lambda x: x, p, VECTOR),
}


@pytest.mark.parametrize("name", ASKED)
def test_no_tangents_at_a_point_without_normal_space(name):
    with refused(eqx.EquinoxRuntimeError, "Jacobian vanishes"):
        jax.block_until_ready(ASKED[name](TIP))
    assert bool(jnp.all(jnp.isfinite(ASKED[name](OTHER)))), "elsewhere all is well"


def test_nan_for_the_member_that_asks_there():
    points = jnp.stack([TIP, OTHER])
    project = lambda p, v: CONE.tangent_projection(p, v, throw=False)
    together = jax.jit(jax.vmap(project, (0, None)))(points, VECTOR)
    slopes = jax.vmap(jax.jacobian(project, argnums=1), (0, None))(points, VECTOR)
    for what, (lost, kept) in {"value": together, "derivative": slopes}.items():
        assert bool(jnp.all(jnp.isnan(lost))), what
        assert bool(jnp.all(jnp.isfinite(kept))), what
    close("the other member", together[1], CONE.tangent_projection(OTHER, VECTOR), 1e-15)
    assert not bool(CONE.is_tangent(TIP, VECTOR)) and not bool(CONE.is_tangent(TIP, 0 * VECTOR))


def test_inside_jit_it_is_an_error_too():
    inside = eqx.filter_jit(lambda p: CONE.tangent_projection(p, VECTOR))
    with refused(eqx.EquinoxRuntimeError, "Jacobian vanishes"):
        jax.block_until_ready(inside(TIP))


def test_the_way_may_pass_there():
    """What loops use looks at nothing: P is then the identity."""
    gradient = geometry.gradient_along(CONE, jnp.sum, TIP)
    close("∇F", gradient, jnp.ones(3), 1e-15)
    assert norm(geometry.gradient_along(CONE, lambda x: jnp.sum(x**2), OTHER)) < 1e-15


def test_what_loops_share():
    """A gradient with its local geometry, and a local geometry with a space that is known."""
    loss = mf.LeastSquares(jnp.eye(3)[:2], jnp.ones(2), predict=lambda p, x: jnp.dot(p**3, x))
    manifold, point = mf.ZeroLossManifold(loss), jnp.array([1.0, 1.1, 0.4])
    trace = lambda local: local.hessian_trace()
    gradient, local = geometry.potential_gradient(manifold, trace, point)
    expected = jax.grad(loss.trace_gauss_newton)(point)
    close("∇F", gradient, expected, 1e-14)
    close("P∇F", local.space.tangent(gradient), manifold.tangent_projection(point, expected), 1e-14)
    for known in (None, local.space):
        bent = manifold.local(point, space=known).mean_curvature()
        close("tr II", bent, mf.mean_curvature(manifold, point), 1e-14)


def test_an_equation_without_slope_that_does_not_hold():
    """No step can lower it: such a point is not on the manifold, nor is any other."""
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    contradiction = mf.LevelSet(lambda x: jnp.array([jnp.sum(x**2) - 1, 0 * x[0] + 1e-3]))
    for single in (False, True):
        cast = lambda x, single=single: x.astype("float32" if single else "float64")
        assert not bool(sphere.is_on(cast(TIP))), "the centre of a sphere"
        assert bool(sphere.is_on(cast(OTHER)))
        assert not bool(contradiction.is_on(cast(OTHER))), "a contradiction"
        _, info = contradiction.project_with_info(cast(VECTOR))
        assert info.result == mf.RESULTS.not_on_manifold, info.result
    harmless = mf.LevelSet(lambda x: jnp.array([jnp.sum(x**2) - 1, 0 * x[0]]))
    assert bool(harmless.is_on(harmless.project(VECTOR)))


def test_a_path_off_the_manifold_inside_jit():
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    path = lambda size: lambda t: size * jnp.array([0.0, jnp.cos(t), jnp.sin(t)])
    moved = jax.jit(lambda size: mf.parallel_transport(sphere, path(size), VECTOR, throw=False))
    assert bool(jnp.all(jnp.isfinite(moved(1.0)))) and bool(jnp.all(jnp.isnan(moved(1.1))))
