"""The covariant Hessian is the second derivative along geodesics [Gatmiry2024, Lemma 8]."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import pytest

import manifoldflow as mf
from checks import at_most, close
from manifoldflow import _tree
from zoo import data, mlp


class Bent(eqx.Module):
    """Three random equations with quadratic and sine terms, in seven unknowns."""

    linear: jax.Array
    quadratic: jax.Array
    level: jax.Array

    def __call__(self, x):
        return (
            self.linear @ jnp.sin(x) + jnp.einsum("kij,i,j->k", self.quadratic, x, x) - self.level
        )


def bent(seed):
    keys = jr.split(jr.key(seed), 3)
    fn = Bent(jr.normal(keys[0], (3, 7)), 0.3 * jr.normal(keys[1], (3, 7, 7)), jnp.zeros(3))
    point = jr.normal(keys[2], (7,))
    return mf.LevelSet(eqx.tree_at(lambda f: f.level, fn, fn(point))), point


def wave(x):
    return jnp.sum(jnp.cos(jnp.arange(1.0, 8.0) * x)) + jnp.prod(x[:3])


def network():
    loss = mf.LeastSquares(*data())
    manifold = mf.ZeroLossManifold(loss)
    return manifold, manifold.project(mlp(jr.key(4))), loss.trace_gauss_newton


def problem(name):
    return network() if name == "mlp" else (*bent(name), wave)


PROBLEMS = [0, "mlp"]


def test_it_is_the_second_derivative_along_geodesics():
    manifold, point, fn = problem(0)
    vector = manifold.random_tangent(point, jr.key(5))
    vector = _tree.scale(0.3 / _tree.norm(vector), vector)
    quadratic = _tree.inner(vector, mf.covariant_hessian(manifold, fn, point).mv(vector))
    along = lambda t: fn(mf.exponential_map(manifold, point, _tree.scale(t, vector)))
    h = 0.02
    values = jax.jit(jax.vmap(along))(h * jnp.arange(-2.0, 3.0))
    second = jnp.array([-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12]) @ values / h**2
    close("⟨v, Hv⟩", quadratic, second, 2e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_check_hessian_sees_slope_three(name):
    manifold, point, fn = problem(name)
    check = mf.diagnostics.check_hessian(manifold, fn, point, jr.key(6))
    assert check and abs(check.slope - 3) <= 0.1, check
    check = mf.diagnostics.check_gradient(manifold, fn, point, jr.key(6))
    assert check and abs(check.slope - 2) <= 0.1, check


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_hessian_without_multipliers_is_rejected(name):
    """The mutant P∇²F P: right on flat manifolds only."""
    manifold, point, fn = problem(name)
    coordinates, remainder = manifold.split(point)

    def without(vector):
        gradient = jax.grad(lambda x: fn(_tree.join(x, remainder)))
        tangent = manifold.tangent_projection(point, vector)
        turned = jax.jvp(gradient, (coordinates,), (tangent,))[1]
        return manifold.tangent_projection(point, turned)

    mutant = lx.FunctionLinearOperator(without, _tree.structure_of(coordinates), lx.symmetric_tag)
    check = mf.diagnostics.check_hessian(manifold, fn, point, jr.key(6), hessian=mutant)
    assert not check and check.slope < 2.3, check


@pytest.mark.parametrize("name", [0, "mlp"])
def test_it_is_self_adjoint_and_tangent(name):
    manifold, point, fn = problem(name)
    hessian = mf.covariant_hessian(manifold, fn, point)
    u, v = (manifold.random_tangent(point, jr.key(i)) for i in (1, 2))
    close("⟨u, Hv⟩", _tree.inner(u, hessian.mv(v)), _tree.inner(v, hessian.mv(u)), 1e-10)
    assert bool(manifold.is_tangent(point, hessian.mv(v)))
    normal = manifold.normal_projection(point, manifold.loss.split(point)[0])
    at_most("H of a normal", _tree.norm(hessian.mv(normal)), 1e-9)
    assert lx.is_symmetric(hessian)


def test_it_is_the_derivative_of_the_gradient_field():
    manifold, point = bent(0)
    vector = manifold.random_tangent(point, jr.key(1))
    field = lambda x: mf.riemannian_gradient(manifold, wave, x)
    expected = mf.covariant_derivative(manifold, field, point, vector)
    close("∇_v grad", mf.covariant_hessian(manifold, wave, point).mv(vector), expected, 1e-10)
    trace = mf.laplace_beltrami(manifold, wave, point)
    close("Δ = div grad", mf.divergence(manifold, field, point), trace, 1e-10)
    matrix = mf.covariant_hessian(manifold, wave, point).as_matrix()
    close("Δ", jnp.trace(matrix), trace, 1e-10)


def test_estimates_come_with_their_errors():
    manifold, point = bent(0)
    field = lambda x: mf.riemannian_gradient(manifold, wave, x)
    for found in (
        mf.laplace_beltrami(manifold, wave, point, key=jr.key(0), num_samples=400),
        mf.divergence(manifold, field, point, key=jr.key(1), num_samples=400),
        mf.linalg.estimate_trace(
            mf.covariant_hessian(manifold, wave, point), jr.key(2), num_samples=400
        ),
    ):
        exact = mf.laplace_beltrami(manifold, wave, point)
        assert 0 < found.standard_error < abs(exact)
        assert abs(found.value - exact) < 4 * found.standard_error


def test_jit_vmap_and_derivatives():
    manifold, point = bent(0)
    vector = manifold.random_tangent(point, jr.key(1))
    quadratic = lambda v: jnp.vdot(v, mf.covariant_hessian(manifold, wave, point).mv(v))
    close("jit", jax.jit(quadratic)(vector), quadratic(vector), 1e-10)
    close(
        "vmap", jax.vmap(quadratic)(jnp.stack([vector, 2 * vector]))[1], 4 * quadratic(vector), 1e-9
    )
    hessian = mf.covariant_hessian(manifold, wave, point)
    close("grad", jax.grad(quadratic)(vector), 2 * hessian.mv(vector), 1e-9)


def test_minimisers_without_residuals():
    """The circle that a dense Hessian's null space shows: II(v, v) = −x|v|²."""
    motor = mf.models.KPhaseMotor(3)
    manifold, point = motor.manifold, motor.point(0.7)
    tangent = jnp.zeros(5).at[0].set(-jnp.sin(0.7)).at[1].set(jnp.cos(0.7))
    close("mean curvature", mf.mean_curvature(manifold, point), -point, 1e-9)
    close("II", mf.second_fundamental_form(manifold, point, tangent, 2 * tangent), -2 * point, 1e-9)
    hessian = mf.covariant_hessian(manifold, lambda x: x[0], point)
    close("Hess x₁", hessian.mv(tangent), -point[0] * tangent, 1e-9)
    end = mf.exponential_map(manifold, point, 2 * tangent)
    close("geodesic", end, motor.point(2.7), 1e-8)
