"""Every way of solving with a Gram matrix gives the same geometry."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from manifoldflow import _tree, linalg


@pytest.fixture(scope="module")
def problem():
    model = eqx.nn.MLP(6, 3, 12, 1, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(jr.normal(jr.key(1), (8, 6)), jr.normal(jr.key(2), (8, 3)))
    return loss, model, _tree.random_normal_like(jr.key(3), loss.gradient(model))


def solvers(loss: mf.LeastSquares, model: eqx.nn.MLP) -> dict[str, linalg.AbstractGram]:
    nearby = eqx.apply_updates(model, _tree.scale(-1e-3, loss.gradient(model)))
    return {
        "plain": linalg.IterativeGram(),
        "sketched": linalg.IterativeGram(preconditioner_rank=12),
        "stale inverse": linalg.IterativeGram(inverse=linalg.inverse_gram(loss.jacobian(nearby))),
        "automatic, dense": linalg.AutoGram(),
        "automatic, iterative": linalg.AutoGram(memory=1000, preconditioner_rank=8),
    }


NAMES = ["plain", "sketched", "stale inverse", "automatic, dense", "automatic, iterative"]


@pytest.mark.parametrize("name", NAMES)
def test_same_projection_and_derivative(problem, name):
    loss, model, vector = problem
    gram = solvers(loss, model)[name]

    def projected(gram):
        manifold = mf.ZeroLossManifold(loss, gram=gram)

        def energy(step):
            moved = eqx.apply_updates(model, _tree.scale(step, vector))
            return _tree.inner(manifold.tangent_projection(moved, vector), vector)

        return manifold.tangent_projection(model, vector), jax.grad(energy)(0.1)

    (got, slope), (expected, expected_slope) = projected(gram), projected(linalg.DenseGram())
    error = float(_tree.norm(_tree.subtract(got, expected)) / _tree.norm(expected))
    assert error <= 1e-10, f"{name}: P v differs by {error:.1e} > 1e-10"
    error = abs(float(slope / expected_slope) - 1)
    assert error <= 1e-7, f"{name}: the derivative differs by {error:.1e} > 1e-7"


@pytest.mark.parametrize("name", NAMES)
def test_same_landing(problem, name):
    loss, model, _ = problem
    landed = mf.ZeroLossManifold(loss, gram=solvers(loss, model)[name]).project(model)
    expected = mf.ZeroLossManifold(loss).project(model)
    gap = float(_tree.norm(_tree.subtract(loss.split(landed)[0], loss.split(expected)[0])))
    assert gap <= 1e-8, f"{name}: lands {gap:.1e} > 1e-8 away"


def test_a_fresh_inverse_needs_one_iteration(problem):
    loss, model, _ = problem
    jacobian = loss.jacobian(model)
    inverse = linalg.inverse_gram(jacobian)
    error = float(jnp.max(jnp.abs(inverse @ jacobian.gram() - jnp.eye(loss.num_residuals))))
    assert error <= 1e-9, f"K⁻¹K is {error:.1e} > 1e-9 from the identity"


def test_without_its_preconditioner_a_short_iteration_fails(problem):
    """The test above can fail: two iterations are too few without help."""
    loss, model, vector = problem
    expected = mf.ZeroLossManifold(loss).tangent_projection(model, vector)
    short = mf.ZeroLossManifold(loss, gram=linalg.IterativeGram(max_steps=2))
    gap = _tree.norm(_tree.subtract(short.tangent_projection(model, vector), expected))
    assert float(gap) > 1e-6, f"two plain iterations were enough: {float(gap):.1e}"
