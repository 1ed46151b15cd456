"""Kernels, ranges and Lyapunov equations of matrices that are not symmetric, against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_continuous_lyapunov, sqrtm

import lawbook
from checks import at_most, close, equal
from manifoldflow.flows._oblique import (
    inverse,
    semidefinite_root,
    splitting,
    stable_lyapunov_solve,
)


def stable(size, seed, rates):
    """A matrix with these real parts of its eigenvalues, far from symmetric."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(size, size)) / np.sqrt(size) + np.eye(size)
    middle = np.diag(np.asarray(rates, float))
    middle[0, 1], middle[1, 0] = 2.0, -2.0
    return basis @ middle @ np.linalg.inv(basis)


@pytest.mark.parametrize("low", [1.0, 1e-3, 1e-6])
def test_lyapunov_equations(low):
    matrix = stable(9, 1, np.concatenate([[1.0, 1.0], np.geomspace(low, 3, 7)]))
    rhs = np.random.default_rng(2).normal(size=(9, 9))
    found, is_stable = jax.jit(stable_lyapunov_solve)(matrix, jnp.asarray(rhs + rhs.T))
    assert is_stable
    close("M", found, solve_continuous_lyapunov(matrix, rhs + rhs.T), 1e-10 / low**0.5)


def test_unstable_matrices_are_told():
    for rates in ([1, 1, -1, 1], [1, 1, 0.0, 2], [-1, -1, 2, 2], [0, 0, 1, 1]):
        found = jax.jit(stable_lyapunov_solve)(stable(4, 3, rates), jnp.eye(4))
        equal(f"stable with {rates}", bool(found[1]), False)


def test_units_and_slow_modes_leave_matrices_stable():
    matrix, units = stable(4, 3, [1, 1, 1e-9, 2]), np.diag([1e3, 1.0, 1e-3, 1.0])
    scaled_rhs = jnp.asarray(units @ units)
    for scaled, rhs in (
        (matrix, jnp.eye(4)),
        (1e-20 * matrix, jnp.eye(4)),
        (units @ matrix @ np.linalg.inv(units), scaled_rhs),
    ):
        assert jax.jit(stable_lyapunov_solve)(scaled, rhs)[1]


def test_derivatives_of_the_lyapunov_equation():
    matrix, rhs = stable(4, 4, [1, 1, 0.5, 2]), jnp.asarray(np.diag([1.0, 2.0, 3.0, 4.0]))
    of_matrix = lambda v: stable_lyapunov_solve(v.reshape(4, 4), rhs)[0].reshape(-1)
    lawbook.derivative_law("by B", of_matrix, jnp.asarray(matrix).reshape(-1), 1, step=1e-4)
    of_rhs = lambda v: stable_lyapunov_solve(jnp.asarray(matrix), v.reshape(4, 4))[0].reshape(-1)
    lawbook.derivative_law("by S", of_rhs, rhs.reshape(-1), 2, step=1e-4)


def singular(size, rank, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, size, rank))
    return (left * np.geomspace(spread, 1, rank)) @ right.T


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("rule", ["count", "share"])
def test_projector_and_group_inverse(rank, rule):
    matrix = singular(5, rank, 5 + rank)
    found = splitting(jnp.asarray(matrix), rank if rule == "count" else 1e-6)
    equal("rank", int(found.rank), rank)
    across = np.eye(5) - found.tangent
    at_most("AΠ", np.max(np.abs(matrix @ found.tangent)), 1e-12)
    at_most("ΠA", np.max(np.abs(found.tangent @ matrix)), 1e-12)
    at_most("Π² − Π", np.max(np.abs(found.tangent @ found.tangent - found.tangent)), 1e-12)
    close("AA^#", matrix @ found.inverse, across, 1e-10, scale=1)
    close("A^#A", found.inverse @ matrix, across, 1e-10, scale=1)
    close("A^#AA^#", found.inverse @ matrix @ found.inverse, found.inverse, 1e-9, scale=1)
    units = splitting(jnp.asarray(1e-9 * matrix), rank if rule == "count" else 1e-6)
    close("units: Π", units.tangent, found.tangent, 1e-10)
    close("units: A^#", units.inverse * 1e-9, found.inverse, 1e-9, scale=1)


def test_derivatives_at_constant_rank():
    """Along a curve of matrices of rank 2, whose singular vectors turn."""
    first, second = (jnp.asarray(singular(4, 2, seed)) for seed in (14, 12))
    turn = lambda t: jax.scipy.linalg.expm(t * (second - second.T))
    curve = lambda t: turn(t[0]) @ (first * (1 + t[1])) @ turn(0.7 * t[0] - 0.2 * t[1])
    parts = lambda t: jnp.concatenate(
        [getattr(splitting(curve(t), 2), name).reshape(-1) for name in ("tangent", "inverse")]
    )
    lawbook.derivative_law("Π and A^#", parts, jnp.array([0.3, -0.1]), 3, step=1e-4)
    lawbook.derivative_law(
        "an inverse", lambda v: inverse(v.reshape(3, 3)).reshape(-1), jnp.arange(9.0) ** 2, 4,
        step=1e-3,
    )  # fmt: skip


def test_roots_of_singular_covariances():
    half = jnp.asarray(np.random.default_rng(13).normal(size=(4, 2)))
    found = jax.jit(semidefinite_root)(half @ half.T)
    close("root", found, np.real(sqrtm(half @ half.T)), 1e-6)
    close("its square", found @ found, half @ half.T, 1e-12)
    of_half = lambda v: semidefinite_root(v.reshape(4, 2) @ v.reshape(4, 2).T).reshape(-1)
    lawbook.derivative_law("at constant rank", of_half, half.reshape(-1), 5, step=1e-3)
