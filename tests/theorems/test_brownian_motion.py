"""Brownian motion on spheres, Stiefel manifolds and rotation groups, as level sets.

The coordinates of Rᴰ are eigenfunctions of the Laplace-Beltrami operator of these
manifolds, ΔX = −λX, so that E Xₜ = e^{−λt/2} x₀: λ = d − 1 on the unit sphere of Rᵈ and
λ = n − (k + 1)/2 on the n×k matrices with orthonormal columns (SO(n) for k = n).
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close

sphere = mf.LevelSet(lambda p: jnp.sum(p**2) - 1)
SEED = 7


def orthonormal(p):
    """XᵀX = I, without the repeated constraints of a symmetric matrix."""
    size = p.shape[1]
    return (p.T @ p - jnp.eye(size))[jnp.triu_indices(size)]


def means(flow, start, num_paths, **options):
    """The mean of the final points and its standard error."""

    @jax.jit
    def ends(keys):
        end = lambda key: mf.solve(flow, start, end_time=1.0, key=key, throw=False, **options).final
        return jax.vmap(end)(keys)

    final = ends(jr.split(jr.key(SEED), num_paths))
    return jnp.mean(final, 0), jnp.std(final, 0) / np.sqrt(num_paths)


def one_step_mean(h, with_drift):
    """E⟨X₁, X₀⟩ of one projected Euler step on S², by Gauss-Laguerre quadrature.

    The step goes from X to (aX + √h·ξ)/‖…‖ with ξ normal in two dimensions and a = 1 − h
    with the Itô drift −X, a = 1 without.
    """
    nodes, weights = np.polynomial.laguerre.laggauss(60)
    a = 1 - h if with_drift else 1.0
    return float(np.sum(weights * a / np.sqrt(a**2 + 2 * h * nodes)))


@pytest.mark.parametrize(("num_steps", "num_paths"), [(16, 20_000), (8, 8000)])
def test_sphere_meets_the_law_of_its_scheme(num_steps, num_paths):
    """In coarse steps, at two sizes: within the noise of many paths of the exact mean of the
    scheme, and away from that of the scheme without the Itô drift."""
    start = jnp.array([0.0, 0.6, 0.8])
    mean, error = means(mf.BrownianMotion(sphere), start, num_paths, step_size=1 / num_steps)
    law = one_step_mean(1 / num_steps, True) ** num_steps
    without = one_step_mean(1 / num_steps, False) ** num_steps
    at_most("|mean − law|, standard errors", jnp.max(jnp.abs(mean - law * start) / error), 4.0)
    gap = float(jnp.linalg.norm(without * start - law * start))
    assert gap > 8 * float(jnp.max(error)), "the test could not tell a missing Itô drift"


def test_weak_order_of_the_scheme():
    """The bias of projected Euler with the full Itô drift is of first order, and small."""
    steps = np.array([64, 128, 256])
    bias = np.array([one_step_mean(1 / n, True) ** n - np.exp(-1.0) for n in steps])
    slope = np.polyfit(np.log(1 / steps), np.log(np.abs(bias)), 1)[0]
    at_most("|weak order − 1|", abs(slope - 1), 0.1)
    without = one_step_mean(1 / 64, False) ** 64 - np.exp(-1.0)
    assert abs(without) > 3 * abs(bias[0]), f"{without} against {bias[0]}"


@pytest.mark.parametrize(
    ("shape", "rate"), [((3, 3), 1.0), ((4, 2), 2.5)], ids=["SO(3)", "Stiefel(4, 2)"]
)
def test_matrices_with_orthonormal_columns(shape, rate):
    """Within 4 standard errors and the scheme's bias, both at h = 1/16 (bias ≤ 0.02)."""
    manifold = mf.LevelSet(orthonormal)
    start = jnp.eye(*shape)
    mean, error = means(mf.BrownianMotion(manifold), start, 4000, step_size=1 / 16)
    gap = jnp.abs(mean - np.exp(-rate / 2) * start)
    at_most(f"beyond 4 standard errors, seed {SEED}", jnp.max(gap - 4 * error), 0.02)


@pytest.mark.parametrize("solver", [dfx.Euler(), dfx.EulerHeun()], ids=["Itô", "Stratonovich"])
def test_diffrax_solvers_get_the_drift_of_their_kind(solver):
    """At h = 1/16 the two kinds of solvers have biases of +0.01 and +0.05."""
    start = jnp.array([1.0, 0.0, 0.0])
    flow = mf.BrownianMotion(sphere)
    mean, error = means(flow, start, 3000, step_size=1 / 16, solver=solver)
    bias = 0.012 if isinstance(solver, dfx.Euler) else 0.055
    gap = jnp.abs(mean - np.exp(-1.0) * start)
    at_most(f"beyond 4 standard errors, seed {SEED}", jnp.max(gap - 4 * error), bias)


def test_stratonovich_drift():
    """Brownian motion is dX = P∘dW: no drift at all in the sense of Stratonovich."""
    for manifold, point in (
        (sphere, jnp.array([0.0, 0.6, 0.8])),
        (mf.LevelSet(orthonormal), jnp.eye(4, 2)),
    ):
        flow = mf.BrownianMotion(manifold)
        at_most("Stratonovich drift", jnp.max(jnp.abs(flow.stratonovich_drift(point))), 1e-12)
    close(
        "½ tr II on S²",
        mf.BrownianMotion(sphere).drift(point_on_sphere()),
        -point_on_sphere(),
        1e-12,
    )


def point_on_sphere():
    return jnp.array([0.0, 0.6, 0.8])
