"""Extreme eigenvalues by products alone, their derivatives, and what they are of."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, refused
from manifoldflow import _tree
from zoo import data, mlp

SIZES = [20, 150]  # dense, and by Lanczos' method


def symmetric(size):
    matrix = jr.normal(jr.key(0), (size, size))
    return (matrix + matrix.T) / 2


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
def test_ends_of_a_spectrum(size):
    matrix = symmetric(size)
    operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
    exact = np.linalg.eigvalsh(matrix)
    close("largest", mf.linalg.largest_eigenvalues(operator, 3).values, exact[::-1][:3], 1e-6)
    close("smallest", mf.linalg.smallest_eigenvalues(operator, 3).values, exact[:3], 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_derivative(size):
    matrix, change = symmetric(size), symmetric(size) ** 2

    def largest(t):
        operator = lx.MatrixLinearOperator(matrix + t * change, lx.symmetric_tag)
        return mf.linalg.largest_eigenvalues(operator).values[0]

    vector = np.linalg.eigh(matrix)[1][:, -1]
    close("dλ/dt", jax.grad(largest)(0.0), vector @ np.asarray(change) @ vector, 1e-5)


def test_covariant_hessian_on_its_tangent_space():
    """Of a linear function on the sphere −⟨c, x⟩ everywhere; zeros across do not show."""
    sphere = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
    point = jnp.array([0.6, 0.8, 0.0, 0.0])
    hessian = mf.covariant_hessian(sphere, lambda x: x @ jnp.array([1.0, 2.0, 0.0, 0.0]), point)
    within = lambda v: sphere.tangent_projection(point, v)
    ends = [
        find(hessian, 3, within=within, codimension=1).values
        for find in (mf.linalg.largest_eigenvalues, mf.linalg.smallest_eigenvalues)
    ]
    close("eigenvalues", jnp.stack(ends), np.full((2, 3), -2.2), 1e-12)
    with refused(ValueError, "dimension 3 has no 4 eigenvalues"):
        mf.linalg.largest_eigenvalues(hessian, 4, within=within, codimension=1)


def test_hessian_of_a_loss_and_gram_matrix_share_their_largest():
    loss = mf.LeastSquares(*data())
    point = mf.ZeroLossManifold(loss).project(mlp(jr.key(4)))
    of_hessian = mf.linalg.largest_eigenvalues(loss.hessian(point)).values[0]
    gram = loss.jacobian(point).gram()
    close("λ_max", of_hessian, loss.scale * jnp.linalg.eigvalsh(gram)[-1], 1e-6)
    values = jnp.linalg.eigvalsh(gram)
    assert 1 <= float(mf.linalg.effective_rank(values)) <= len(values)


@pytest.mark.quick
def test_effective_rank():
    close("equal", mf.linalg.effective_rank(jnp.array([2.0, 2.0, 2.0, 0.0])), 3.0, 1e-12)
    close("one", mf.linalg.effective_rank(jnp.array([5.0, 0.0, -1e-18])), 1.0, 1e-12)
    gradient = jax.grad(mf.linalg.effective_rank)(jnp.array([1.0, 2.0, 0.0]))
    assert bool(jnp.isfinite(gradient[:2]).all())


def test_too_many_are_refused():
    operator = lx.MatrixLinearOperator(symmetric(100), lx.symmetric_tag)
    with refused(ValueError, "fewer than a fifth of the 100"):
        mf.linalg.largest_eigenvalues(operator, 20)


def test_trees_and_jit():
    tree = {"a": jnp.arange(1.0, 4.0), "b": jnp.array([[7.0, -2.0]])}

    @eqx.filter_jit
    def ends(tree):
        scale = lambda v: jax.tree.map(jnp.multiply, tree, v)
        operator = lx.FunctionLinearOperator(scale, _tree.structure_of(tree), lx.symmetric_tag)
        return (
            mf.linalg.largest_eigenvalues(operator, 2).values,
            mf.linalg.smallest_eigenvalues(operator, 2).values,
        )

    largest, smallest = ends(tree)
    at_most("largest", jnp.max(jnp.abs(largest - jnp.array([7.0, 3.0]))), 1e-9)
    at_most("smallest", jnp.max(jnp.abs(smallest - jnp.array([-2.0, 1.0]))), 1e-9)
