"""[LiWangArora2022]: Φ, its derivatives, and where label noise takes a linear model.

Theorem 4.6 with Corollary 5.2: on the limit clock SGD with label noise follows
dY/dt = −(c/4) P∇tr∇²L.
Section 6: for f_i = ⟨z_i, u² − v²⟩ this flow ends at the weighted-ℓ₁ interpolant.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lawbook
import manifoldflow as mf
import zoo
from checks import at_least, at_most, central_difference, close, distance, equal, flat, norm

# --- Section 6: the overparametrised linear model -----------------------------------------

DIMENSION, SPARSITY, END = 100, 5, 200.0
EARLY = (0.1, 0.5, 1.0, 2.0, 5.0)
CASES = [(kind, n) for kind in ("boolean", "gaussian") for n in (30, 60)]


@functools.cache
def olm(kind, num_examples, seed=0):
    rng = np.random.default_rng(seed + num_examples)
    shape = (num_examples, DIMENSION)
    inputs = rng.choice([-1.0, 1.0], shape) if kind == "boolean" else rng.normal(size=shape)
    target = np.zeros(DIMENSION)
    target[:SPARSITY] = rng.choice([-1.0, 1.0], SPARSITY)
    return inputs, inputs @ target


def label_noise_flow(kind, num_examples, std=1.0, save_times=(*EARLY, END)):
    """From Φ(1, 1) by the limit flow with c = 1 if std = 1: scale 1/n and batches of one."""
    inputs, targets = olm(kind, num_examples)
    loss = mf.LeastSquares(inputs, targets, predict=zoo.squares)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=std, batch_size=1))
    ones = jnp.ones(DIMENSION)
    start = mf.limit_map(loss, {"u": ones, "v": ones})
    return mf.solve(flow, start, end_time=save_times[-1], save_times=save_times)


solved = functools.cache(label_noise_flow)


def linear_map(points):
    return np.asarray(points["u"] ** 2 - points["v"] ** 2)


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_label_noise_ends_at_the_linear_program(kind, n):
    walk = solved(kind, n)
    program = mf.theory.weighted_l1_interpolant(*olm(kind, n))
    error = np.max(np.abs(linear_map(walk.points)[-1] - program))
    at_most(f"max|w(200) - w_LP|, {kind} n={n}, seed {n}", error, 1e-5)
    steps = int(walk.stats["num_steps"] + walk.stats["num_rejected"])
    at_most(f"attempted steps, {kind} n={n}", steps, 500)
    at_most(f"largest defect, {kind} n={n}", walk.stats["max_defect"], 1e-8)


def test_sixty_examples_recover_the_sparse_target():
    for kind in ("boolean", "gaussian"):
        inputs, targets = olm(kind, 60)
        final = linear_map(solved(kind, 60).points)[-1]
        target = np.linalg.lstsq(inputs[:, :SPARSITY], targets, rcond=None)[0]
        at_most(f"{kind}: off the support", np.max(np.abs(final[SPARSITY:])), 1e-5)
        at_most(f"{kind}: on the support", np.max(np.abs(final[:SPARSITY] - target)), 1e-5)


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_path_follows_the_closed_form(kind, n):
    walk, ones = solved(kind, n), np.ones(DIMENSION)
    times = np.asarray(walk.times)[:-1]
    expected = mf.theory.overparametrized_linear_flow(*olm(kind, n), ones, ones, time=times)
    error = np.max(np.abs(linear_map(walk.points)[:-1] - expected), axis=1)
    equal("saved times", times.tolist(), [0.0, *EARLY])
    at_most(f"max over t of |w(t) - oracle|, {kind} n={n}, seed {n}", error.max(), 1e-4)


def charge_error(walk, inputs, noise_constant=1.0):
    """The largest relative error of u·v against e^{−c s t} where it is still above 1e-4."""
    charges = np.asarray(walk.points["u"] * walk.points["v"])
    rates = noise_constant * 4 * np.mean(np.asarray(inputs) ** 2, axis=0)
    expected = charges[0] * np.exp(-rates * np.asarray(walk.times)[:, None])
    seen = np.abs(expected) > 1e-4
    assert seen[1:].sum() >= DIMENSION, f"only {seen[1:].sum()} charges are large enough"
    return np.max(np.abs(charges[seen] / expected[seen] - 1))


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_charges_decay_at_their_own_rates(kind, n):
    error = charge_error(solved(kind, n), olm(kind, n)[0])
    at_most(f"relative error of u·v, {kind} n={n}, seed {n}", error, 1e-4)


def test_a_wrong_clock_is_detected():
    walk = label_noise_flow("gaussian", 30, std=2.0, save_times=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    inputs = olm("gaussian", 30)[0]
    at_least("charge error with std 2 against c = 1", charge_error(walk, inputs), 0.1)
    at_most("charge error with std 2 against c = 4", charge_error(walk, inputs, 4.0), 1e-4)


# --- Section 4: Φ and its derivative -------------------------------------------------------


def test_limit_map_is_not_slowed_by_condition():
    counts = [
        lawbook.limit_map_law(
            mf.limit_map_with_info, f"condition {c:.0e}", *zoo.prescribed_gram(c, alpha=1.0), 80
        )
        for c in (1e2, 1e4, 1e6)
    ]
    assert max(counts) <= 3 * min(counts), f"factorisations {counts} grow more than 3 times"


def test_limit_map_from_a_small_start():
    lawbook.limit_map_law(
        mf.limit_map_with_info, "alpha 0.1", *zoo.prescribed_gram(1e4, alpha=0.1), 200
    )


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_limit_map_in_closed_form(scale):
    """L = ½f², f = ½(xᵀAx − 1): gradient flow is x' = −f·A x, so Φ(x) = e^{−s*A}x."""
    rates = np.array([1.0, 0.5, 2.0, 0.8, 1.3])
    loss = mf.FunctionLoss(lambda x: scale * 0.125 * (jnp.sum(jnp.asarray(rates) * x**2) - 1) ** 2)
    start = jr.normal(jr.key(1), (5,))

    def excess(s):
        return np.sum(rates * (np.exp(-s * rates) * np.asarray(start)) ** 2) - 1

    low, high = -20.0, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    lawbook.limit_map_law(
        mf.limit_map_with_info, f"scale {scale:.0e}", loss, start, np.exp(-low * rates) * start, 60
    )


# --- Lemma 4.3 and the derivative off the manifold -----------------------------------------


@functools.cache
def small_network(seed=0):
    keys = jr.split(jr.key(seed), 3)
    point = zoo.network_point(keys[0], width=5, num_outputs=1)
    loss = mf.LeastSquares(
        jr.normal(keys[1], (4, 3)), jr.normal(keys[2], (4, 1)), predict=zoo.network
    )
    return loss, point, mf.limit_map(loss, point, rtol=1e-10)


@jax.jit
def phi(loss, point):
    return mf.limit_map(loss, point, rtol=1e-9)


@jax.jit
def phi_jvp(loss, point, v):
    return jax.jvp(lambda p: phi(loss, p), (point,), (v,))


def test_lemma_4_3_the_derivative_on_the_manifold_is_the_projection():
    loss, _, limit = small_network()
    manifold = mf.ZeroLossManifold(loss)
    for seed in (1, 2):
        v = zoo.normal_like(limit, seed)
        finite = central_difference(lambda t: phi(loss, zoo.moved(limit, v, t)), 1e-3)
        close(
            f"∂Φ[v] by differences, seed {seed}",
            finite,
            manifold.tangent_projection(limit, v),
            1e-6,
        )
        _, tangent = phi_jvp(loss, limit, v)
        close(f"∂Φ[v] by jvp, seed {seed}", tangent, manifold.tangent_projection(limit, v), 1e-9)


def test_limit_map_is_constant_along_gradient_flow():
    loss, point, _ = small_network()
    gradient = loss.gradient(point)
    _, tangent = phi_jvp(loss, point, gradient)
    at_most("‖∂Φ(x)∇L‖/‖∇L‖", norm(tangent) / norm(gradient), 1e-6)


def test_derivative_off_the_manifold_both_modes():
    loss, point, _ = small_network()
    v, w = zoo.normal_like(point, 3), zoo.normal_like(point, 4)
    finite = central_difference(lambda t: phi(loss, zoo.moved(point, v, t)), 1e-3)
    value, tangent = phi_jvp(loss, point, v)
    _, pullback = jax.vjp(lambda p: phi(loss, p), point)
    close("jvp against differences", tangent, finite, 1e-6)
    (cotangent,) = pullback(w)
    forward = float(jnp.vdot(flat(tangent), flat(w)))
    at_most(
        "jvp against vjp", abs(forward - jnp.vdot(flat(cotangent), flat(v))), 1e-9 * abs(forward)
    )
    close("value under differentiation", value, phi(loss, point), 1e-12)
    projection = mf.ZeroLossManifold(loss).tangent_projection(value, v)
    at_least("∂Φ off the manifold is not P", distance(tangent, projection), 1e-2)


def test_projection_stays_near_and_differs_from_the_limit_map():
    for seed in range(3):
        loss, point, limit = small_network(seed)
        landed = mf.ZeroLossManifold(loss).project(point)
        near, far = norm(zoo.moved(landed, point, -1)), norm(zoo.moved(limit, point, -1))
        at_most(f"‖project(x)−x‖ against 2‖Φ(x)−x‖, seed {seed}", near, 2 * far)
        at_least(f"project differs from Φ, seed {seed}", distance(landed, limit), 1e-3)


def test_label_noise_drift_against_the_brute_force_hessian_trace():
    loss, _, limit = small_network()
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=0.7, batch_size=2))
    c = (1 / 4) * 0.7**2 * (4 / 2)  # scale·std²·N/B with N = 4 examples, scale 1/N
    lawbook.label_noise_drift_law(flow, limit, c)
