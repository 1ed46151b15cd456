"""Gradient descent on separable data, from any start: to the largest margin, or to a KKT point.

[Soudry2018; Ma2022, section 9.4], and for homogeneous networks K. Lyu, J. Li, ICLR 2020.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.scipy.special import logsumexp

import manifoldflow as mf
from checks import at_least, at_most, close, in_window, refused, slope
from manifoldflow import theory

INPUTS, LABELS, _ = mf.models.separable_data(jr.key(0), 12, 3, margin=0.3)
SIGNED = np.asarray(INPUTS * LABELS[:, None])
FULL = mf.IsotropicNoise(0.0)  # full gradients: plain gradient descent
KINDS = pytest.mark.parametrize("kind", ["exponential", "logistic"])


def models(kind):
    return mf.models.SeparableClassification(INPUTS, LABELS, kind)


def descended(loss, starts, learning_rate, num_steps):
    """Points after 1, 2, 4, … steps from each start."""
    doublings = int(np.log2(num_steps))
    run = lambda start: mf.simulate(
        loss, FULL, optax.sgd, start, learning_rate=learning_rate, num_steps=num_steps,
        num_saves=num_steps // 64, key=jr.key(0), throw=False,
    ).points[2 ** jnp.arange(doublings - 5)]  # fmt: skip
    return np.asarray(jax.jit(jax.vmap(run))(starts)), 64 * 2 ** np.arange(doublings - 5)


def starts_of(model):
    """Of lengths 0.1 to 5, one of them in the worst direction."""
    worst = -5 * jnp.asarray(model.max_margin_direction())
    random = jr.normal(jr.key(1), (4, 3)) * jnp.array([0.1, 0.5, 1.0, 3.0])[:, None]
    return jnp.concatenate([worst[None], random])


# --- Linear models: the direction of largest margin ---------------------------------------------


@KINDS
def test_steps_that_grow_reach_the_margin_like_one_over_their_number(kind):
    """On −ℓ⁻¹(L), of L with steps ∝ 1/L: γ̄ − margin falls like 1/k from every start."""
    model = models(kind)
    largest = model.max_margin
    paths, steps = descended(model.log_loss, starts_of(model), 0.2, 2**14)
    for start, path in enumerate(paths):
        margins = np.array([model.margin(jnp.asarray(w)) for w in path[-3:]])
        gaps = largest - margins
        at_most(f"γ̄ − margin over γ̄, {kind}, start {start}", gaps[-1] / largest, 2e-3)
        in_window(f"its order in k, {kind}, start {start}", -slope(steps[-3:], gaps), 0.85, 1.2)
        found = theory.margin_kkt(path[-1], SIGNED @ path[-1], SIGNED)
        at_most(f"KKT residual, {kind}, start {start}", found.residual, 0.05)


def test_growing_steps_are_steps_on_the_loss():
    """∇(−ℓ⁻¹(L)) = ∇L/(ℓ'(ℓ⁻¹(L))·−1): ∇L/L for the exponential loss; it does not underflow."""
    point = jnp.array([0.3, -0.2, 0.5])
    exponential, logistic = models("exponential"), models("logistic")
    value = exponential.loss(point)
    close("ln L", exponential.log_loss(point), jnp.log(value), 1e-12)
    close(
        "∇L/L",
        exponential.log_loss.gradient(point),
        exponential.loss.gradient(point) / value,
        1e-12,
    )
    value = logistic.loss(point)
    factor = jnp.exp(value) / jnp.expm1(value)
    close(
        "logistic", logistic.log_loss.gradient(point), factor * logistic.loss.gradient(point), 1e-12
    )
    far = jnp.asarray(1e5 * logistic.max_margin_direction())
    assert float(logistic.loss(far)) == 0.0
    at_least("slope where L is 0", jnp.linalg.norm(logistic.log_loss.gradient(far)), 0.1)


def test_constant_steps_turn_to_it_slowly():
    """On the logistic loss itself the margin lacks about 1/ln k of γ̄, from every start."""
    model = models("logistic")
    paths, steps = descended(model.loss, starts_of(model), 0.3, 2**15)
    for start, path in enumerate(paths):
        directions = path / np.linalg.norm(path, axis=1, keepdims=True)
        cosines = directions @ model.max_margin_direction()
        at_least(f"cosine with the direction, start {start}", cosines[-1], 0.93)
        at_least(f"it rises, start {start}", np.min(np.diff(cosines[-4:])), 0.0)
    gaps = model.max_margin - np.array([model.margin(jnp.asarray(w)) for w in paths[1, -6::5]])
    ratio = gaps[1] / gaps[0] * np.log(steps[-1]) / np.log(steps[-6])
    in_window("gap·ln k at 2¹⁵ over that at 2¹⁰", ratio, 0.6, 1.4)


def test_the_bound_of_the_proof_for_steps():
    """−ln L(k) ≥ −ln L(0) + γ̄(1 − ηL(0)R²/2)|w(k) − w(0)| for GD with ηL(0)R² < 2, R = max|xᵢ|.

    The flow has η = 0. With |w(k)| for |w(k) − w(0)|, as in (9.173) to (9.175), it is false.
    """
    model = models("exponential")
    start = jnp.asarray(3 * model.max_margin_direction())
    radius = np.max(np.linalg.norm(SIGNED, axis=1))
    rate = 0.2 / (float(model.loss(start)) * radius**2)
    paths, _ = descended(model.loss, start[None], rate, 2**10)
    for w in paths[0]:
        gained = model.log_loss(start) - model.log_loss(jnp.asarray(w))
        moved, slack = np.linalg.norm(w - start), model.max_margin * 0.9
        at_least("with |w(k) − w(0)|", gained - slack * moved, 0.0)
        at_most("over the largest possible", gained / (radius * moved), 1.0)
        at_most("as printed", gained - slack * np.linalg.norm(w), -0.1)


def test_what_bounded_weights_leave_of_the_loss():
    """L ≥ Σ ln(1 + e^{−B|xᵢ|}) for |w| ≤ B. Σ e^{−B|xᵢ|}, as in (9.144), is no lower bound."""
    one = mf.models.SeparableClassification(np.array([[0.6, 0.8]]), np.ones(1), "logistic")
    for bound in (0.1, 1.0, 5.0):
        value = float(one.loss(bound * jnp.array([0.6, 0.8])))
        close("attained", value, np.log1p(np.exp(-bound)), 1e-12)
        at_most("L over the printed bound", value / np.exp(-bound), 1 - 0.25 * np.exp(-bound))
    model, lengths = models("logistic"), np.linalg.norm(SIGNED, axis=1)
    for seed in range(5):
        w = jr.normal(jr.key(seed), (3,))
        least = np.sum(np.log1p(np.exp(-jnp.linalg.norm(w) * lengths)))
        at_least(f"L over its bound, seed {seed}", float(model.loss(w)) / least, 1.0)


# --- The KKT conditions --------------------------------------------------------------------------


def test_the_largest_margin_is_the_only_kkt_point():
    """Residual 0 there, at any length and scale of the data; elsewhere the margin shows in it."""
    best = np.asarray(models("logistic").max_margin_direction())
    for length, scale in ((1.0, 1.0), (1e5, 1e-6)):
        signed, point = scale * SIGNED, length * best
        found = theory.margin_kkt(point, signed @ point, signed)
        assert isinstance(found, theory.MarginKKT)
        at_most("residual", found.residual, 1e-8)
        close("margin", found.margin, scale * models("logistic").max_margin, 1e-9)
        close("Σλ = 1/γ", np.sum(found.multipliers) * found.margin, 1.0, 1e-8)
        is_support = signed @ point < found.margin * length * (1 + 1e-6)
        assert np.all(is_support[found.multipliers > 1e-6 / scale])
    largest, shares = models("logistic").max_margin, []
    rng = np.random.default_rng(0)
    for _ in range(40):
        point = best + 0.3 * rng.normal(size=3)
        if np.min(SIGNED @ point) <= 0:
            continue
        found = theory.margin_kkt(point, SIGNED @ point, SIGNED)
        parts = np.hypot(found.stationarity, found.slackness)
        close("both parts", found.residual, parts, 1e-9)
        lack = 1 - found.margin / largest
        at_most("1 − margin/γ̄ over √5 residual", lack / (np.sqrt(5) * found.residual), 1.0)
        shares.append(found.residual)
    assert len(shares) > 5 and min(shares) > 0.01


# --- A homogeneous network -----------------------------------------------------------------------

NUM_EXAMPLES, WIDTH = 12, 8
CORNERS = np.random.default_rng(0).uniform(-1, 1, (NUM_EXAMPLES, 2))
XOR = np.sign(CORNERS[:, 0] * CORNERS[:, 1])  # no plane through the origin separates these
CORNERS = CORNERS + 0.25 * np.sign(CORNERS)
SIGNS = jnp.where(jnp.arange(WIDTH) % 2 == 0, 1.0, -1.0)


def margins_of(weights):
    """yᵢ Σⱼ ±relu(⟨wⱼ, xᵢ⟩)², homogeneous of degree 2 and once differentiable."""
    return XOR * (jax.nn.relu(jnp.asarray(CORNERS) @ weights.T) ** 2 @ SIGNS)


def log_loss(kind, weights):
    margins = margins_of(weights)
    if kind == "exponential":
        return logsumexp(-margins)
    return jnp.log(jnp.sum(jax.nn.softplus(-margins)))


def stepped(kind):
    """Of ln L, and −ln ln(1/L) further down: gradient descent on L with steps ∝ 1/(L ln(1/L))."""

    def height(weights):
        p = -log_loss(kind, weights)
        return -jnp.where(p < 1, p, 1 + jnp.log(jnp.maximum(p, 1)))

    return mf.FunctionLoss(height)


def kkt_of(weights):
    margins, gradients = margins_of(weights), jax.jacrev(margins_of)(weights)
    gradients = np.asarray(gradients).reshape(NUM_EXAMPLES, -1)
    return theory.margin_kkt(np.ravel(weights), np.asarray(margins), gradients, degree=2.0)


SEEDS = (0, 1, 3, 5)  # of the first six, those that come to separate the labels


@KINDS
def test_a_homogeneous_network_goes_to_a_kkt_point(kind):
    """The residual falls like 1/√k, that is 1/|θ|; the smooth margin −ln L/|θ|² rises."""
    starts = jnp.stack([0.5 * jr.normal(jr.key(seed), (WIDTH, 2)) for seed in SEEDS])
    paths, steps = descended(stepped(kind), starts, 0.1, 2**12)
    for seed, path in zip(SEEDS, paths):
        found = [kkt_of(jnp.asarray(w)) for w in path[-5:]]
        residuals = [k.residual for k in found]
        order = -slope(steps[-5:], residuals)
        in_window(f"order in k of the residual, {kind}, seed {seed}", order, 0.4, 0.6)
        at_most(f"residual in the end, {kind}, seed {seed}", residuals[-1], 0.04)
        at_most(f"slackness, {kind}, seed {seed}", found[-1].slackness, 5e-3)
        smooth = [-log_loss(kind, jnp.asarray(w)) / np.sum(w**2) for w in path[-5:]]
        at_least(f"rise of the smooth margin, {kind}, seed {seed}", np.min(np.diff(smooth)), 1e-6)
        at_most(f"it is below the margin, {kind}", smooth[-1] - found[-1].margin, 0.0)
    other = jnp.asarray(paths[0, -1]) * jnp.linspace(0.7, 1.3, WIDTH)[:, None]
    at_least("another point that separates", kkt_of(other).residual, 0.1)


def test_bad_input():
    point = np.ones(3)
    good = {"point": point, "margins": SIGNED @ point, "gradients": SIGNED}
    best = np.asarray(models("logistic").max_margin_direction())
    fits = {"point": best, "margins": SIGNED @ best}
    for words, wrong in {
        "train until every example is on its side": {"point": -best, "margins": -SIGNED @ best},
        "at a point of length 0": {**fits, "point": np.zeros(3)},
        "<grad f_i, theta> = k f_i": {**fits, "degree": 2.0},
        "point: got shape": {"point": np.ones(4)},
        "degree: got": {**fits, "degree": 0.0},
    }.items():
        with refused(ValueError, words):
            theory.margin_kkt(**(good | wrong))
