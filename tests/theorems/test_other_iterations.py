"""Iterations that are no update of the package: a robust loss, a heavy mass, descent on √L.

Their limits by the general formula where it applies, and where plain scans of them end: runs at η
and η/2 are extrapolated to η → 0. The problem has two residuals r = (xy − 1, yz + ½).
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, norm
from limit_laws import problem
from quick import long_jit

SEEDS = 1000
key_of = functools.partial(jr.key, impl="unsafe_rbg")  # draws in a third of the time
MODES = jnp.eye(2)


def chain(p, mode):
    return mode[0] * p[0] * p[1] + mode[1] * p[1] * p[2]


LOSS = mf.LeastSquares(MODES, jnp.array([1.0, -0.5]), predict=chain)
GAMMA = mf.ZeroLossManifold(LOSS)
START = jnp.array([1 / 0.6, 0.6, -0.5 / 0.6])


def lowered(potential, time):
    """The end of Y' = −P∇potential."""
    flow = mf.RiemannianGradientFlow(GAMMA, potential)
    return mf.solve(flow, START, end_time=time, rtol=1e-8).final


def meets(what, run, rate, expected, bias, others):
    """2 E(η/2) − E(η), within four standard errors and a bias, unlike others."""
    coarse, fine = np.asarray(run(rate)), np.asarray(run(rate / 2))
    errors = [np.std(v, axis=0) / np.sqrt(len(v)) for v in (coarse, fine)]
    found, error = 2 * fine.mean(0) - coarse.mean(0), np.hypot(errors[0], 2 * errors[1])
    bound = 4 * error + bias
    numbers = f"{found} ± {error}, expected {expected}"
    at_most(f"{what}: {numbers}, in bounds", np.max(np.abs(found - expected) / bound), 1.0)
    for name, other in others.items():
        excess = np.max(np.abs(found - np.asarray(other)) / bound)
        at_least(f"{what}: {name} is rejected", excess, 1.5)


# --- a robust loss ---------------------------------------------------------------------------

WIDTH, SPREAD = 0.5, 0.4  # h of ρ'(e) = clip(e, ±h); the scale of the Cauchy noise


def robust_square():
    """E min(ε², h²) for ε of density δ/π(ε² + δ²)."""
    angle = np.arctan(WIDTH / SPREAD)
    inside = 2 * SPREAD / np.pi * (WIDTH - SPREAD * angle)
    return inside + WIDTH**2 * (1 - 2 * angle / np.pi)


@long_jit
def robust(rate, num_steps, key):
    """SGD on a Huber loss, one example a step, with Cauchy noise on its label."""
    slopes = jax.jacfwd(LOSS.residual)

    def step(k, points):
        of_example, of_noise = jr.split(jr.fold_in(key, k))
        index = jr.randint(of_example, (SEEDS,), 0, 2)
        noise = SPREAD * jr.cauchy(of_noise, (SEEDS,))

        def one(point, index, noise):
            size = jnp.clip(LOSS.residual(point)[index] + noise, -WIDTH, WIDTH)
            return point - rate * size * slopes(point)[index]

        return jax.vmap(one)(points, index, noise)

    return jax.lax.fori_loop(0, num_steps, step, jnp.tile(START, (SEEDS, 1)))


def test_a_robust_loss_under_noise_without_variance():
    """−¼E[ρ'(ε)²]P∇tr H, whatever E ρ''(ε) is."""
    time, square = 3.0, robust_square()
    gain = 2 / np.pi * np.arctan(WIDTH / SPREAD)  # E ρ''(ε) = P(|ε| < h)
    trace = lambda p: LOSS.trace_gauss_newton(p) / 4
    run = lambda rate: robust(rate, round(time / rate**2), key_of(0))
    others = {
        "divided by E ρ''": lowered(trace, time * square / gain),
        "divided by its square": lowered(trace, time * square / gain**2),
        "the start": START,
    }
    meets("Huber and Cauchy", run, 0.1, lowered(trace, time * square), 2e-3, others)


# --- descent on the root of the loss ---------------------------------------------------------


@jax.jit
def rooted(rate, num_steps):
    normal = jnp.sum(jax.jacfwd(LOSS.residual)(START), axis=0)
    slope = jax.grad(lambda p: jnp.sqrt(LOSS(p)))

    def step(_, point):
        return point - rate * slope(point)

    return jax.lax.fori_loop(0, num_steps, step, START + rate / 4 * normal)


def test_descent_on_the_root_of_the_loss():
    """−⅛P∇λ₁ on the clock kη², of where the iterates would land [AroraLiPanigrahi2022]."""
    largest = lambda p: GAMMA.local(p).hessian_eigenvalues()[-1]
    time = 2.0
    run = lambda rate: mf.limit_map(LOSS, rooted(rate, round(time / rate**2)))[None]
    others = {"−¼P∇λ₁": lowered(lambda p: largest(p) / 4, time), "the start": START,
              "the trace": lowered(lambda p: LOSS.trace_gauss_newton(p) / 8, time)}  # fmt: skip
    meets("√L", run, 0.02, lowered(lambda p: largest(p) / 8, time), 1e-4, others)


# --- momentum that lasts as long as the descent -----------------------------------------------


@pytest.mark.parametrize("gamma", [0.4, 3.0])
@pytest.mark.parametrize("name", ["least squares", "function"])
def test_a_heavy_mass_by_the_general_formula(name, gamma):
    """m ← m + γη(g − m), θ ← θ − ηm: λⱼ + λₖ becomes λⱼ + λₖ + (λⱼ − λₖ)²/2γ."""
    here = problem(name)
    size, zero = len(here.point), jnp.zeros_like(here.point)
    sigma = here.factor @ here.factor.T
    slope = here.loss.gradient
    field = lambda p: {"x": p["m"], "m": gamma * (p["m"] - slope(p["x"]))}
    nothing = jnp.zeros((size, size))
    noise = jnp.block([[gamma**2 * sigma, nothing], [nothing, nothing]])  # m before x
    flow = mf.IterationLimit(field, lambda p: noise, rank=size + 2)
    found = flow.drift({"m": zero, "x": here.point})["x"]

    values, vectors = np.linalg.eigh(np.asarray(jax.jit(jax.jacfwd(slope))(here.point)))
    is_normal = np.arange(size) >= size - 2
    rotated = vectors.T @ np.asarray(sigma) @ vectors
    third = np.asarray(jax.jit(jax.jacfwd(jax.jacfwd(slope)))(here.point))
    curved = lambda m: np.einsum("abc,bc->a", third, m)

    def expected(gamma):
        inverse = np.where(is_normal, 1 / np.where(is_normal, values, 1), 0)
        tangent = np.outer(~is_normal, ~is_normal) * rotated
        factor = inverse / (1 + values / (2 * gamma))
        mixed = np.outer(factor, ~is_normal) * rotated
        sums = values[:, None] + values + (values[:, None] - values) ** 2 / (2 * gamma)
        both = np.outer(is_normal, is_normal)
        normal = np.where(both, rotated / np.where(both, sums, 1), 0)
        back = lambda m: vectors @ m @ vectors.T
        bent = -vectors @ (inverse * (vectors.T @ curved(back(tangent)))) / 2
        pushed = curved(back(mixed + mixed.T + normal)) / 2
        return bent - vectors @ (~is_normal * (vectors.T @ pushed))

    at_least("the drift", norm(found), 0.1)
    close(f"the drift at γ = {gamma}", found, expected(gamma), 1e-10)
    at_least("that of SGD is rejected", norm(found - expected(1e12)) / norm(found), 1e-2)


@long_jit
def heavy(rate, gamma, num_steps, key):
    noise = mf.LabelNoise(0.5)

    def step(k, carry):
        points, mean = carry
        keys = jr.split(jr.fold_in(key, k), SEEDS)
        slopes = jax.vmap(lambda p, k: noise.gradient(LOSS, p, k))(points, keys)
        mean = mean + gamma * rate * (slopes - mean)
        return points - rate * mean, mean

    points = jnp.tile(START, (SEEDS, 1))
    carry = points, jnp.zeros_like(points)
    return jax.lax.fori_loop(0, num_steps, step, carry)[0]


@pytest.mark.parametrize("gamma", [0.8])
def test_label_noise_does_not_feel_the_mass(gamma):
    time = 2.0
    end = lambda time: mf.solve(
        mf.LimitDiffusion(GAMMA, mf.LabelNoise(0.5)), START, end_time=time, rtol=1e-8
    ).final  # fmt: skip
    run = lambda rate: heavy(rate, gamma, round(time / rate**2), key_of(1))
    others = {"half the time": end(time / 2), "the start": START}
    meets(f"γ = {gamma}", run, 0.1, end(time), 2e-3, others)
