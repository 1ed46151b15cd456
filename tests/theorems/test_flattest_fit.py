"""The flattest fit of two-layer networks: where the trace of the Hessian is least on Γ.

For f(θ) = Σⱼ φ(θⱼᵀx) with φ(z) = z³ + νz, unit inputs xᵢ that are linearly independent and
L = Σᵢ(f(xᵢ) − yᵢ)², tr ∇²L = 2F on Γ with F = Σᵢⱼ φ'(θⱼᵀxᵢ)²‖xᵢ‖², and the stationary points
of F on Γ are those where all neurons do the same: θⱼᵀxᵢ = φ⁻¹(yᵢ/m) [Gatmiry2024, Theorem 2].
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, equal, norm
from manifoldflow.optimize import minimize

NUM_EXAMPLES, NUM_INPUTS, WIDTH, NU = 3, 5, 6, 1.0
TOLERANCE = 1e-10
SEEDS = [10, 11, 12, 13, 14]


def phi(z):
    return z**3 + NU * z


def phi_slope(z):
    return 3 * z**2 + NU


def phi_inverse(y):
    roots = np.roots([1, 0, NU, -y])
    return roots[np.argmin(np.abs(roots.imag))].real


class FlatnessOnData(eqx.Module):
    """F."""

    inputs: jax.Array

    def __call__(self, theta):
        return jnp.sum(phi_slope(theta @ self.inputs.T) ** 2 * jnp.sum(self.inputs**2, axis=1))


def network(theta, x):
    return jnp.sum(phi(theta @ x))


def data():
    inputs = jr.normal(jr.key(0), (NUM_EXAMPLES, NUM_INPUTS))
    inputs = inputs / jnp.linalg.norm(inputs, axis=1, keepdims=True)
    return inputs, 3 * jr.normal(jr.key(1), (NUM_EXAMPLES,))


INPUTS, TARGETS = data()
LOSS = mf.LeastSquares(INPUTS, TARGETS, predict=network, scale=2.0)
GAMMA = mf.ZeroLossManifold(LOSS)
F = FlatnessOnData(INPUTS)
FLATTEST = jnp.array([[phi_inverse(float(y) / WIDTH) for y in TARGETS]] * WIDTH)
ROWS = []


@functools.cache
def by_trust_region(seed):
    """From a random point of Γ: where it starts, where it ends, the gradients on the way."""
    ROWS.clear()
    start = jr.normal(jr.key(seed), (WIDTH, NUM_INPUTS))
    solution = minimize(GAMMA, F, start, gradient_tolerance=0.99 * TOLERANCE, progress=ROWS.append)
    jax.effects_barrier()
    return solution, [float(row["gradient_norm"]) for row in ROWS]


def equivalent_gradients(solution):
    """A product with the Hessian counts as two gradients."""
    stats = solution.stats
    return int(stats["num_gradients"] + 2 * stats["num_hessian_products"])


def test_twice_f_is_the_trace_of_the_hessian():
    theta = GAMMA.project(jr.normal(jr.key(1), (WIDTH, NUM_INPUTS)))
    close("tr H = 2F", LOSS.trace_hessian(theta), 2 * F(theta), 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_starts_end_at_the_point_of_the_theorem(seed):
    solution, norms = by_trust_region(seed)
    activations = solution.final @ INPUTS.T
    at_most("distance", jnp.max(jnp.abs(activations - FLATTEST)), 1e-8)
    gradient = mf.riemannian_gradient(GAMMA, F, solution.final)
    at_most("gradient", norm(gradient), TOLERANCE)
    at_most("loss", LOSS(solution.final), 1e-25)
    at_least("gradient at the start", norms[0], 1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_newtons_rate(seed):
    """Once below one, each gradient is at most the square of the one before, to rounding."""
    _, norms = by_trust_region(seed)
    norms = [a for a, b in zip(norms, [0.0, *norms]) if a != b]
    pairs = [(a, b) for a, b in zip(norms, norms[1:]) if a < 1]
    at_least("steps at that rate", len(pairs), 2)
    worst = max((b - 1e-13) / a**2 for a, b in pairs)
    at_most(f"gradient over the square of the one before, {norms}", worst, 1.5)


def by_flow(start, rtol, atol):
    """The flow, until its gradient is as small or its time is up, and the gradient there."""
    flow = mf.RiemannianGradientFlow(GAMMA, F)
    until = mf.Stationary(TOLERANCE)
    solution = mf.solve(flow, start, end_time=100.0, rtol=rtol, atol=atol, until=until)
    return solution, norm(flow.drift(solution.final))


@pytest.mark.parametrize("rtol, atol, arrives", [(1e-3, 1e-8, False), (1e-12, 1e-14, True)])
def test_the_flow_takes_ten_times_as_many_gradients(rtol, atol, arrives):
    """In loose steps it never gets there: explicit steps at the edge of stability keep it
    about rtol away. In steps small enough to get there it takes longer as well."""
    for seed in SEEDS[:3]:
        solution, _ = by_trust_region(seed)
        flow, gradient = by_flow(solution.point(0), rtol, atol)
        equal(f"arrives, with a gradient of {gradient:.1e}", gradient <= TOLERANCE, arrives)
        ratio = float(flow.stats["num_gradients"]) / equivalent_gradients(solution)
        at_least(f"gradients of the flow over those of the trust region, seed {seed}", ratio, 10)
        if arrives:
            at_most("distance", jnp.max(jnp.abs(flow.final @ INPUTS.T - FLATTEST)), 1e-8)
