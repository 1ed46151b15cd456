"""L + λ tr G, λ = ηc/4: where SGD with label noise settles at a finite learning rate.

[Ma2022, section 9.5; Blanc2020; Damian2021]. To first order in η the mean residuals of SGD are
those at its stationary point. It has to be the Gauss-Newton matrix: the Hessian has Σᵢ rᵢ∇²fᵢ
besides, whose trace lowers the residuals by λ tr ∇²fᵢ again, where that is not 0 as on xy = 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, refused
from manifoldflow import noise

NOISE = mf.LabelNoise(1.0)

# --- The loss itself ----------------------------------------------------------------------------

INPUTS, TARGETS = zoo.data()
NETWORK = mf.LeastSquares(INPUTS, TARGETS[:, 0], predict=lambda p, x: jnp.tanh(p["w"] @ x) @ p["v"])
POINT = {"w": jr.normal(jr.key(0), (2, 3)), "v": jr.normal(jr.key(1), (2,))}


def traces(loss, point):
    """tr G and tr ∇²L by dense matrices, as functions of one vector."""
    _, rebuild = jax.flatten_util.ravel_pytree(point)
    residual = lambda x: loss.residual(rebuild(x))
    return {
        "gauss-newton": lambda x: loss.scale * jnp.sum(jax.jacfwd(residual)(x) ** 2),
        "hessian": lambda x: jnp.trace(jax.hessian(lambda x: loss(rebuild(x)))(x)),
    }


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
def test_values_and_derivatives(kind):
    """Against dense traces; the strength is no constant of the program; float32 stays float32."""
    regularized = mf.RegularizedLoss(NETWORK, 0.3, kind=kind)
    x, rebuild = jax.flatten_util.ravel_pytree(POINT)
    expected = lambda x: NETWORK(rebuild(x)) + 0.3 * traces(NETWORK, POINT)[kind](x)
    value, gradient = jax.value_and_grad(expected)(x)
    close("L + λ tr", regularized(POINT), value, 1e-12)
    close("its gradient", regularized.gradient(POINT), gradient, 1e-11)
    close("tr", (regularized(POINT) - NETWORK(POINT)) / 0.3, regularized.trace(POINT), 1e-12)
    slope = jax.grad(lambda s: mf.RegularizedLoss(NETWORK, s, kind=kind)(POINT))(0.3)
    close("∂/∂λ", slope, regularized.trace(POINT), 1e-12)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), POINT)
    assert regularized(narrow).dtype == jnp.float32
    close("float32", regularized(narrow), value, 1e-5)


def test_which_trace_by_default():
    """The Gauss-Newton matrix where there is one; both traces have one slope along the manifold."""
    assert mf.RegularizedLoss(NETWORK, 1.0).kind == "gauss-newton"
    well = mf.FunctionLoss(zoo.cosh_loss)
    assert mf.RegularizedLoss(well, 1.0).kind == "hessian"
    close("no strength", mf.RegularizedLoss(NETWORK, 0.0)(POINT), NETWORK(POINT), 1e-15)
    curved = mf.LeastSquares(np.ones(1), np.full(1, 2.0), predict=lambda p, x: jnp.sum(p**3) * x)
    manifold = mf.ZeroLossManifold(curved)
    on = manifold.project(jnp.array([1.1, 0.6]))
    one, two = (
        mf.RegularizedLoss(curved, 1.0, kind=k).gradient(on) for k in ("gauss-newton", "hessian")
    )
    tangent = manifold.tangent_projection(on, one - two)
    at_most("difference of the slopes along Γ", jnp.linalg.norm(tangent), 1e-12)
    at_least("across Γ", jnp.linalg.norm(one - two), 1.0)


def test_frozen_leaves_stay():
    part = mf.LeastSquares(
        INPUTS, TARGETS[:, 0], predict=NETWORK.predict, trainable={"w": True, "v": False}
    )
    regularized = mf.RegularizedLoss(part, 0.1)
    gradient = regularized.gradient(POINT)
    assert gradient["v"] is None
    whole = mf.RegularizedLoss(NETWORK, 0.1, kind="hessian")
    assert eqx.is_array(whole.gradient(POINT)["v"])


def test_it_is_a_loss_like_any_other():
    """Gradient flow, gradient descent and a search on a manifold of outputs lower it."""
    regularized = mf.RegularizedLoss(CUBIC, 0.05)
    start = jnp.array([0.9, 0.4])
    flowed = mf.solve(mf.GradientFlow(regularized), start, end_time=60.0, rtol=1e-9).final
    close("flow", flowed, stationary(regularized), 1e-6)
    descended = mf.simulate(
        regularized, mf.IsotropicNoise(0.0), optax.sgd, start, learning_rate=0.1, num_steps=600,
        key=jr.key(0),
    ).final  # fmt: skip
    close("descent", descended, stationary(regularized), 1e-7)
    found = mf.minimize(mf.ZeroLossManifold(CUBIC), regularized, start).final
    close("least on the manifold", found, [Z, Z], 1e-7)


def test_bad_input():
    well = mf.FunctionLoss(zoo.cosh_loss)
    with refused(ValueError, "RegularizedLoss: strength", "ηc/4"):
        mf.RegularizedLoss(well, -1.0)
    with refused(ValueError, "kind must be one of"):
        mf.RegularizedLoss(well, 1.0, kind="fisher")
    with refused(ValueError, "has no Gauss-Newton matrix"):
        mf.RegularizedLoss(well, 1.0, kind="gauss-newton")


# --- A network of two cubic neurons -------------------------------------------------------------


def cubic(z):
    return z + z**3 / 3


Z = 0.7
CUBIC = mf.LeastSquares(
    np.ones(1), np.full(1, 2 * cubic(Z)), predict=lambda p, x: jnp.sum(cubic(p)) * x
)


@eqx.filter_jit
def newton(loss):
    step = lambda _, x: x - jnp.linalg.solve(jax.hessian(loss)(x), jax.grad(loss)(x))
    point = jax.lax.fori_loop(0, 20, step, jnp.array([Z, Z]))
    return point, jnp.linalg.norm(jax.grad(loss)(point))


def stationary(loss):
    """By Newton's method from the point of the manifold where both neurons agree."""
    point, slope = newton(loss)
    at_most("slope", slope, 1e-12)
    return point


class Mirrored(noise.AbstractStochasticGradient):
    """Label noise of the other sign: what is odd in the noise cancels in the mean of both runs."""

    def gradient(self, loss, point, key):
        there, noisy = loss.gradient(point), NOISE.gradient(loss, point, key)
        return jax.tree.map(lambda g, h: 2 * g - h, there, noisy)


def settled(loss, observe, starts, rates, num_steps, num_pairs):
    """Means over time of an observable of label-noise SGD at each rate, with standard errors.

    A quarter of each run is left out. Errors are those of independent pairs of mirrored runs.
    """

    def run(noise, start, rate, key):
        points = mf.simulate(
            loss, noise, optax.sgd, start, learning_rate=rate, num_steps=num_steps,
            num_saves=num_steps // 4, key=key, throw=False,
        ).points[num_steps // 16 :]  # fmt: skip
        return jnp.mean(jax.vmap(observe)(points), axis=0)

    pair = lambda *case: (run(NOISE, *case) + run(Mirrored(), *case)) / 2
    many = jax.jit(jax.vmap(pair, in_axes=(None, None, 0)))
    keys = jr.split(jr.key(0), num_pairs)
    values = [np.asarray(many(start, rate, keys)) for start, rate in zip(starts, rates)]
    return [(v.mean(0), v.std(0, ddof=1) / np.sqrt(num_pairs)) for v in values]


def extrapolated(found):
    """The limit of a ratio 1 + O(η) by Richardson from the rates η and η/2."""
    (coarse, coarse_error), (fine, fine_error) = found
    return 2 * fine - coarse, np.hypot(2 * fine_error, coarse_error)


def test_the_mean_output_of_a_network():
    """Its shift is that of L + λ tr G; not that with the Hessian, nor with another λ.

    Here the mean point is moved 3/2 times as far as the stationary point: only outputs agree.
    """
    rates = 0.06, 0.03
    shift = lambda point: jnp.sum(cubic(point)) - 2 * cubic(Z)
    expected, wrong = (
        [float(shift(stationary(mf.RegularizedLoss(CUBIC, r / 4, kind=k)))) for r in rates]
        for k in ("gauss-newton", "hessian")
    )
    both = lambda point: jnp.array([shift(point), jnp.mean(point) - Z])
    starts = [jnp.array([Z, Z])] * 2
    found = settled(CUBIC, both, starts, rates, 2400, 60)
    moved = [float(stationary(mf.RegularizedLoss(CUBIC, r / 4))[0]) - Z for r in rates]
    ratio, error = extrapolated([(m[0] / e, s[0] / -e) for (m, s), e in zip(found, expected)])
    print("RATIO", ratio, error)
    at_most(f"shift over the expected, {ratio:.3f} ± {error:.3f}", abs(ratio - 1), 4 * error)
    at_least("that of the Hessian", abs(ratio - wrong[1] / expected[1]), 6 * error)
    for factor in (0.5, 2.0):
        at_least(f"{factor}λ is rejected", abs(ratio - factor), 6 * error)
    point, error = extrapolated([(m[1] / e, s[1] / -e) for (m, s), e in zip(found, moved)])
    print("POINT", point, error)
    at_most(f"mean point over the stationary one, {point:.3f}", abs(point - 1.5), 4 * error)


# --- ⟨β ⊙ β, x⟩: the Lasso ------------------------------------------------------------------------


def sparse():
    """Six examples with eight features, of which two count; the Lasso keeps just these."""
    inputs, truth = np.random.default_rng(5).normal(size=(6, 8)), np.r_[1.0, 0.7, np.zeros(6)]
    return mf.models.QuadraticallyParametrized(inputs, inputs @ truth), truth


def lasso(model, strength):
    """argmin ½|Xw − y|² + 4λΣsⱼwⱼ over w ≥ 0 with sⱼ = Σᵢx²ᵢⱼ, by coordinate descent."""
    from sklearn.linear_model import Lasso

    inputs, sums = np.asarray(model.inputs), np.sum(np.asarray(model.inputs) ** 2, axis=0)
    fit = Lasso(
        alpha=4 * strength / len(inputs), fit_intercept=False, positive=True, tol=1e-14,
        max_iter=100_000,
    ).fit(inputs / sums, np.asarray(model.targets))  # fmt: skip
    return fit.coef_ / sums


def test_the_mean_weights_on_squares_are_the_lasso():
    """E β⊙β is the Lasso with the weights ηcΣᵢx²ᵢⱼ, where L + λ tr G is stationary as well."""
    model, truth = sparse()
    rates, c = (0.1, 0.05), float(model.loss.scale)
    lassos = [lasso(model, rate * c / 4) for rate in rates]
    assert all(np.count_nonzero(w > 1e-9) == 2 for w in lassos)
    for rate, weights in zip(rates, lassos):
        point = jnp.sqrt(jnp.asarray(weights))
        slopes = [
            jnp.linalg.norm(mf.RegularizedLoss(model.loss, strength, kind=k).gradient(point))
            for strength, k in (
                (rate * c / 4, "gauss-newton"),
                (rate * c / 4, "hessian"),
                (rate * c / 8, "gauss-newton"),
                (rate * c / 2, "gauss-newton"),
            )  # fmt: skip
        ]
        at_most("∇(L + λ tr G) at the Lasso", slopes[0], 1e-9)
        at_least("other regularisers over λ", min(slopes[1:]) / (rate * c / 4), 0.2)
    starts = [jnp.sqrt(jnp.asarray(w) + 1e-6) for w in lassos]
    found = settled(model.loss, model.weights, starts, rates, 4000, 60)
    shares = []
    for (mean, error), weights in zip(found, lassos):
        moved = weights - truth
        share = (mean - truth) @ moved / (moved @ moved)
        shares.append((share, np.sum(error * np.abs(moved)) / (moved @ moved)))
        at_most("weights off the support", np.max(mean[2:]), 1e-3)
    ratio, error = extrapolated(shares)
    print("RATIO", ratio, error)
    at_most(f"shift over the Lasso's, {ratio:.3f} ± {error:.3f}", abs(ratio - 1), 4 * error)
    for factor in (0.0, 0.5, 2.0):
        at_least(f"{factor}λ is rejected", abs(ratio - factor), 4 * error)
