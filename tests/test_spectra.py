"""Eigenvalues by products of known spectra: right within their residuals, or said not to be."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, equal
from manifoldflow import linalg

SIZE = 150  # products alone
NUM = 2
SPECTRA = {
    "indefinite": np.linspace(-1, 1, SIZE),
    "one below zero": np.r_[-0.3, np.linspace(-0.29, 1, SIZE - 1)],
    "tiny beside one": np.geomspace(1e-6, 1, SIZE),
    "one tiny": np.r_[1e-6, np.linspace(0.5, 1, SIZE - 1)],
    "clustered": np.r_[np.linspace(-1e-5, 1e-5, SIZE - 2), 0.9, 1],
    "nearly degenerate": np.r_[1, 1 - 1e-9, 1 - 2e-9, np.linspace(-0.3, 0.9, SIZE - 3)],
    "multiple": np.r_[np.full(50, -1), np.zeros(50), np.ones(50)],
    "rank two": np.r_[np.zeros(SIZE - 2), 1, 2],
    "one": np.ones(SIZE),
    "zero": np.zeros(SIZE),
}
SCALES = (1e-8, 1.0, 1e8)


@eqx.filter_jit
def both_ends(matrix):
    operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
    ends = linalg.largest_eigenvalues(operator, NUM), linalg.smallest_eigenvalues(operator, NUM)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends)


def rotated(values, dtype):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]
    return jnp.asarray((turn * values) @ turn.T, dtype)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_known_spectra(dtype):
    """Within the residual, and products' rounding, of the true ones; at any scale."""
    eps = float(jnp.finfo(dtype).eps)
    for name, spectrum in SPECTRA.items():
        spectrum = np.sort(spectrum)
        exact = np.stack([spectrum[::-1][:NUM], spectrum[:NUM]])
        for scale in SCALES if name in ("indefinite", "tiny beside one") else (1.0,):
            found = both_ends(rotated(scale * spectrum, dtype))
            what = f"{name}, {np.dtype(dtype).name}, scale {scale:g}"
            equal(f"{what}: dtype", found.values.dtype, dtype)
            assert bool(jnp.all(found.is_successful)), f"{what}: {found.residuals}"
            error = np.abs(np.asarray(found.values, np.float64) / scale - exact)
            size, residuals = np.max(np.abs(spectrum)), np.asarray(found.residuals) / scale
            at_most(f"{what}: error beyond the residual", np.max(error - residuals), 8 * eps * size)
            # Rayleigh quotients are right to the square of the residual.
            at_most(f"{what}: error", np.max(error), 10 * eps * size)
            if dtype == jnp.float64:
                relative = error / np.where(exact == 0, 1, np.abs(exact))
                at_most(f"{what}: relative error", np.max(relative), 1e-9)


def test_too_few_products_are_said():
    """A wide and dense spectrum in 31 products; the same with enough of them."""
    operator = lx.MatrixLinearOperator(rotated(SPECTRA["tiny beside one"], float), lx.symmetric_tag)
    few = linalg.smallest_eigenvalues(operator, max_steps=20)
    assert bool(few.result == mf.RESULTS.not_converged) and not bool(few.is_successful)
    at_least("the true error", few.values[0] - 1e-6, 1e-6)
    at_most("of which the residual is a bound", few.values[0] - 1e-6, float(few.residuals[0]))
    at_most("products", few.num_steps, 40)


def test_members_of_a_batch_and_what_is_not_finite():
    matrices = [rotated(SPECTRA[name], float) for name in ("indefinite", "multiple")]
    matrices.append(jnp.full((SIZE, SIZE), jnp.nan))
    together = eqx.filter_vmap(both_ends)(jnp.stack(matrices))
    for index, matrix in enumerate(matrices[:2]):
        alone = both_ends(matrix)
        gap = jnp.max(jnp.abs(alone.values - together.values[index]))
        at_most(f"member {index}", gap, 1e-13)
        assert bool(jnp.all(together.is_successful[index])), f"member {index}"
    nonfinite = both_ends(matrices[2]).result == mf.RESULTS.nonfinite
    assert bool(jnp.all(nonfinite)), "NaN"
    assert not bool(jnp.any(together.is_successful[2])), "NaN in a batch"


def test_subspace_smaller_than_the_band():
    """Three dimensions of a hundred, where A is negative: zeros of the rest do not show."""
    basis = jnp.linalg.qr(jr.normal(jr.key(1), (100, 3)))[0]
    curvature = jnp.array([-1.0, -2.0, -2.0])
    operator = lx.MatrixLinearOperator(basis @ jnp.diag(curvature) @ basis.T, lx.symmetric_tag)
    within = lambda v: basis @ (basis.T @ v)
    found = linalg.largest_eigenvalues(operator, 3, within=within, codimension=97)
    assert bool(found.is_successful), found.residuals
    at_most("error", jnp.max(jnp.abs(found.values - curvature)), 1e-14)


def test_gram_matrices():
    """With the residual; NaN where there is none to be found."""
    jacobian = linalg.DenseJacobian(jr.normal(jr.key(2), (30, 40)))
    value, found = linalg.gram_largest_eigenvalue_with_info(jacobian)
    exact = np.linalg.eigvalsh(jacobian.gram())[-1]
    at_most("error", abs(float(value - exact)) / exact, 1e-13)
    at_most("residual", found.residuals[0] / exact, 1e-9)
    assert bool(found.is_successful)
    broken = linalg.DenseJacobian(jacobian.leaf_rows.at[0, 0].set(jnp.nan))
    value, found = linalg.gram_largest_eigenvalue_with_info(broken)
    assert bool(jnp.isnan(value)) and bool(found.result == mf.RESULTS.nonfinite)
    assert bool(jnp.isnan(linalg.gram_largest_eigenvalue(broken)))
