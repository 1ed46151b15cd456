"""Wrong drifts of an iteration's limit, each of which its law must reject."""

import jax
import numpy as np
import pytest
from scipy.linalg import solve_continuous_lyapunov

from iteration_laws import CASES, drift_law

rejected = pytest.raises(AssertionError, match="above the bound")
NAMES = "symmetric", "orthogonal", "half mixed", "without its half", "no mixed", "half slow"


def by_hand(here, wrong=None):
    """The drift of the limit in NumPy, by bases of kernels, and with one mistake."""
    matrix = np.asarray(jax.jit(jax.jacfwd(here.field))(here.point))
    third = np.asarray(jax.jit(jax.jacfwd(jax.jacfwd(here.field)))(here.point))
    sigma, slow = np.asarray(here.covariance(here.point)), np.asarray(here.slow(here.point))
    if wrong == "symmetric":
        matrix = (matrix + matrix.T) / 2
    left, values, right = np.linalg.svd(matrix)
    rank = int(np.sum(values > 1e-8 * values[0]))
    cokernel, kernel = left[:, rank:], right[rank:].T
    if wrong == "orthogonal":
        cokernel = kernel
    along = kernel @ np.linalg.solve(cokernel.T @ kernel, cokernel.T)
    inverse = np.linalg.inv(matrix + along) - along
    across = np.eye(here.size) - along
    normal = solve_continuous_lyapunov(matrix + along, across @ sigma @ across.T)
    mixed = inverse @ across @ sigma @ along.T
    mixed = {"no mixed": 0, "half mixed": 1 / 2}.get(wrong, 1) * (mixed + mixed.T) / 2
    curved = lambda m: np.einsum("abc,bc->a", third, m)
    half = 1 if wrong == "without its half" else 1 / 2
    drift = -inverse @ curved(along @ sigma @ along.T) / 2 - along @ curved(mixed)
    drift = drift - half * along @ curved(normal)
    return drift + along @ slow / (2 if wrong == "half slow" else 1)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_by_hand(name):
    drift_law(by_hand, name)


@pytest.mark.parametrize("wrong", NAMES)
def test_a_wrong_drift_is_rejected(wrong):
    with rejected:
        drift_law(lambda here: by_hand(here, wrong), "six by two", bound=1e-2)
