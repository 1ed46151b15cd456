"""Oracles compute in float64, and judge what they are given by the precision that it came in."""

import jax.random as jr
import numpy as np
import pytest

from checks import at_most, close, refused
from manifoldflow import theory

KEY = jr.key(0)
PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def singular(seed):
    """A map of rank 1, covariances of rank 2 that reach it, and one that does not."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(3, 1)) @ rng.normal(size=(1, 4))
    left, _, right = np.linalg.svd(target)
    of_inputs = right[:2].T @ np.diag([2.0, 0.5]) @ right[:2]
    reaching = left[:, :2] @ np.diag([1.0, 0.3]) @ left[:, :2].T
    missing = left[:, 1:] @ np.diag([1.0, 0.3]) @ left[:, 1:].T
    return target, of_inputs, reaching, missing


@PRECISIONS
@pytest.mark.parametrize("seed", range(4))
def test_singular_noise(dtype, seed):
    """Rounding of the arguments is no noise, and no negative eigenvalue."""
    target, of_inputs, reaching, missing = (matrix.astype(dtype) for matrix in singular(seed))
    find = lambda noise: theory.deep_linear_noise_equilibrium(
        target, of_inputs, noise, widths=[2, 3], key=KEY
    )
    layers = find(reaching)
    close("product", layers[2] @ layers[1] @ layers[0], target, 100 * np.finfo(dtype).eps)
    sides = theory.deep_linear_noise_sides(layers, of_inputs, reaching)
    worst = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in sides)
    at_most("imbalance", worst, 1e3 * np.finfo(dtype).eps)
    with refused(ValueError, "no finite equilibrium exists"):
        find(missing)
    with refused(ValueError, "no finite equilibrium exists"):
        theory.two_layer_noise_equilibrium(target, of_inputs, missing, width=2, key=KEY)


@PRECISIONS
def test_a_flat_direction_of_a_rounded_hessian(dtype):
    """It has no pull, whatever eigenvalue rounding makes of 0."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 4))
    hessian = (rows.T @ rows).astype(dtype)
    exact = np.linalg.pinv(rows) @ rows * 0.1 / 2
    found = theory.ornstein_uhlenbeck_covariance(hessian, hessian, learning_rate=0.1)
    close("S = (eta/2) P", found, exact, 1e3 * np.finfo(dtype).eps)
    with refused(ValueError, "along directions in which the Hessian vanishes"):
        theory.ornstein_uhlenbeck_covariance(hessian, np.eye(4, dtype=dtype), learning_rate=0.1)


def test_weights_beyond_a_linear_program_are_refused():
    """It would call a program infeasible whose coefficients are too large for it."""
    rng = np.random.default_rng(0)
    inputs, truth = rng.normal(size=(6, 12)), np.r_[1.0, -2.0, np.zeros(10)]
    certified = lambda decades: theory.sparse_recovery_certificate(
        inputs, truth, weights=np.logspace(0, decades, 12)
    )
    # The cheaper the support is against the others, the more certain it is recovered.
    margins = [certified(decades).margin for decades in (0, 2, 4, 8, 11)]
    assert all(np.diff(margins) > 0) and margins[-1] < 1, margins
    for decades in (14, 16, 30):
        with refused(ValueError, "weights: got |z_j|/c_j over a ratio of", "similar scales"):
            certified(decades)
