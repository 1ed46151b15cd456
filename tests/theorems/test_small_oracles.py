"""Oracles of small models against brute force that shares no code with them."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov
from scipy.optimize import minimize as scipy_minimize

import manifoldflow as mf
from checks import at_most, close, refused
from manifoldflow import theory

# --- Ornstein-Uhlenbeck ---------------------------------------------------------------------

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(4, 4))
HESSIAN = ROOT @ ROOT.T / 4 + 0.1 * np.eye(4)
SIGMA = np.diag([1.0, 2.0, 0.5, 0.1]) + 0.3
ETA = 0.1


@pytest.mark.quick
def test_lyapunov_equations():
    continuous = theory.ornstein_uhlenbeck_covariance(HESSIAN, SIGMA, learning_rate=ETA)
    close("continuous", continuous, solve_continuous_lyapunov(HESSIAN, ETA * SIGMA), 1e-10)
    step = np.eye(4) - ETA * HESSIAN
    discrete = theory.ornstein_uhlenbeck_covariance(
        HESSIAN, SIGMA, learning_rate=ETA, discrete=True
    )
    close("discrete", discrete, solve_discrete_lyapunov(step, ETA**2 * SIGMA), 1e-10)
    assert np.max(np.abs(discrete - continuous)) > 1e-3, "the two do not differ here"


def test_label_noise_has_its_closed_forms():
    """(ηc/2)P⊥ and ηc(2I − ηH)⁻¹P⊥, with a flat direction, where nothing spreads."""
    frame, _ = np.linalg.qr(ROOT)
    hessian = frame @ np.diag([2.0, 1.0, 0.5, 0.0]) @ frame.T
    normal = frame[:, :3] @ frame[:, :3].T
    c = 0.7
    found = theory.ornstein_uhlenbeck_covariance(hessian, c * hessian, learning_rate=ETA)
    close("continuous", found, ETA * c / 2 * normal, 1e-12)
    found = theory.ornstein_uhlenbeck_covariance(
        hessian, c * hessian, learning_rate=ETA, discrete=True
    )
    expected = ETA * c * np.linalg.inv(2 * np.eye(4) - ETA * hessian) @ normal
    close("discrete", found, expected, 1e-12)


def test_sgd_has_the_discrete_covariance():
    """Averages of a long run of SGD on a quadratic, within four standard errors of blocks."""
    steps, blocks = 4000, 400
    factor = np.linalg.cholesky(SIGMA)
    point, total = np.zeros((blocks, 4)), np.zeros((blocks, 4, 4))
    rng = np.random.default_rng(1)
    for k in range(2 * steps):
        noise = rng.normal(size=(blocks, 4)) @ factor.T
        point = point - ETA * (point @ HESSIAN + noise)
        if k >= steps:
            total += point[:, :, None] * point[:, None, :] / steps
    mean, error = total.mean(0), total.std(0, ddof=1) / np.sqrt(blocks)
    discrete, continuous = (
        theory.ornstein_uhlenbeck_covariance(HESSIAN, SIGMA, learning_rate=ETA, discrete=d)
        for d in (True, False)
    )
    at_most("standard errors", np.max(np.abs(mean - discrete) / error), 4.5)
    assert np.max(np.abs(mean - continuous) / error) > 8, "the diffusion is told from the steps"


def test_what_has_no_stationary_covariance():
    flat = np.diag([1.0, 0.0])
    with refused(ValueError, "would grow for ever"):
        theory.ornstein_uhlenbeck_covariance(flat, np.eye(2), learning_rate=ETA)
    with refused(ValueError, "a saddle has no"):
        theory.ornstein_uhlenbeck_covariance(np.diag([1.0, -1.0]), flat, learning_rate=ETA)
    with refused(ValueError, "from which on SGD is unstable"):
        theory.ornstein_uhlenbeck_covariance(np.eye(2), np.eye(2), learning_rate=2.0, discrete=True)
    with refused(ValueError, "symmetric"):
        theory.ornstein_uhlenbeck_covariance(np.ones((2, 3)), np.eye(2), learning_rate=ETA)
    with refused(ValueError, "one shape"):
        theory.ornstein_uhlenbeck_covariance(np.eye(3), np.eye(2), learning_rate=ETA)


# --- The direction of largest margin ----------------------------------------------------------


def separable(seed, n=20, d=3):
    rng = np.random.default_rng(seed)
    inputs, truth = rng.normal(size=(n, d)), rng.normal(size=d)
    return inputs, np.sign(inputs @ truth)


@pytest.mark.parametrize("seed", range(4))
def test_max_margin_by_a_quadratic_program(seed):
    inputs, labels = separable(seed)
    found = theory.max_margin_direction(inputs, labels)
    close("length", np.linalg.norm(found), 1.0, 1e-12)
    program = scipy_minimize(
        lambda w: w @ w / 2,
        50 * found + 0.1,
        jac=lambda w: w,
        constraints={"type": "ineq", "fun": lambda w: labels * (inputs @ w) - 1},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    margin = np.min(labels * (inputs @ found))
    close("margin", margin, 1 / np.linalg.norm(program.x), 1e-6)
    rng = np.random.default_rng(9)
    others = found + 0.1 * rng.normal(size=(2000, 3))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert np.max(np.min(labels * (others @ inputs.T), axis=1)) <= margin


def test_gradient_flow_turns_to_it():
    """At the rate 1/ln t: the logistic flow, stretched by e^s in time."""
    inputs, labels = separable(2)
    found = theory.max_margin_direction(inputs, labels)
    signed = labels[:, None] * inputs

    def field(s, w):
        margins = signed @ w
        return np.exp(s - np.logaddexp(0, margins)) @ signed

    path = solve_ivp(field, (-3, 25), np.zeros(3), method="Radau", rtol=1e-8, t_eval=[8, 15, 25])
    cosines = [w @ found / np.linalg.norm(w) for w in path.y.T]
    angles = np.arccos(np.clip(cosines, -1, 1))
    assert angles[0] > angles[1] > angles[2], angles
    at_most("angle at the end times ln t", angles[2] * 25, 5.0)


def test_data_without_a_margin():
    inputs, labels = separable(0)
    mixed = np.concatenate([inputs, inputs[:1]]), np.append(labels, -labels[0])
    with refused(ValueError, "no plane through the origin"):
        theory.max_margin_direction(*mixed)
    with refused(ValueError, "-1 and 1 only"):
        theory.max_margin_direction(inputs, labels + 1)


# --- Two-layer networks -----------------------------------------------------------------------


def cubic(z):
    return z**3 + z


def test_minimizer_of_equal_neurons():
    features = theory.two_layer_minimizer(np.array([1.5, -0.4, 0.0]), 4, cubic)
    assert features.shape == (4, 3)
    close("fit", (features**3 + features).sum(0), np.array([1.5, -0.4, 0.0]), 1e-12)
    assert np.ptp(features, axis=0).max() == 0.0


def test_minimizer_with_a_second_layer_is_stationary():
    """Reached by minimising F on Γ, with weights of both signs of activation strength."""
    weights, targets = np.array([1.0, 0.5, 2.0]), np.array([0.8, -1.1])
    features = theory.two_layer_minimizer(targets, 3, cubic, second_layer=weights)
    close("fit", weights @ cubic(features), targets, 1e-10)
    inputs = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 2)))[0].T
    predict = lambda theta, x: jnp.asarray(weights) @ cubic(theta @ x)
    loss = mf.LeastSquares(inputs, targets, predict=predict, scale=2.0)
    manifold = mf.ZeroLossManifold(loss)
    start = manifold.project(0.5 * jr.normal(jr.key(0), (3, 4)))
    found = mf.minimize(manifold, loss.trace_gauss_newton, start).final
    close("features", found @ inputs.T, features, 1e-7)


def test_values_that_are_never_taken():
    with refused(ValueError, "never takes the value 2"):
        theory.two_layer_minimizer(np.array([2.0]), 1, jnp.tanh)
    with refused(ValueError, "number of neurons"):
        theory.two_layer_minimizer(np.array([2.0]), 0, cubic)
    with refused(ValueError, "other than 0"):
        theory.two_layer_minimizer(np.array([2.0]), 2, cubic, second_layer=np.array([1.0, 0.0]))


def test_the_time_bound_bounds_the_time():
    """Of the flow of F from a random fit, with the sharp constants of z³ + z [Theorem 3]."""
    rng = np.random.default_rng(5)
    inputs = np.linalg.qr(rng.normal(size=(5, 2)))[0].T
    mu = theory.coherence(inputs)
    close("orthonormal inputs", mu, 1.0, 1e-12)
    close("repeated inputs", 1 + theory.coherence(inputs[[0, 0]]), 1.0, 1e-12)
    targets = np.array([1.0, -0.5])
    loss = mf.LeastSquares(
        inputs, targets, predict=lambda theta, x: jnp.sum(cubic(theta @ x)), scale=2.0
    )
    manifold = mf.ZeroLossManifold(loss)
    flatness = lambda theta: loss.trace_gauss_newton(theta) / 2
    start = manifold.project(jnp.asarray(0.7 * rng.normal(size=(3, 5))))
    accuracy = 1e-3
    bound = theory.simplicity_time_bound(
        float(flatness(start)),
        accuracy,
        coherence=mu,
        normality=16 / 3,
        slope=1,
        third_derivative=6,
    )
    wanted = theory.two_layer_minimizer(targets, 3, cubic)
    there = lambda theta: jnp.max(jnp.abs(theta @ inputs.T - wanted)) <= accuracy
    flow = mf.RiemannianGradientFlow(manifold, flatness)
    arrived = mf.solve(flow, start, end_time=float(bound), until=there)
    assert arrived.result == mf.RESULTS.stopped_early
    assert 0 < float(arrived.times[-1]) <= bound


@pytest.mark.quick
def test_the_time_bound_by_hand():
    """2/(½·2²) + ln(2²/(6·0.1)²)/(6·½), and the first term alone for a coarse accuracy."""
    sharp = {"coherence": 0.5, "normality": 2.0, "slope": 1.0, "third_derivative": 6.0}
    close("bound", theory.simplicity_time_bound(2.0, 0.1, **sharp), 1.8026485362, 1e-9)
    close("coarse", theory.simplicity_time_bound(2.0, 10.0, **sharp), 1.0, 1e-12)
