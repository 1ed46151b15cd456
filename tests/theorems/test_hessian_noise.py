"""Σ = c∇²L for any loss, and labels that are flipped with one probability: both give flows."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.integrate

import lawbook
import limit_laws
import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, norm, refused
from limit_laws import covariance_matrix, problem, SIZE
from manifoldflow import linalg, losses
from quick import long_jit

C = 0.7


def hessian(loss, point):
    return np.asarray(jax.jit(jax.hessian(loss))(point))


# --- Corollary 5.2 for any loss ---------------------------------------------------------------


def uneven(x, xp=jnp):
    """Minimal where two functions vanish, by no sum of squares, with weights that change with x."""
    f = xp.stack([x[0] + 0.3 * x[2] ** 2 + 0.2 * x[3], x[1] - 0.5 * xp.sin(x[2]) * x[3]])
    weights = xp.exp(0.4 * x[2]), 1.5 + xp.sin(x[3])
    return (
        weights[0] * (xp.cosh(f[0]) - 1)
        + weights[1] * (f[1] ** 2 + f[1] ** 3 / 5)
        + (0.3 * xp.cos(x[2]) * f[0] * f[1])
    )


def end_of_gradient_flow(start):
    """By SciPy, with the gradient by complex differences."""
    steps = 1e-30j * np.eye(4)
    slope = lambda t, x: -np.array([uneven(x + step, np).imag for step in steps]) / 1e-30
    options = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-14}
    return scipy.integrate.solve_ivp(slope, (0, 60), start, **options).y[:, -1]


def drift_by_the_ends_of_gradient_flow(point, matrix, multiple):
    """½∂²Φ[cH] = ½cΣλᵢ∂²Φ[vᵢ, vᵢ] by fourth-order differences of where gradient flow ends."""
    total, step = np.zeros(4), 0.02
    for value, vector in zip(*(x[..., -2:].T for x in np.linalg.eigh(matrix))):
        ends = [end_of_gradient_flow(point + k * step * vector) for k in range(-2, 3)]
        second = np.array([-1, 16, -30, 16, -1]) @ np.stack(ends) / (12 * step**2)
        total += multiple / 2 * value * second
    return total


def test_the_drift_on_a_loss_that_is_no_sum_of_squares():
    """−(c/4)P∇tr∇²L with weights that vary along Γ, against the ends of gradient flow."""
    loss = mf.FunctionLoss(uneven)
    manifold = mf.MinimizerManifold(loss, 2)
    point = jnp.array([-0.3 * 0.7**2 - 0.1, 0.25 * np.sin(0.7), 0.7, 0.5])
    flow = mf.LimitDiffusion(manifold, mf.HessianNoise(C))
    drift, matrix = flow.drift(point), hessian(loss, point)
    by_ends = drift_by_the_ends_of_gradient_flow(np.asarray(point), matrix, C)
    at_least("the size of the drift", norm(by_ends), 0.05)
    close("drift", drift, by_ends, 1e-5)
    at_most("diffusion", norm(jax.jit(lambda x: flow.diffusion(x).as_matrix())(point)), 1e-12)
    for wrong in (0.5, 2.0):
        at_least("another factor", norm(wrong * drift - by_ends) / norm(by_ends), 0.4)

    # The trace if the weights were those of this point: f moves, they do not.
    offsets = lambda y: jnp.stack([-0.3 * y[0] ** 2 - 0.2 * y[1], 0.5 * jnp.sin(y[0]) * y[1]])
    shift = offsets(point[2:])
    still = lambda y: jnp.concatenate([y[:2] - offsets(y[2:]) + shift, point[2:]])
    frozen = lambda x: jnp.trace(jax.hessian(lambda y: uneven(still(y)))(x))
    close("the same trace at the point", frozen(point), np.trace(matrix), 1e-12)
    wrong = -C / 4 * mf.riemannian_gradient(manifold, frozen, point)
    at_least("drift of frozen weights", norm(wrong - by_ends) / norm(by_ends), 0.1)


def test_it_is_an_ordinary_differential_equation_by_its_type():
    wells = mf.MinimizerManifold(mf.FunctionLoss(zoo.cosh_loss), 2)
    squares, decayed = problem("least squares"), mf.MinimizerManifold(zoo.logistic_loss(), 4)
    minimal = mf.MinimizerManifold(squares.loss, 2)
    for manifold in (wells, squares.manifold, decayed, minimal):
        for multiple in (1.0, 0.0):
            flow = mf.LimitDiffusion(manifold, mf.HessianNoise(multiple))
            equal(f"stochastic, {manifold}", flow.is_stochastic, False)
    through = mf.HessianNoise(C, gauss_newton=True)
    equal("at zero loss", mf.LimitDiffusion(squares.manifold, through).is_stochastic, False)
    equal("elsewhere", mf.LimitDiffusion(minimal, through).is_stochastic, True)
    # On least squares it is the drift of label noise of the same c, on either manifold.
    labels = mf.LabelNoise(1.0, batch_size=1)
    noise = mf.HessianNoise(labels.strength(squares.loss))
    drift = mf.LimitDiffusion(squares.manifold, labels).drift(squares.point)
    for manifold in (squares.manifold, minimal):
        close("drift", mf.LimitDiffusion(manifold, noise).drift(squares.point), drift, 1e-9)


def test_the_covariance_is_that_multiple_of_the_hessian():
    """On Γ all of it, off Γ the positive part, or as many eigenvalues as were asked for."""
    here = problem("function")
    matrix = hessian(here.loss, here.point)
    for rank in (None, 2, 0.01):
        close("Σ on Γ", covariance_matrix(mf.HessianNoise(C, rank=rank), here), C * matrix, 1e-12)
    off = limit_laws.Problem("function")
    off.point = here.point + 0.1 * jnp.asarray(np.random.default_rng(0).normal(size=SIZE))
    values, vectors = np.linalg.eigh(hessian(off.loss, off.point))
    at_most("an eigenvalue is negative", values[0], -1e-2)
    for rank, kept in ((None, values > 0), (2, values >= values[-2])):
        expected = (vectors * (C * values * kept)) @ vectors.T
        close("Σ off Γ", covariance_matrix(mf.HessianNoise(C, rank=rank), off), expected, 1e-12)


def test_samples_have_the_covariance():
    here = problem("least squares")
    root = mf.HessianNoise(C, gauss_newton=True)
    matrix = np.asarray(here.loss.gauss_newton(here.point).as_matrix())
    close("Σ by residuals", covariance_matrix(root, here), C * matrix, 1e-12)
    for noise in (mf.HessianNoise(C, rank=2), root):
        drawn = lawbook.sampled_gradients(noise, here.loss, here.point, 5, 4000)
        products = drawn[:, :, None] * drawn[:, None, :]  # the mean is ∇L = 0
        error = np.std(products, axis=0) / np.sqrt(len(drawn)) + 1e-12
        gaps = np.abs(np.mean(products, axis=0) - C * matrix) / error
        at_most("entries of Σ in standard errors, seed 5", gaps.max(), 4.5)


def test_the_root_of_a_matrix_has_derivatives():
    rng = np.random.default_rng(1)
    matrix, change = (m + m.T for m in rng.normal(size=(2, 5, 5)))
    values, vectors = np.linalg.eigh(matrix)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    close("root", linalg.square_root(matrix), root, 1e-13)
    step = 1e-5
    ends = [linalg.square_root(matrix + s * step * change) for s in (1, -1)]
    slope = jax.jvp(linalg.square_root, (jnp.asarray(matrix),), (jnp.asarray(change),))[1]
    close("its derivative", slope, (ends[0] - ends[1]) / (2 * step), 1e-8)
    pair = jnp.diag(jnp.array([2.0, 2.0, 0.0]))  # equal eigenvalues do no harm
    slope = jax.jvp(linalg.square_root, (pair,), (jnp.eye(3).at[2, 2].set(0),))[1]
    close("at equal ones", slope, pair / 2 / np.sqrt(8), 1e-14)


def test_what_does_not_go_together():
    with refused(ValueError, "HessianNoise", "gauss_newton", "rank=2", "Leave rank out"):
        mf.HessianNoise(1.0, rank=2, gauss_newton=True)
    with refused(ValueError, "gauss_newton=True", "FunctionLoss"):
        wells = mf.MinimizerManifold(mf.FunctionLoss(zoo.cosh_loss), 2)
        mf.LimitDiffusion(wells, mf.HessianNoise(gauss_newton=True))
    with refused(ValueError, "rank 7", "6 coordinates"):
        covariance_matrix(mf.HessianNoise(rank=7), problem("function"))
    with refused(ValueError, "multiple", "-1"):
        mf.HessianNoise(-1.0)


# --- SGD with that noise ----------------------------------------------------------------------


def ring(x):
    """Minimal on the unit circle, where tr ∇²L = 4 + 2cos φ by its weight alone."""
    return (1 + x[0] / 2) * (jnp.cosh(x @ x - 1) - 1)


def at_two_rates(observe, loss, noise, point, key, num_runs, rate, time):
    """Values at a time of runs at the rates η and η/2, by one program: the first run goes on."""
    num_steps = 4 * round(time / rate**2)

    def run(key, rate):
        saves = mf.simulate(
            loss, noise, optax.sgd, point,
            learning_rate=rate, num_steps=num_steps, num_saves=4, key=key, throw=False,
        ).points  # fmt: skip
        return jax.vmap(observe)(saves[jnp.array([1, 4])])

    rates, keys = jnp.array([rate, rate / 2]), jr.split(key, (num_runs, 2))
    values = np.asarray(long_jit(jax.vmap(jax.vmap(run), (0, None)))(keys, rates))
    return values[:, 0, 0], values[:, 1, 1]


def extrapolated(values):
    """The mean at η = 0 from runs at η and η/2, and its standard error."""
    means = [np.mean(v) for v in values]
    errors = [np.std(v) / np.sqrt(len(v)) for v in values]
    return 2 * means[1] - means[0], float(np.hypot(2 * errors[1], errors[0]))


def test_sgd_meets_the_flow_whose_weights_vary():
    """φ' = (c/2) sin φ: tan(φ/2) grows like e^(ct/2), and SGD's mean does as η → 0."""
    start, time = 1.0, 1.0
    point = jnp.array([np.cos(start), np.sin(start)])
    limit = 2 * np.arctan(np.tan(start / 2) * np.exp(C * time / 2))
    loss = mf.FunctionLoss(ring)
    flow = mf.LimitDiffusion(mf.MinimizerManifold(loss, 1), mf.HessianNoise(C))
    end = mf.solve(flow, point, end_time=time).final
    angle = lambda x: jnp.arctan2(x[1], x[0])
    close("the limit", angle(end), limit, 1e-6)
    noise = mf.HessianNoise(C, rank=1)
    runs = at_two_rates(angle, loss, noise, point, jr.key(6), 200, 0.04, time)
    mean, error = extrapolated(runs)
    at_most(f"angle {mean:.4f} ± {error:.4f} off {limit:.4f}, seed 6", abs(mean - limit), 4 * error)
    half = 2 * np.arctan(np.tan(start / 2) * np.exp(C * time / 4))
    at_least("and half of the speed is rejected", abs(mean - half), 8 * error)


# --- labels that are flipped with one probability ---------------------------------------------

MARGINS = {
    "logistic": lambda z: jnp.logaddexp(0, -z),
    "exponential": lambda z: jnp.exp(-z),
    "another": lambda z: jnp.exp(-z) + (1 - z) ** 2 / 10,
}
CHANCE = 0.3
# c·B of theory, for that chance.
MULTIPLES = {"logistic": 1.0, "exponential": 1 / (2 * np.sqrt(CHANCE * (1 - CHANCE)))}


def signs(kind, chance=CHANCE):
    """f = xuv on two examples: uv = z on Γ, with z the margin at the minimum."""
    x = jnp.array([1.0, -1.0])
    predict = lambda p, x: p[0] * p[1] * x
    return losses.flipped_labels_loss(x, x, MARGINS[kind], probability=chance, predict=predict)


def test_the_multiple_of_flipped_labels():
    """Σ, by all outcomes, is c∇²L on Γ for any loss of a margin, inside jit as well."""
    loss, noise, phi = signs("another"), mf.FlippedLabels(1), MARGINS["another"]
    manifold = mf.ZeroLossManifold(loss)
    z = float(manifold.loss.minimizers[0])
    slope, curvature = jax.grad(phi), jax.grad(jax.grad(phi))
    variance = CHANCE * (1 - CHANCE) * (slope(z) + slope(-z)) ** 2
    multiple = variance / ((1 - CHANCE) * curvature(z) + CHANCE * curvature(-z))
    close("c", noise.hessian_multiple(manifold.loss), multiple, 1e-9)
    halves = mf.FlippedLabels(2).hessian_multiple(manifold.loss)
    close("in batches of 2", halves, multiple / 2, 1e-9)

    @jax.jit
    def both(x):
        flow = mf.LimitDiffusion(manifold, noise)  # inside jit: a loss that is known is checked
        assert not flow.is_stochastic
        return noise.covariance(manifold.loss, x).as_matrix(), jax.hessian(loss)(x)

    covariance, matrix = both(jnp.array([1.5, z / 1.5]))
    close("Σ = c∇²L", covariance, multiple * matrix, 1e-9)


@pytest.mark.parametrize("kind", MULTIPLES)
def test_sgd_with_flipped_labels_meets_its_flow(kind):
    """q = u² − v², which gradient flow keeps, falls like e^(−cWt) with W = φ''."""
    loss, time = signs(kind), 1.0
    manifold = mf.ZeroLossManifold(loss)
    margin = float(manifold.loss.minimizers[0])
    close("z", margin, np.log(1 / CHANCE - 1) / (1 if kind == "logistic" else 2), 1e-6)
    multiple = mf.FlippedLabels(1).hessian_multiple(manifold.loss)
    close("c", multiple, MULTIPLES[kind], 1e-9)
    point = jnp.array([1.5, margin / 1.5])
    flow = mf.LimitDiffusion(manifold, mf.FlippedLabels(1))
    charge = lambda p: p[0] ** 2 - p[1] ** 2
    weight = {"logistic": CHANCE * (1 - CHANCE), "exponential": 2 * np.sqrt(CHANCE * (1 - CHANCE))}
    exact = charge(point) * np.exp(-MULTIPLES[kind] * weight[kind] * time)
    close("the flow", charge(mf.solve(flow, point, end_time=time).final), exact, 1e-6)

    runs = at_two_rates(charge, loss, flow.noise, point, jr.key(8), 150, 0.05, time)
    mean, error = extrapolated(runs)
    # What is left of the bias is of the order η²: the square of its relative size at η.
    bound = 4 * error + (np.mean(runs[0]) - exact) ** 2 / exact
    at_most(f"q {mean:.4f} ± {error:.4f} off {exact:.4f}, seed 8", abs(mean - exact), bound)
    other = charge(point) * np.exp(-MULTIPLES[kind] * 2 * weight[kind] * time)
    at_least("and twice the rate is rejected", abs(mean - other), 4 * bound)


def test_one_probability_by_type():
    loss = signs("exponential")
    manifold = mf.ZeroLossManifold(loss)
    general = mf.LimitDiffusion(manifold, mf.ResampledLabels(1, is_likelihood=False))
    equal("ResampledLabels may have others, so it is stochastic", general.is_stochastic, True)
    equal("no c where no minimum is known", mf.FlippedLabels().hessian_multiple(loss), None)
    two = mf.PerExampleLoss(
        jnp.ones(2), jnp.array([0.2, 0.6]), loss.loss_fn, predict=lambda p, x: p[0] * p[1] * x
    )
    with refused(ValueError, "FlippedLabels", "one probability", "ResampledLabels(batch_size"):
        mf.LimitDiffusion(mf.ZeroLossManifold(two), mf.FlippedLabels())
    with refused(ValueError, "two classes", "ResampledLabels"):
        mf.FlippedLabels().factor(zoo.softmax_loss(), zoo.mlp(jr.key(6), 3))
    with refused(ValueError, "below ½", "0.7"):
        signs("logistic", 0.7)
    with refused(ValueError, "labels must be -1 or 1"):
        losses.flipped_labels_loss(
            jnp.ones(2), jnp.ones(2) / 2, MARGINS["logistic"], probability=0.1
        )
