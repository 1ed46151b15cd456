"""Iterations that act through one row for each residual: n×n matrices against the dense formula.

F = B(θ)ᵀ R(θ) ρ(r), Σ = BᵀCB with rows B that are no gradients, gains R and noises C of any kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, close, norm
from iteration_laws import CASES, iteration
from manifoldflow import linalg
from manifoldflow.flows._rows_form import rows_form_drift

rejected = pytest.raises(AssertionError, match="above the bound")


def noise_of(here):
    root = np.random.default_rng(here.seed + 300).normal(size=(here.rank, here.rank))
    return jnp.asarray(root @ root.T)


def dense(rows):
    return linalg.DenseJacobian(rows)


def drift_of(here, rows_fn, gains, noise, point=None):
    point = here.point if point is None else point

    @jax.jit
    def drift(x, gains):
        jacobian = dense(jax.jacfwd(here.residual)(x))
        return rows_form_drift(lambda y: dense(rows_fn(y)), x, jacobian, gains, noise)

    return drift(point, gains)


def law(found, here, rows_fn, gains_fn, noise, bound=1e-10):
    """The drift of the dense formula, which integrated flows have confirmed."""
    field = lambda x: rows_fn(x).T @ gains_fn(x) @ (jnp.sinh(here.residual(x)))
    flow = mf.IterationLimit(field, lambda x: rows_fn(x).T @ noise @ rows_fn(x), rank=here.rank)
    expected = flow.drift(here.point)
    at_least("the drift", norm(expected), 0.05)
    close("the drift in rows form", found, expected, bound)


@pytest.mark.parametrize("name", CASES)
def test_rows_against_the_dense_formula(name):
    here = iteration(name)
    noise = noise_of(here)
    found = drift_of(here, here.rows, here.gains(here.point), noise)
    assert found.is_stable
    law(found.drift, here, here.rows, here.gains, noise)


def test_wrong_rows_are_rejected():
    here = iteration("seven by three")
    noise, gains = noise_of(here), here.gains(here.point)
    judge = lambda found: law(found.drift, here, here.rows, here.gains, noise, bound=1e-2)
    judge(drift_of(here, here.rows, gains, noise))
    rows, jacobian = (
        np.asarray(jax.jit(f)(here.point)) for f in (here.rows, jax.jacfwd(here.residual))
    )
    gram = jacobian @ rows.T
    with rejected:  # G R in place of R G
        judge(drift_of(here, here.rows, gram @ gains @ np.linalg.inv(gram), noise))
    with rejected:  # the gains of the transposed problem
        judge(drift_of(here, here.rows, gains.T, noise))
    with rejected:  # without gains
        judge(drift_of(here, here.rows, jnp.eye(3), noise))
    with rejected:  # as if the rows were those of the gradient
        judge(drift_of(here, jax.jacfwd(here.residual), gains, noise))


def test_an_unstable_iteration_says_so():
    here = iteration("six by two")
    found = drift_of(here, here.rows, -here.gains(here.point), noise_of(here))
    assert not found.is_stable


def test_gradients_normalised_by_example():
    """Rows ∇fᵢ/|∇fᵢ| and C = 1, the noise of one example at a time whatever its size."""
    here = iteration("seven by three")
    jacobian = jax.jacfwd(here.residual)
    unit = lambda x: jacobian(x) / jnp.linalg.norm(jacobian(x), axis=1, keepdims=True)
    gains, noise = jnp.eye(3) / 3, jnp.eye(3)
    found = drift_of(here, unit, gains, noise)
    assert found.is_stable
    law(found.drift, here, unit, lambda x: gains, noise)


def test_sgd_with_label_noise():
    """B = J and C = s²δ²N/B·1 give −(c/4)P∇tr H, also where points are PyTrees."""
    model = mf.models.ModularAddition(3, 12)
    manifold, point = model.manifold, model.manifold.project(model.initial(jax.random.key(1)))
    loss, flow = manifold.loss, mf.LimitDiffusion(manifold, mf.LabelNoise(0.6, batch_size=1))
    size = loss.num_residuals
    one = jnp.eye(size)

    @jax.jit
    def drift(x):
        noise = loss.scale**2 * 0.36 * loss.num_examples * one
        return rows_form_drift(loss.jacobian, x, loss.jacobian(x), loss.scale * one, noise)

    found = drift(point)
    assert found.is_stable
    close("−(c/4)P∇tr H", found.drift, flow.drift(point), 1e-9)


def test_derivatives():
    here = iteration("six by two")
    gains, noise = here.gains(here.point), noise_of(here)
    drift = lambda x: drift_of(here, here.rows, gains, noise, x).drift
    change = jax.jit(jax.jacfwd(drift))(here.point)
    close("forward and reverse", jax.jit(jax.jacrev(drift))(here.point), change, 1e-10)
    h, v = 1e-5, jnp.arange(6.0) / 6
    finite = (drift(here.point + h * v) - drift(here.point - h * v)) / (2 * h)
    close("against differences", change @ v, finite, 1e-7)
