"""Adam, AdamW, local SGD and weight decay on f = x y go where the limits of small steps say.

[LiWenLyu2025; GuLyuHuangArora2023], and what lags, decays and is corrected around them. Runs at
two learning rates, η and η/2, are extrapolated to η → 0: what is left of the bias is O(η²).
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import theory
from quick import long_jit

START, TIME, STD = 0.8, 0.576, 0.7
SEEDS = 3000
key_of = functools.partial(jr.key, impl="unsafe_rbg")  # draws in a third of the time


def signs(key, count):
    """±1 with equal chances."""
    return 2.0 * (jr.bits(key, (count,), jnp.uint8) % 2) - 1


def steps_in(time, rate):
    return round(time / rate**2)


@functools.partial(long_jit, static_argnames="draw")
def trained(make, start, decay, num_steps, key, draw):
    """Batches of points (N, 2) after steps on (xy − 1 − ε)²/2 + decay·|θ|²/2, N seeds."""
    optimiser = make()

    def step(k, carry):
        points, state = carry
        noise = STD * draw(jr.fold_in(key, k), len(points))
        errors = points[:, 0] * points[:, 1] - 1 - noise
        gradients = errors[:, None] * points[:, ::-1] + decay * points
        updates, state = optimiser.update(gradients, state, points)
        return points + updates, state

    return jax.lax.fori_loop(0, num_steps, step, (start, optimiser.init(start)))[0]


def starts(num_seeds):
    return jnp.tile(jnp.exp(START * jnp.array([1.0, -1.0])), (num_seeds, 1))


def extrapolated(run, rate):
    """2 E[…](η/2) − E[…](η) of what `run(η)` gives for each seed, and its standard error."""
    coarse, fine = np.asarray(run(rate)), np.asarray(run(rate / 2))
    errors = [np.std(v) / np.sqrt(len(v)) for v in (coarse, fine)]
    return 2 * fine.mean() - coarse.mean(), np.hypot(errors[0], 2 * errors[1])


def meets(name, run, rate, expected, others=(), bias=4.0):
    """Within four standard errors and a bias of `bias`·η², unlike other curves."""
    value, error = extrapolated(run, rate)
    bound = 4 * error + bias * rate**2
    what = f"{name}: {value:.5f} ± {error:.5f}, expected {expected:.5f}"
    at_most(what, abs(value - expected), bound)
    for label, other in dict(others).items():
        at_least(f"{name}: {label} is rejected", abs(value - other) / bound, 1.5)


def difference(s):
    """(x − y)/2 = sinh s, which Adam's steps to the valley leave as it is."""
    return float(np.sinh(s))


def adam_run(seed, *, draw=signs, num_seeds=SEEDS, **options):
    def run(rate):
        make, decay = adam(rate, **options)
        num_steps = steps_in(TIME, rate)
        points = trained(make, starts(num_seeds), decay, num_steps, key_of(seed), draw)
        return (points[:, 0] - points[:, 1]) / 2

    return run


def adam(rate, lag=0.0, slow=0.0, b1=0.0, decoupled=0.0, inside=0.0):
    """Optax's Adam with 1 − β₂ = lag·η + slow·η², and decays λ = (…)·η of either kind."""
    b2 = 1 - lag * rate - slow * rate**2
    options = {"b1": b1, "b2": b2, "eps": 0.0, "weight_decay": decoupled * rate}
    return jax.tree_util.Partial(optax.adamw, rate, **options), inside * rate


curve = functools.partial(theory.scalar_factorization_adam, START, TIME, label_std=STD)


# --- Adam ----------------------------------------------------------------------------------

RATE = 0.024


def normal(key, count):
    return jr.normal(key, (count,), jnp.float32)


@pytest.mark.parametrize("lag, b1, draw", [(1.7, 0.0, signs), (6.0, 0.8, normal)])
def test_adam_whose_second_moments_lag(lag, b1, draw):
    run = adam_run(1, lag=lag, b1=b1, draw=draw)
    wrong = {
        name: difference(curve(averaging_rate=b)) for name, b in (("no lag", 0), ("2b", 2 * lag))
    }
    meets(f"b = {lag}", run, RATE, difference(curve(averaging_rate=lag)), wrong)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_with_weight_decay(decoupled):
    """AdamW, and the decay inside the loss, which the second moments divide."""
    options = {"averaging_rate": 1.7, "weight_decay": 0.4}
    run = adam_run(2, lag=1.7, **{"decoupled" if decoupled else "inside": 0.4})
    expected, other = (
        difference(curve(**options, decoupled=d)) for d in (decoupled, not decoupled)
    )
    wrong = {"the other decay": other, "none": difference(curve(averaging_rate=1.7))}
    meets(f"decoupled: {decoupled}", run, RATE, expected, wrong)


def test_closed_forms_of_adam():
    """sinh s tanh(s/2)^{bδ/2} falls as e^{−t/2}; with b = 0 it does not depend on the noise."""
    times = np.array([0.0, 0.3, 2.0, 5.0])
    for b, std in ((0.0, STD), (2.5, 0.4)):
        s = theory.scalar_factorization_adam(-1.2, times, averaging_rate=b, label_std=std)
        kept = np.sinh(s) * np.abs(np.tanh(s / 2)) ** (b * std / 2)
        close(f"b = {b}", kept, kept[0] * np.exp(-times / 2), 1e-8)
    found = theory.scalar_factorization_adam(1.0, 0.5, weight_decay=0.3, label_std=2.0)
    close("AdamW at b = 0", np.sinh(found), np.sinh(1.0) * np.exp(-0.8 * 0.5), 1e-8)


# --- second moments on the clock of the walk -----------------------------------------------

SLOW = 1.5
slow_curve = functools.partial(
    theory.scalar_factorization_slow_adam, START, TIME, averaging_rate=SLOW, label_std=STD
)


@long_jit
def uncorrected(points, moments, rate, num_steps, key):
    """Adam by hand, without a first moment and without bias correction."""

    def step(k, carry):
        points, moments = carry
        noise = STD * signs(jr.fold_in(key, k), len(points))
        errors = points[:, 0] * points[:, 1] - 1 - noise
        gradients = errors[:, None] * points[:, ::-1]
        moments = moments + SLOW * rate**2 * (gradients**2 - moments)
        return points - rate * gradients / jnp.sqrt(moments), moments

    carry = points, jnp.tile(moments, (len(points), 1))
    return jax.lax.fori_loop(0, num_steps, step, carry)[0]


def test_slow_second_moments():
    begin = np.array([0.2, 0.6])

    def run(rate):
        ends = uncorrected(starts(SEEDS), begin, rate, steps_in(TIME, rate), key_of(3))
        return (ends[:, 0] - ends[:, 1]) / 2

    wrong = {"corrected": difference(slow_curve()), "fast": difference(curve())}
    meets("v from (0.2, 0.6)", run, RATE, difference(slow_curve(second_moments=begin)), wrong)


def test_bias_corrected_second_moments():
    """At the start they average few steps, and lag by as many: a bias of order η ln(1/η).

    Extrapolated twice, from η, η/2 and η/4, it goes: that of 2E(η/2) − E(η) is linear in η.
    """
    run = adam_run(4, slow=SLOW, num_seeds=2000)
    ends = [np.asarray(run(RATE / 2**k)) for k in range(3)]
    weights, expected = np.array([1, -4, 4]), difference(slow_curve())
    value = weights @ [np.mean(end) for end in ends]
    error = np.sqrt(weights**2 @ [np.var(end) / len(end) for end in ends])
    bound = 4 * error + 4 * RATE**2
    what = f"1 − β₂ = cη²: {value:.5f} ± {error:.5f}, expected {expected:.5f}"
    at_most(what, abs(value - expected), bound)
    begin = STD**2 * np.exp(2 * START * np.array([-1.0, 1.0]))
    other = difference(slow_curve(second_moments=begin))
    at_least("without the correction, from v = E g²", abs(value - other) / bound, 1.2)


# --- the general formula --------------------------------------------------------------------


def with_moments(averaging, *, decay, is_inside):
    """Adam as one iteration of (x, y, v), its second moments relaxing at the rate b per kη."""

    def field(p):
        x, v = p[:2], p[2:]
        r = x[0] * x[1] - 1
        moments = x[::-1] ** 2 * (r**2 + STD**2)
        return jnp.concatenate([r * x[::-1] / jnp.sqrt(v), averaging * (v - moments)])

    def covariance(p):
        x, v = p[:2], p[2:]
        lag = 2 * averaging * (x[0] * x[1] - 1) * x[::-1] ** 2
        column = STD * jnp.concatenate([x[::-1] / jnp.sqrt(v), lag])
        return jnp.outer(column, column)

    def slow(p):
        pulled = p[:2] / jnp.sqrt(p[2:]) if is_inside else p[:2]
        return jnp.concatenate([-decay * pulled, jnp.zeros(2)])

    return mf.IterationLimit(field, covariance, slow, rank=3)


def slope_at_start(curve, start):
    """s'(0) of an oracle, to fourth order in the step."""
    step = 2e-4
    values = np.array([float(curve(start, step * k)) for k in range(5)])
    return np.array([-25 / 12, 4, -3, 4 / 3, -1 / 4]) @ values / step


@pytest.mark.parametrize("start", [0.8, -1.3])
@pytest.mark.parametrize(
    "lag, decay, is_inside", [(1.7, 0, False), (6, 0.5, False), (0.3, 0.5, True)]
)
def test_adam_by_the_general_formula(start, lag, decay, is_inside):
    """The second moments are coordinates of the iteration; nothing else is put in."""
    x = jnp.exp(start * jnp.array([1.0, -1.0]))
    point = jnp.concatenate([x, STD**2 * x[::-1] ** 2])
    drift = with_moments(lag, decay=decay, is_inside=is_inside).drift(point)
    oracle = lambda s, t: theory.scalar_factorization_adam(
        s, t, averaging_rate=lag, label_std=STD, weight_decay=decay, decoupled=not is_inside
    )
    close("s'", drift[0] / x[0], slope_at_start(oracle, start), 1e-8)
    close("x'y + xy'", drift[0] / x[0] + drift[1] / x[1], 0.0, 1e-9, scale=1)


@pytest.mark.parametrize("moments", [(0.2, 0.6), (1.0, 0.1)])
def test_slow_moments_by_the_general_formula(moments):
    """They are slow coordinates: ∂F vanishes along them, G moves them."""

    def field(p):
        return jnp.concatenate([(p[0] * p[1] - 1) * p[1::-1] / jnp.sqrt(p[2:]), jnp.zeros(2)])

    def covariance(p):
        column = STD * jnp.concatenate([p[1::-1] / jnp.sqrt(p[2:]), jnp.zeros(2)])
        return jnp.outer(column, column)

    def slow(p):
        return jnp.concatenate([jnp.zeros(2), SLOW * (STD**2 * p[1::-1] ** 2 - p[2:])])

    x = jnp.exp(START * jnp.array([1.0, -1.0]))
    flow = mf.IterationLimit(field, covariance, slow, rank=1)
    drift = flow.drift(jnp.concatenate([x, jnp.array(moments)]))
    oracle = lambda s, t: theory.scalar_factorization_slow_adam(
        s, t, averaging_rate=SLOW, label_std=STD, second_moments=np.array(moments)
    )
    close("s'", drift[0] / x[0], slope_at_start(oracle, START), 1e-8)


# --- SGD and local SGD ---------------------------------------------------------------------


def sgd_curve(**options):
    return theory.scalar_factorization_sgd(START, TIME, label_std=STD, **options)


def charge(s):
    """x² − y² = 2 sinh 2s, which gradient flow keeps."""
    return float(2 * np.sinh(2 * s))


def test_sgd_with_weight_decay():
    def run(rate):
        make = jax.tree_util.Partial(optax.sgd, rate)
        options = steps_in(TIME, rate), key_of(5), signs
        points = trained(make, starts(SEEDS), 0.3 * rate, *options)
        return points[:, 0] ** 2 - points[:, 1] ** 2

    wrong = {"no decay": charge(sgd_curve())}
    meets("SGD", run, RATE, charge(sgd_curve(weight_decay=0.3)), wrong)


@functools.partial(long_jit, static_argnames="num_workers")
def locally(points, rate, num_workers, num_local, num_rounds, key):
    def step(k, workers):
        noise = STD * signs(jr.fold_in(key, k), workers[..., 0].size).reshape(workers.shape[:-1])
        errors = workers[..., 0] * workers[..., 1] - 1 - noise
        return workers - rate * errors[..., None] * workers[..., ::-1]

    def round_of(number, points):
        workers = jnp.repeat(points[:, None], num_workers, axis=1)
        first = number * num_local
        return jnp.mean(jax.lax.fori_loop(first, first + num_local, step, workers), axis=1)

    return jax.lax.fori_loop(0, num_rounds, round_of, points)


@pytest.mark.parametrize("num_workers, gradient_time", [(3, 0.24)])
def test_local_sgd(num_workers, gradient_time):
    options = {"num_workers": num_workers, "label_std": STD}

    def run(rate):
        num_local = round(gradient_time / rate)
        num_rounds = steps_in(TIME, rate) // num_local
        ends = locally(starts(SEEDS), rate, num_workers, num_local, num_rounds, key_of(6))
        return ends[:, 0] ** 2 - ends[:, 1] ** 2

    of = lambda a: charge(
        theory.scalar_factorization_local_sgd(START, TIME, gradient_time=a, **options)
    )
    wrong = {"averaged in every step": of(0.0), "one worker": charge(sgd_curve())}
    meets(f"K = {num_workers}", run, RATE, of(gradient_time), wrong)


def test_local_sgd_between_its_ends():
    times, std = np.array([0.5, 2.0]), 1.3
    options = {"num_workers": 5, "label_std": std}
    often, rarely = (
        theory.scalar_factorization_local_sgd(1.1, times, gradient_time=a, **options)
        for a in (0.0, 1e6)
    )
    sgd = theory.scalar_factorization_sgd
    close("α = 0", often, sgd(1.1, times, label_std=std / np.sqrt(5)), 1e-8)
    close("α → ∞", rarely, sgd(1.1, times, label_std=std), 1e-5)


# --- a scale-invariant loss -----------------------------------------------------------------

SCALE, TARGET, DECAY = 1.6, 0.5, 0.8


def test_scale_invariant_loss_with_decay():
    """f = κ x/|θ| on θ in the plane: tr H at norm 1 is κ² − y², the same on all of the ray."""
    value = lambda p: SCALE * p[0] / jnp.linalg.norm(p)
    trace = SCALE**2 - TARGET**2
    begin = 1.3 * jnp.array([TARGET / SCALE, np.sqrt(1 - (TARGET / SCALE) ** 2)])
    close("tr H", jnp.sum(jax.grad(value)(begin / 1.3) ** 2), trace, 1e-12)

    @long_jit
    def sgd(points, rate, num_steps, key):
        def step(k, points):
            values, slopes = jax.vmap(jax.value_and_grad(value))(points)
            errors = values - TARGET - STD * signs(jr.fold_in(key, k), len(points))
            return points - rate * (errors[:, None] * slopes + DECAY * rate * points)

        return jax.lax.fori_loop(0, num_steps, step, points)

    def run(rate):
        ends = sgd(jnp.tile(begin, (SEEDS, 1)), rate, steps_in(TIME, rate), key_of(7))
        return jnp.linalg.norm(ends, axis=1)

    options = {"trace": trace, "noise_constant": STD**2}
    of = lambda w: float(theory.scale_invariant_norm(1.3, TIME, weight_decay=w, **options))
    rest = (STD**2 * trace / (2 * DECAY)) ** 0.25
    wrong = {"no decay": of(0.0), "the equilibrium": rest}
    meets("|θ|", run, RATE, of(DECAY), wrong)
    late = theory.scale_invariant_norm(1.3, 50.0, weight_decay=DECAY, **options)
    close("the equilibrium", late, rest, 1e-12)
    follows = solve_ivp(
        lambda t, q: STD**2 * trace / q - 2 * DECAY * q, (0, TIME), [1.69], rtol=1e-10, atol=1e-12
    )
    close("(|θ|²)' = ch/|θ|² − 2w|θ|²", of(DECAY) ** 2, follows.y[0, -1], 1e-8)


# --- arguments ------------------------------------------------------------------------------


def test_times_of_any_shape():
    times = np.array([[0.5, 0.0], [2.0, 0.5]])
    found = theory.scalar_factorization_adam(0.7, times)
    close("shape (2, 2)", np.sinh(found), np.sinh(0.7) * np.exp(-times / 2), 1e-9)
    assert theory.scalar_factorization_adam(0.7, np.zeros(0)).shape == (0,)
    assert theory.scalar_factorization_adam(0.7, 0.0) == 0.7


def test_what_is_refused():
    with refused(ValueError, "time", "below 0"):
        theory.scalar_factorization_sgd(1.0, -1.0)
    with refused(ValueError, "label_std"):
        theory.scalar_factorization_adam(1.0, 1.0, label_std=0.0)
    with refused(ValueError, "second_moments", "two positive"):
        theory.scalar_factorization_slow_adam(
            1.0, 1.0, averaging_rate=1.0, second_moments=np.array([1.0, 0.0])
        )
    with refused(ValueError, "num_workers"):
        theory.scalar_factorization_local_sgd(1.0, 1.0, num_workers=0, gradient_time=0.1)
    with refused(ValueError, "start"):
        theory.scale_invariant_norm(0.0, 1.0, trace=1.0)
