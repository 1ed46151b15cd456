"""ln det K and λ_max(K): values and derivatives against dense linear algebra."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close
from manifoldflow import _tree, linalg


def problem(num_examples):
    model = eqx.nn.MLP(6, 1, 40, 2, activation=jnp.tanh, key=jr.key(0))
    inputs, targets = jr.normal(jr.key(1), (num_examples, 6)), jnp.zeros((num_examples, 1))
    return (
        mf.LeastSquares(inputs, targets),
        model,
        _tree.random_normal_like(jr.key(2), eqx.filter(model, eqx.is_inexact_array)),
    )


DENSE = {
    "gram_log_determinant": lambda matrix: jnp.linalg.slogdet(matrix)[1],
    "gram_largest_eigenvalue": lambda matrix: jnp.linalg.eigvalsh(matrix)[-1],
}


@pytest.mark.parametrize("num_examples", [5, 40])
@pytest.mark.parametrize("name", DENSE)
def test_values_and_two_derivatives(name, num_examples):
    """Along a line of points, against autodiff of the dense matrix (its spectrum is simple)."""
    loss, model, direction = problem(num_examples)

    def along(evaluate, t):
        jacobian = loss.jacobian(eqx.apply_updates(model, _tree.scale(t, direction)))
        return evaluate(jacobian)

    got = lambda t: along(getattr(linalg, name), t)
    expected = lambda t: along(lambda j: DENSE[name](j.gram()), t)
    for order, bound in zip(("value", "slope", "curvature"), (1e-10, 1e-8, 1e-6)):
        close(f"{name}, {order}", jax.jit(got)(0.1), jax.jit(expected)(0.1), bound)
        got, expected = jax.grad(got), jax.grad(expected)


def test_full_batch_gradient_needs_no_dense_jacobian():
    """λ_max of a network whose n×D Jacobian would have 4·10⁹ numbers."""
    model = eqx.nn.MLP(32, 1, 1000, 2, activation=jnp.tanh, key=jr.key(0))
    model = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, model)
    inputs = jr.normal(jr.key(1), (4000, 32), jnp.float32)
    loss = mf.LeastSquares(inputs, jnp.zeros((4000, 1), jnp.float32))
    sharpness = lambda m: linalg.gram_largest_eigenvalue(loss.jacobian(m))
    compiled = eqx.filter_jit(eqx.filter_grad(sharpness)).lower(model).compile()
    temporary = compiled.compiled.memory_analysis().temp_size_in_bytes
    at_most("temporary memory, MB", temporary / 2**20, 1000.0)


def test_lost_rank_is_minus_infinity():
    rows = jnp.asarray(np.ones((3, 5)))
    value = linalg.gram_log_determinant(linalg.DenseJacobian(rows))
    assert value == -jnp.inf or value < -30, f"ln det of a singular matrix: {value}"


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_jacobian_that_is_not_finite_has_not_lost_rank(bad):
    """−inf would pass for the flattest point of all."""
    rows = jnp.eye(2).at[0, 0].set(bad)
    value = linalg.gram_log_determinant(linalg.DenseJacobian(rows))
    assert jnp.isnan(value), f"ln det: {value}"


def test_top_eigenvector():
    loss, model, _ = problem(40)
    jacobian = loss.jacobian(model)
    vector = linalg.gram_top_eigenvector(jacobian)
    values, vectors = np.linalg.eigh(jacobian.gram())
    close("Ku = λu", jacobian.gram() @ vector, values[-1] * np.asarray(vector), 1e-8)
    at_most("1 − |⟨u, v⟩|", 1 - abs(float(vectors[:, -1] @ vector)), 1e-10)
