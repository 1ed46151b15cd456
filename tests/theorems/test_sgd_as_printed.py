"""SGD as the paper writes it: flipped labels one at a time, Ξ columns of noise, any schedule.

[LiWangArora2022, eqs. (1), (3), (12), Lemmas 4.2, 6.3 and B.6, Remark B.10.]
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import manifoldflow as mf
from checks import at_least, at_most, close, in_window, refused
from circle_noise import (
    angle,
    brownian_angle,
    columns,
    DRIFT,
    landing_time,
    LOSS,
    NOISE,
    NORMAL,
    OFF,
    RADIUS,
    TANGENT,
    VARIANCE,
)
from limit_laws import EXAMPLES, outcome_law
from quick import long_jit
from richardson import agrees, at_rates

SEED = 3


# --- flipped labels ------------------------------------------------------------------------


def test_labels_that_are_flipped():
    """Each example with y ± δ: all outcomes of a step, their frequencies and covariance."""
    loss = mf.LeastSquares(EXAMPLES.inputs, np.zeros((4, 2)), predict=EXAMPLES.predict)
    noise = mf.LabelNoise(0.4, batch_size=1, distribution="rademacher")
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    # s = 1/8 over 4 examples of 2 outputs, and N/B = 4.
    outcomes = [EXAMPLES.gradients((EXAMPLES.outputs + 0.4 * sign) / 2) for sign in signs]
    equally = np.full(16, 1 / 16)
    outcome_law(noise, loss, EXAMPLES.point, np.concatenate(outcomes), equally, SEED)


PAIRS = mf.LeastSquares(np.arange(2), np.ones(2), predict=lambda p, i: p[0][i] * p[1][i], scale=0.5)
STD = 0.6


def test_the_papers_own_sgd_meets_its_limit():
    """aᵢbᵢ = 1 from off the manifold, ±δ, batch 1: aᵢ² − bᵢ² falls as exp(−δ²t/2), from Φ(x₀)."""
    noise = mf.LabelNoise(STD, batch_size=1, distribution="rademacher")
    start = jnp.array([[2.0, 1.2], [0.8, 0.5]])
    charge = lambda p: p[..., 0, :] ** 2 - p[..., 1, :] ** 2

    def run(rate, key):
        walk = mf.simulate(
            PAIRS, noise, optax.sgd, start, learning_rate=rate, num_steps=400, num_saves=4,
            key=key, throw=False,
        )  # fmt: skip
        return charge(walk.points)

    found = at_rates(run, [0.1, 0.05], 2000, SEED)
    ends = np.stack([found[0, :, 1], found[1, :, 4]])
    first, fall = np.asarray(charge(start)), STD**2 / 2
    error = agrees("charges at t = 1", ends, first * np.exp(-fall), SEED)
    nearest = np.asarray(charge(mf.ZeroLossManifold(PAIRS).project(start)))
    for name, wrong in (
        ("another clock", first * np.exp(-2 * fall)),
        ("from the nearest point", nearest * np.exp(-fall)),
    ):
        gaps = np.abs(wrong - first * np.exp(-fall)) / error
        at_least(f"{name}, in standard errors", np.max(gaps), 6)


def test_limits_that_need_normal_labels_say_so():
    update = mf.updates.ClippedSGD(1.0)
    with refused(ValueError, "LabelNoise(std, batch_size=1)", "normal"):
        flipped = mf.LabelNoise(STD, batch_size=1, distribution="rademacher")
        mf.LimitDiffusion(mf.ZeroLossManifold(PAIRS), flipped, update)
    for make in (mf.LabelNoise, lambda one, **more: mf.CustomNoise(lambda x: x, **more)):
        with refused(ValueError, "distribution must be", "'rademacher'", "got 'cauchy'"):
            make(1.0, distribution="cauchy")


# --- columns, one at a time ----------------------------------------------------------------


def test_columns_of_noise():
    """∇L + √Ξσ_ξ for ξ uniform, less √Ξ times the mean of the columns where that is not zero."""
    point = jnp.array([0.3, -0.2, 0.5])
    loss = mf.FunctionLoss(lambda x: jnp.sum(jnp.cosh(x)))
    given = np.random.default_rng(SEED).normal(size=(3, 5))
    noise = mf.CustomNoise(lambda x: given + 0 * x[0], distribution="columns")
    outcomes = np.sinh(point) + np.sqrt(5) * (given - given.mean(axis=1, keepdims=True)).T
    outcome_law(noise, loss, point, outcomes, np.full(5, 0.2), SEED)
    signs = mf.CustomNoise(lambda x: given[:, :2], distribution="rademacher")
    pairs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    outcome_law(signs, loss, point, np.sinh(point) + pairs @ given[:, :2].T, np.full(4, 0.25), SEED)


def test_lemma_b6_the_integrator():
    """Zₙ(t) = η Σ √Ξ(1_ξ − 1/Ξ): [Zₙ](t) = (Ξ − 1)t, beyond 4t, and Cov Zₙ(1) = I − 11ᵀ/Ξ."""
    count, num_steps = 8, 64
    noise = mf.CustomNoise(lambda x: jnp.eye(count), distribution="columns")
    still = mf.FunctionLoss(lambda x: 0 * jnp.sum(x**2))

    def integrator(key):
        walk = mf.simulate(
            still, noise, optax.sgd, jnp.zeros(count), learning_rate=num_steps**-0.5,
            num_steps=num_steps, num_saves=num_steps, key=key,
        )  # fmt: skip
        return walk.points[-1], jnp.sum(jnp.diff(walk.points, axis=0) ** 2), walk.times[-1]

    ends, brackets, times = long_jit(jax.vmap(integrator))(jr.split(jr.key(SEED), 4000))
    close("time", times, np.ones(4000), 1e-12)
    close("[Zₙ](1)", brackets, np.full(4000, count - 1.0), 1e-10)
    at_least("[Zₙ](1) against the printed bound", brackets[0], 4 + 1e-3)
    products = np.asarray(ends)[:, :, None] * np.asarray(ends)[:, None, :]
    errors = products.std(axis=0) / np.sqrt(len(products))
    expected = np.eye(count) - 1 / count
    gaps = lambda matrix: np.max(np.abs(products.mean(axis=0) - matrix) / errors)
    at_most(f"covariance of Zₙ(1), in standard errors, seed {SEED}", gaps(expected), 4)
    at_least("that of a standard Brownian motion, in standard errors", gaps(np.eye(count)), 6)


def test_columns_have_the_same_limit():
    """Eq. (1) with four columns of sum zero, of the covariance that normal noise had."""
    corners = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    noise = mf.CustomNoise(columns(NORMAL @ corners, TANGENT @ corners), distribution="columns")

    def run(rate, key):
        walk = mf.simulate(
            LOSS, noise, optax.sgd, OFF, learning_rate=rate, num_steps=400, num_saves=4,
            key=key, throw=False,
        )  # fmt: skip
        return angle(walk.points)

    found = at_rates(run, [0.1, 0.05], 4000, SEED)
    ends = np.stack([found[0, :, 1], found[1, :, 4]])
    error = agrees("mean angle at t = 1", ends, DRIFT, SEED)
    agrees("its square", ends**2, DRIFT**2 + VARIANCE, SEED)
    at_least("no drift, in standard errors", DRIFT / error, 6)


# --- schedules, the fast phase, the stochastic differential equation -------------------------


def decay(rate, num_steps, step):
    """Linearly to zero, and zero from there on."""
    return rate * jnp.maximum(1 - step / num_steps, 0)


def test_a_decaying_rate_runs_on_the_sum_of_squares():
    """The limit at Σηₖ², and neither at (Σηₖ)²/steps nor at the first rate's clock."""
    rates, counts = np.array([0.12, 0.06]), np.array([200.0, 800.0])

    def run(rate, count, key):
        schedule = jax.tree_util.Partial(decay, rate, count)
        walk = mf.simulate(
            LOSS, NOISE, optax.sgd, OFF, learning_rate=schedule, num_steps=800, key=key,
            throw=False,
        )  # fmt: skip
        found, expected = angle(walk.final), brownian_angle(key, schedule(jnp.arange(800)))
        return jnp.stack([found - expected, found**2 - expected**2]), walk.times[-1]

    gaps, times = at_rates(run, rates, 2000, SEED, jnp.asarray(counts))
    clock = [np.sum(decay(r, c, np.arange(c)) ** 2) for r, c in zip(rates, counts)]
    close("the clock", times[:, 0], clock, 1e-12)
    error = agrees("moments of the angle, less those of the limit", gaps, 0.0, SEED)[0]
    at_least("(Σηₖ)²/steps, in standard errors", DRIFT * clock[1] / 4 / error, 6)


def test_the_fast_phase_takes_steps_in_inverse_proportion_to_the_rate():
    """kη to within 0.1 of the circle is the time of gradient flow, at three rates."""
    rates = np.array([0.04, 0.02, 0.01])
    is_near = lambda x: jnp.abs(jnp.linalg.norm(x) - 1) < 0.1

    def steps(rate, key):
        walk = mf.simulate(
            LOSS, NOISE, optax.sgd, OFF, learning_rate=rate, num_steps=400, until=is_near,
            key=key, throw=False,
        )  # fmt: skip
        return walk.stats["num_steps"]

    counts = at_rates(steps, rates, 500, SEED)
    assert np.all(counts < 400), "some runs never came near"
    expected = landing_time(RADIUS, 1.1)
    means = counts.mean(axis=1) * rates
    errors = counts.std(axis=1) * rates / np.sqrt(counts.shape[1])
    for rate, mean, error in zip(rates, means, errors):
        at_most(
            f"kη = {mean:.4f} at η = {rate} for {expected:.4f}, seed {SEED}",
            abs(mean - expected),
            4 * error + 3 * rate,
        )
    order = np.polyfit(np.log(rates), np.log(counts.mean(axis=1)), 1)[0]
    in_window("exponent of the number of steps", order, -1.1, -0.9)


def test_the_stochastic_differential_equation_has_the_same_limit():
    """dX = −η⁻¹∇L dt + F dW, eq. (3): moments of its angle at t = ½ as η falls."""
    end_time, num_steps = 0.5, 1000  # which `solve` takes by default

    def run(rate, key):
        flow = mf.SGDDiffusion(LOSS, NOISE, rate)
        end = mf.solve(flow, jnp.array([1.0, 0.0]), end_time=end_time, key=key, throw=False).final
        step = (end_time / num_steps) ** 0.5
        found, expected = angle(end), brownian_angle(key, jnp.full(num_steps, step), sign=1)
        radius = jnp.linalg.norm(end)
        return jnp.stack([found - expected, found**2 - expected**2, radius - 1])

    gaps = at_rates(run, [0.1, 0.05], 1000, SEED)
    error = agrees("moments, less those of the limit", gaps, 0.0, SEED)
    at_least("no drift, in standard errors", DRIFT * end_time / error[0], 6)


# --- the way of gradient flow --------------------------------------------------------------


def test_lemma_6_3_the_length_of_gradient_flow():
    """At most 2√(L(0)/C) where |∇L|² ≥ CL; printed is a quarter of that.

    L = (1/2n)|Z(u² − v²) − y|² from u = v = α with y along the weakest direction of Z: there
    Lemma D.2 is an equality, and for a small y the way is almost straight.
    """
    num_examples, scale, step = 3, 0.8, 1e-3
    z = np.random.default_rng(SEED).normal(size=(num_examples, 6))
    values, vectors = np.linalg.eigh(z @ z.T)
    constant = 16 / num_examples * values[0] * scale**2
    for size, tightness in ((1e-3, 0.99), (1.0, 0.5)):
        u, v = np.full((2, 6), scale)
        y, length, ratios = size * vectors[:, 0], 0.0, []
        first = size**2 / (2 * num_examples)
        for _ in range(20_000):
            residual = z @ (u**2 - v**2) - y
            slope = z.T @ residual * 2 / num_examples
            speed = np.hypot(np.linalg.norm(slope * u), np.linalg.norm(slope * v))
            ratios.append(speed**2 / (residual @ residual / (2 * num_examples)))
            u, v, length = u - step * slope * u, v + step * slope * v, length + step * speed
            if np.linalg.norm(residual) < 1e-6 * size:
                break
        at_most("what is left of the residual", np.linalg.norm(residual), 1e-5 * size)
        at_least("|∇L|²/(CL) all along", np.min(ratios) / constant, 1 - 1e-9)
        share = length / (2 * np.sqrt(first / constant))
        in_window(f"length over 2√(L/C), y of size {size}", share, tightness, 1 + 1e-3)
        at_least("length over √L/(2√C), as printed", 4 * share, 2)
