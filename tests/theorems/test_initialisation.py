"""What the start and the noise choose in small models [Ma2022, Woodworth2020, Soudry2018].

Of the many perfect fits gradient descent picks one that depends on its start; label noise shrinks
what it remembers of it. Where no fit exists, on separable data, the margin decides.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.linalg

import manifoldflow as mf
from checks import at_least, at_most, close, in_window, refused

FULL = mf.IsotropicNoise(0.0)  # full gradients: plain gradient descent


def gaussian(seed, n, d):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, d))
    return inputs, inputs @ rng.normal(size=d)


# --- Linear regression: the nearest fit [Ma2022, Theorem 9.3] ----------------------------------

LINEAR = mf.models.LinearRegression(*gaussian(0, 4, 9))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_linear_regression_ends_at_the_nearest_fit(scale):
    """X⁺y + (I − X⁺X)β⁰ for gradient flow and gradient descent, from 0 and from elsewhere."""
    start = LINEAR.random(jr.key(0), scale)
    inputs = np.asarray(LINEAR.inputs)
    inverse = np.linalg.pinv(inputs)
    nearest = inverse @ LINEAR.targets + start - inverse @ (inputs @ start)
    close("limit", LINEAR.limit(start), nearest, 1e-12)
    close("gradient flow", mf.limit_map(LINEAR.manifold, start), nearest, 1e-12)
    rate = 1 / LINEAR.decay_rates[0]
    run = mf.simulate(
        LINEAR.loss, FULL, optax.sgd, start, learning_rate=rate, num_steps=800, key=jr.key(1)
    )
    close("gradient descent", run.final, nearest, 1e-10)
    if scale:
        at_least("a start elsewhere ends elsewhere", np.linalg.norm(nearest - LINEAR.limit()), 1.0)
    else:
        close("from 0", LINEAR.limit(), LINEAR.limit(LINEAR.initial()), 1e-15)


def test_linear_regression_has_its_rates():
    start, rate = LINEAR.random(jr.key(2)), 0.3 / LINEAR.decay_rates[0]
    flowed = mf.solve(mf.GradientFlow(LINEAR.loss), start, end_time=0.7, rtol=1e-9, atol=1e-11)
    close("flow", flowed.final, LINEAR.flow(start, 0.7), 1e-8)
    run = {"learning_rate": rate, "num_steps": 20, "key": jr.key(0)}
    descended = mf.simulate(LINEAR.loss, FULL, optax.sgd, start, **run).final
    close("descent", descended, LINEAR.descent(start, rate, 20), 1e-12)
    hessian = np.linalg.eigvalsh(np.asarray(LINEAR.loss.hessian(start).as_matrix()))
    close("rates", LINEAR.decay_rates, hessian[::-1][:4], 1e-12)
    left = [np.linalg.norm(LINEAR.flow(start, t) - LINEAR.limit(start)) for t in (40.0, 41.0)]
    close("the slowest mode is left", np.log(left[0] / left[1]), LINEAR.decay_rates[-1], 1e-6)


def test_label_noise_does_not_move_a_linear_model():
    flow = mf.LimitDiffusion(LINEAR.manifold, mf.LabelNoise(1.0))
    drift = flow.drift(jnp.asarray(LINEAR.limit(LINEAR.random(jr.key(3)))))
    at_most("drift", jnp.linalg.norm(drift), 1e-12)


# --- β ⊙ β: sparse recovery [Ma2022, Theorems 9.4 and 9.13] ------------------------------------

SPARSE, RATE = 2, 0.1
ALPHAS = np.array([1e-6, 1e-7, 1e-8])


def squared_errors(num_examples, noise=0.0, num_steps=4000, seed=0, d=200):
    """‖β⊙β − β*⊙β*‖² at every tenth step of gradient descent, a row for each α; the model."""
    truth = np.zeros(d)
    truth[:SPARSE] = 1
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, d))
    targets = inputs @ truth + noise * rng.normal(size=num_examples)
    model = mf.models.QuadraticallyParametrized(inputs, targets)

    def path(alpha):
        return mf.simulate(
            model.loss, FULL, optax.sgd, model.initial(alpha),
            learning_rate=RATE, num_steps=num_steps, num_saves=num_steps // 10, key=jr.key(0),
            observe={"error": lambda beta: jnp.sum((model.weights(beta) - truth) ** 2)},
        ).observables["error"]  # fmt: skip

    return np.asarray(jax.jit(jax.vmap(path))(ALPHAS)), model


def test_sparse_recovery_within_its_window():
    """Error² ≤ α√d between 2·log(d/α)/η and 1/(η√(dα)) steps, and none at ½·log(d/α)/η.

    n = 100 ≈ r² log² d. Without noise on the targets the upper end is no wall: see below.
    """
    errors, model = squared_errors(100)
    for alpha, error in zip(ALPHAS, errors):
        early, late = model.recovery_window(alpha, RATE)
        bound, steps = alpha * np.sqrt(200), 10 * np.arange(len(error))
        within = error[(steps >= 2 * early) & (steps <= late)]
        assert within.size > 2, (early, late)
        at_most(f"error² in the window, α = {alpha}, seed 0", within.max(), bound)
        at_least(f"error² too early, α = {alpha}", error[steps <= early / 2].min(), 0.9 * SPARSE)
    shares = errors[:, -1] / (ALPHAS * np.sqrt(200))
    at_most("error²/(α√d) after the window", shares.max(), 1.0)


def test_too_few_examples_recover_nothing():
    errors, _ = squared_errors(8)
    at_least("least error² of all α and times, n = 8, seed 0", errors.min(), 0.1)


def test_noisy_targets_make_the_window_end():
    """The error² a little after log(d/α)/η steps is below a third of what it is later."""
    errors, model = squared_errors(100, noise=0.5)
    for alpha, error in zip(ALPHAS, errors):
        stop = round(1.2 * model.recovery_window(alpha, RATE)[0] / 10)
        at_least(f"error² later over {error[stop]:.3f}, α = {alpha}", error[-1] / error[stop], 3)


def test_the_population_loss_decouples():
    """L = ¼‖β⊙β − β*⊙β*‖²: each coordinate goes its own way, in closed form under gradient flow.

    Orthogonal inputs with XᵀX = nI make the empirical loss the population loss.
    """
    d, alpha, rate = 6, 1e-3, 0.05
    truth = np.array([1.0, 1, 0, 0, 0, 0])
    inputs = np.sqrt(d) * np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    model = mf.models.QuadraticallyParametrized(inputs, inputs @ truth)
    beta = jnp.asarray(np.random.default_rng(2).uniform(0.2, 1.5, d))
    close("L", model.loss(beta), np.sum((beta**2 - truth) ** 2) / 4, 1e-12)
    close("(9.22)", model.loss.gradient(beta), (beta**2 - truth) * beta, 1e-12)
    time = 9.0
    flowed = mf.solve(
        mf.GradientFlow(model.loss), model.initial(alpha), end_time=time, rtol=1e-9, atol=1e-12
    )
    grown = 1 / (1 + (alpha**-2 - 1) * np.exp(-2 * time))
    idle = alpha**2 / (1 + 2 * alpha**2 * time)
    closed = np.where(truth > 0, grown, idle)
    close("on the support", model.weights(flowed.final)[:2], closed[:2], 1e-6)
    close("off it", model.weights(flowed.final)[2:], closed[2:], 1e-6)
    for epsilon in (1e-2, 1e-6):
        one, steps = alpha, 0
        while 1 - one > epsilon:
            one, steps = one - rate * (one**2 - 1) * one, steps + 1
        wanted = np.log(1 / (epsilon * alpha)) / rate
        in_window(f"steps to ε = {epsilon} over log(1/εα)/η", steps / wanted, 0.5, 1.1)
    run = {"learning_rate": rate, "num_steps": steps, "key": jr.key(0)}
    final = mf.simulate(model.loss, FULL, optax.sgd, model.initial(alpha), **run).final
    close("descent", final[:2], [one, one], 1e-9)
    at_most("off the support nothing grows to 2α", jnp.max(final[2:]), 2 * alpha)


# --- w₊² − w₋²: from ℓ₁ to ℓ₂, and label noise as a start that shrinks [Woodworth2020] ----------

DIAGONAL = mf.models.OverparametrizedLinear(*gaussian(3, 4, 9))
LANDED = {alpha: DIAGONAL.landing(alpha) for alpha in (0.01, 0.1, 1.0, 10.0)}


def q(z):
    return 2 - np.sqrt(4 + z**2) + z * np.arcsinh(z / 2)


def minimised(squares, active=slice(None)):
    """argmin Σⱼ pⱼ q(wⱼ/pⱼ) on {Zw = y}: Newton's method in the null space; p = α² coordinatewise.

    Shares nothing with the oracle, which solves the dual. Only coordinates in `active` count.
    """
    inputs, targets = np.asarray(DIAGONAL.inputs), np.asarray(DIAGONAL.targets)
    basis, weights = scipy.linalg.null_space(inputs), np.zeros(9)
    weights[active] = 1
    p = np.broadcast_to(squares, 9)

    cost = lambda w: np.sum(weights * p * q(w / p))
    w = np.linalg.lstsq(inputs, targets, rcond=None)[0]
    for _ in range(300):
        slope = basis.T @ (weights * np.arcsinh(w / (2 * p)))
        bend = basis.T @ (basis * (weights / np.sqrt(w**2 + 4 * p**2))[:, None])
        step, length = -basis @ np.linalg.lstsq(bend, slope, rcond=None)[0], 1.0
        while cost(w + length * step) > cost(w) and length > 1e-9:
            length /= 2
        w = w + length * step
    return w


@pytest.mark.parametrize("alpha", LANDED)
def test_gradient_flow_minimises_q(alpha):
    """From w₊ = w₋ = α1 it lands at argmin Q_α, Q_α = α² Σ q(θⱼ/α²) over the d coordinates.

    The lecture notes sum over n; that minimiser is another one.
    """
    landed = DIAGONAL.weights(mf.limit_map(DIAGONAL.manifold, DIAGONAL.initial(alpha), rtol=1e-9))
    close("oracle", landed, LANDED[alpha], 1e-6)
    close("argmin Q", landed, minimised(alpha**2), 1e-6)
    printed = minimised(alpha**2, slice(0, 4))
    at_least("the sum over n is rejected", np.linalg.norm(printed - landed), 1e-2)


def test_q_goes_from_l1_to_l2():
    """4α²Q_α → ‖θ‖₂² as α → ∞, Q_α/ln α⁻² → ‖θ‖₁ as α → 0; the norms of the fits are ordered."""
    theta = np.array([1.0, -0.3, 0.0, 2.0])
    cost = lambda alpha: alpha**2 * np.sum(q(theta / alpha**2))
    close("ℓ₂", 4 * 30.0**2 * cost(30.0), np.sum(theta**2), 1e-5)
    close("ℓ₁", cost(1e-60) / np.log(1e120), np.sum(np.abs(theta)), 1e-2)
    fits = np.array(list(LANDED.values()))
    assert np.all(np.diff(np.linalg.norm(fits, axis=1)) < 0), "ℓ₂ norms fall with α"
    nearest = mf.models.LinearRegression(DIAGONAL.inputs, DIAGONAL.targets).limit()
    close("the kernel regime", fits[-1], nearest, 1e-3)


def test_label_noise_shrinks_the_start():
    """w(t) = argmin Q_{α(t)} with αⱼ(t)² = |uⱼvⱼ(t)| = α²e^{−c sⱼ t}, for the solved limit flow."""
    alpha, times, c = 0.8, np.array([0.0, 0.1, 0.4, 0.8]), 0.5**2 / 4
    flow = mf.LimitDiffusion(DIAGONAL.manifold, mf.LabelNoise(0.5))  # c = δ²/n: whole batches
    start = mf.limit_map(DIAGONAL.manifold, DIAGONAL.initial(alpha), rtol=1e-9)
    walk = mf.solve(flow, start, end_time=20.0, save_times=times[1:] / c, rtol=1e-8, atol=1e-10)
    for index, time in enumerate(times):
        point = walk.point(index)
        shrunk = alpha**2 * np.exp(-time * np.asarray(DIAGONAL.decay_rates))
        close(f"α(t)², ct = {time}", DIAGONAL.charges(point), shrunk, 1e-5)
        close(f"w(t), ct = {time}", DIAGONAL.weights(point), minimised(shrunk), 1e-5)
        if time:
            frozen = np.linalg.norm(minimised(alpha**2) - DIAGONAL.weights(point))
            at_least("and not the start's own minimiser", frozen, 0.02)


def test_the_trace_needs_the_half_in_the_loss():
    """tr∇²L = (4/n)Σⱼ(Σᵢz²ᵢⱼ)(u²ⱼ + v²ⱼ) for L = (1/2n)Σr²; for (1/n)Σr², as printed, 8/n."""
    weights = LANDED[1.0]  # where u and v have product 1
    squares = np.sqrt(weights**2 + 4)
    point = {"u": jnp.sqrt((squares + weights) / 2), "v": jnp.sqrt((squares - weights) / 2)}
    sums = jnp.sum(DIAGONAL.inputs**2, axis=0) @ squares
    loss = lambda x: DIAGONAL.loss({"u": x[:9], "v": x[9:]})
    found, n = jnp.trace(jax.hessian(loss)(jnp.concatenate([point["u"], point["v"]]))), 4
    close("½ in L", found, 4 / n * sums, 1e-9)
    at_least("4/n without ½", abs(2 * found / (4 / n * sums) - 1), 0.9)


def test_bad_input():
    with refused(ValueError, "inputs must be (n, d)"):
        mf.models.LinearRegression(np.ones(3), np.ones(3))
