"""Simplicity bias: label noise makes all neurons of a two-layer network the same.

f(θ)ᵢ = Σⱼ φ(θⱼᵀxᵢ) with unit inputs, XXᵀ ⪰ μI, L = Σ(fᵢ − yᵢ)², F = Σᵢⱼ φ'(θⱼᵀxᵢ)² and the flow
θ' = −P∇F on Γ = {L = 0}, under φ' ≥ ϱ₁ > 0, φ''' ≥ ϱ₂ > 0 and β|φ''| ≤ φ'²φ''' [Gatmiry2024].
Where the printed formula is another one, the test says so and shows that it fails. That all
starts end at the one stationary point [Theorem 2] is in test_flattest_fit.py.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, norm, refused
from manifoldflow import theory

NU = 0.5  # φ(z) = z³ + νz, with ϱ₁ = ν, ϱ₂ = 6, β = (16/3)ν^(3/2)
BETA = 16 / 3 * NU**1.5
WIDTH = 4


class Cubic(eqx.Module):
    nu: jax.Array = eqx.field(converter=jnp.asarray)

    def __call__(self, z):
        return z**3 + self.nu * z


def slope(z):
    return 3 * z**2 + NU


def unit_inputs():
    inputs = np.random.default_rng(3).normal(size=(3, 5))
    return inputs / np.linalg.norm(inputs, axis=1, keepdims=True)


INPUTS = unit_inputs()
MU = theory.coherence(INPUTS)
NET = mf.models.TwoLayerNet(INPUTS, [1.2, -0.4, 0.7], WIDTH, Cubic(NU))
SCALAR = mf.models.TwoLayerNet([[1.0]], [1.0], 2, Cubic(0.0))


FLATTEST = NET.minimizer()


def with_features(net, features):
    """The weights in the span of the inputs that have these features."""
    return jnp.asarray(features) @ jnp.linalg.pinv(net.inputs).T


@eqx.filter_jit
def gradient(net, theta):
    return mf.riemannian_gradient(net.manifold, net.flatness, theta)


@eqx.filter_jit
def quadratic(net, theta, vector):
    """⟨v, ∇²F v⟩ of the covariant Hessian."""
    return jnp.vdot(vector, mf.covariant_hessian(net.manifold, net.flatness, theta).mv(vector))


class AtPoints(NamedTuple):
    """What the lemmas speak of, at many points of Γ."""

    gradient_norm: jax.Array
    rayleigh: jax.Array  # ∇Fᵀ∇²F∇F/‖∇F‖²
    smallest: jax.Array  # eigenvalue of the covariant Hessian
    error: jax.Array  # max |θⱼᵀxᵢ − φ⁻¹(yᵢ/m)|


@pytest.fixture(scope="module")
def points():
    """Random fits, from far away to close to the flattest."""
    flattest = with_features(NET, FLATTEST)
    sizes = jnp.geomspace(0.01, 2.0, 300)

    @jax.jit
    @jax.vmap
    def at(key, size):
        away = size * jr.normal(key, flattest.shape)
        theta = NET.manifold.project(flattest + away, throw=False)
        downhill = gradient(NET, theta)
        hessian = mf.covariant_hessian(NET.manifold, NET.flatness, theta)
        within = lambda v: NET.manifold.tangent_projection(theta, v)
        found = mf.linalg.smallest_eigenvalues(hessian, within=within, codimension=3)
        smallest = jnp.where(found.is_successful, found.values[0], jnp.nan)
        rayleigh = jnp.vdot(downhill, hessian.mv(downhill)) / jnp.vdot(downhill, downhill)
        error = jnp.max(jnp.abs(NET.features(theta) - FLATTEST))
        return AtPoints(jnp.linalg.norm(downhill), rayleigh, smallest, error)

    found = at(jr.split(jr.key(0), 300), sizes)
    assert bool(jnp.all(jnp.isfinite(jnp.stack(found))))
    return found


class Flow(NamedTuple):
    solution: mf.Solution
    times: np.ndarray
    flatness: np.ndarray
    gradient_norm: np.ndarray
    error: np.ndarray


OBSERVED = {
    "flatness": NET.flatness,
    "gradient_norm": lambda theta: jnp.linalg.norm(gradient(NET, theta)),
    "error": lambda theta: jnp.max(jnp.abs(NET.features(theta) - FLATTEST)),
}


def walk_from(start):
    """θ' = −P∇F, precisely, until t = 20."""
    descent = mf.RiemannianGradientFlow(NET.manifold, NET.flatness)
    tolerances = {"rtol": 1e-10, "atol": 1e-12}
    return mf.solve(descent, start, end_time=20.0, num_saves=800, observe=OBSERVED, **tolerances)


@pytest.fixture(scope="module")
def flow():
    """From a random fit, outside the span of the inputs."""
    solution = walk_from(0.9 * jr.normal(jr.key(2), (WIDTH, 5)))
    seen = {name: np.asarray(values) for name, values in solution.observables.items()}
    return Flow(solution, np.asarray(solution.times), **seen)


# --- Activations ------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [0.25, 1.0, 3.0])
def test_constants_of_the_cubic(nu):
    """β = (16/3)ν^(3/2) is sharp; printed in §3.2: ϱ₂ = 1 and β = min(1/9, ν²), not sharp."""
    found = theory.activation_constants(Cubic(nu))
    assert isinstance(found, theory.ActivationConstants)
    close("ϱ₁, ϱ₂, β", found[:3], (nu, 6.0, 16 / 3 * nu**1.5), 1e-12)
    close("the places", (found.slope_at, abs(found.normality_at)), (0, nu**0.5 / 3), 1e-6)
    z = np.random.default_rng(0).uniform(-10, 10, 100_000)
    room = (3 * z**2 + nu) ** 2 * 6 - found.normality * np.abs(6 * z)
    at_least("room in the inequality", room.min(), -1e-12)
    assert found.third_derivative > 1 and found.normality > min(1 / 9, nu**2)


def test_higher_odd_powers_break_the_first_assumption():
    """φ''' = 0 at 0 for z^{2k+1} + νz with k ≥ 2; §3.2 says that it is at least 1."""
    for k in (2, 3):
        found = theory.activation_constants(lambda z: z ** (2 * k + 1) + z)
        assert found.third_derivative == 0.0 == found.third_derivative_at, found
        assert found.slope == 1.0 and found.normality > 0, found
    moved = theory.activation_constants(lambda z: (z - 0.3) ** 5 + z)
    assert moved.third_derivative == 0.0, moved
    close("where", moved.third_derivative_at, 0.3, 1e-6)


def test_activations_that_break_an_assumption_say_where():
    cube = theory.activation_constants(Cubic(0.0))
    assert cube.slope == cube.normality == cube.slope_at == 0.0, cube
    close("near 0", 1 + cube.normality_at, 1.0, 1e-6)
    tanh = theory.activation_constants(jnp.tanh)
    assert tanh.third_derivative < 0 and tanh.normality == -np.inf, tanh
    line = theory.activation_constants(lambda z: 2 * z)
    assert line[:3] == (2.0, 0.0, np.inf), line
    exponential = theory.activation_constants(jnp.exp, -1.0, 2.0)
    close("e^z", exponential, [np.exp(-1), np.exp(-1), np.exp(-2), -1, -1, -1], 1e-12)
    with refused(ValueError, "expected a number < high = 1"):
        theory.activation_constants(jnp.exp, 1.0, 1.0)
    with refused(ValueError, "NaN or infinite at 0.", "another range"):
        theory.activation_constants(lambda z: jnp.sqrt(jnp.abs(z)))


# --- The trace of the Hessian -----------------------------------------------------------------


def test_the_trace_is_twice_what_is_printed():
    """tr ∇²L = 2F = 2Σ‖∇fᵢ‖² on Γ; Lemmas 2 and 3 lack the 2, Lemma 14 has φ² for φ'²."""
    theta = NET.manifold.project(jr.normal(jr.key(1), (WIDTH, 5)))
    dense = jax.jit(jax.hessian(lambda x: NET.loss(x.reshape(WIDTH, 5))))
    trace = jnp.trace(dense(theta.ravel()))
    squares = jnp.sum(NET.loss.jacobian(theta).as_matrix() ** 2)
    close("Lemma 2", trace, 2 * squares, 1e-10)
    close("Lemma 3", trace, 2 * jnp.sum(slope(NET.features(theta)) ** 2), 1e-10)
    assert abs(trace / squares - 1) > 0.9, "Lemma 2 as printed"
    assert abs(trace / jnp.sum(Cubic(NU)(NET.features(theta)) ** 2) - 1) > 0.1, "Lemma 14"
    noise = mf.LabelNoise(0.3)  # full batch: c = 2δ²
    drift = mf.LimitDiffusion(NET.manifold, noise).drift(theta)
    close("the limit of SGD", drift, -(0.3**2) * gradient(NET, theta), 1e-10)


def test_derivatives_of_f():
    """D²F has the blocks Σᵢ(2φ''² + 2φ'''φ')xᵢxᵢᵀ; (42) lacks the second 2, (43) has it."""
    theta = 0.4 * jr.normal(jr.key(1), (WIDTH, 5))
    found = jax.jit(jax.hessian(NET.flatness))(theta)
    z = NET.features(theta)

    def blocks(factor):
        weights = 2 * (6 * z) ** 2 + factor * 6 * slope(z)
        each = jnp.einsum("ji,ia,ib->jab", weights, INPUTS, INPUTS)
        return jnp.einsum("jab,jk->jakb", each, jnp.eye(WIDTH))

    close("with 2φ'''φ'", found, blocks(2), 1e-10)
    at_least("(42) is off by", norm(found - blocks(1)) / norm(found), 0.1)


def test_hessian_on_the_manifold():
    """Σᵢⱼ(2φ'φ''' + 2φ''² − α'ᵢφ'')⟨xᵢ, uⱼ⟩² with Σα'ᵢ∇fᵢ the normal part of ∇F [Lemma 5]."""
    theta = NET.manifold.project(0.6 * jr.normal(jr.key(3), (WIDTH, 5)))
    u = NET.manifold.random_tangent(theta, jr.key(4))
    jacobian = NET.loss.jacobian(theta).as_matrix()
    multipliers = jnp.linalg.lstsq(jacobian.T, jax.grad(NET.flatness)(theta).ravel())[0]
    z = NET.features(theta)
    weights = 2 * 6 * slope(z) + 2 * (6 * z) ** 2 - multipliers * 6 * z
    close("⟨u, ∇²F u⟩", quadratic(NET, theta, u), jnp.sum(weights * (u @ INPUTS.T) ** 2), 1e-9)


# --- Stationary points ------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, [1.0, 0.4, 2.5]])
def test_where_f_is_stationary(layer):
    """φ''(θⱼᵀxᵢ) wⱼ does not depend on j: φ'' of the features has rank one [Theorem 2].

    For other activations than z³ + νz that is not the rank of the features themselves.
    """
    activation = lambda z: jnp.sinh(z) + z**3
    net = mf.models.TwoLayerNet(INPUTS, [1.2, -0.4, 0.7], 3, activation, layer)
    features = net.minimizer()
    theta = with_features(net, features)
    at_most("loss", net.loss(theta), 1e-20)
    at_most("gradient", norm(gradient(net, theta)), 1e-9)
    bend = np.sinh(features) + 6 * features
    values = np.linalg.svd(bend, compute_uv=False)
    at_most("second singular value of φ''", values[1] / values[0], 1e-8)
    if layer is not None:
        values = np.linalg.svd(features, compute_uv=False)
        at_least("second singular value of the features", values[1] / values[0], 1e-3)
    other = net.manifold.project(theta.at[0].add(0.1 * net.inputs[0]))
    at_least("gradient beside it", norm(gradient(net, other)), 0.1)


def test_the_cube_has_other_stationary_points():
    """Lemma 18 says Theorem 2 holds for z³: no, the flow stalls where a feature vanishes."""
    descent = mf.RiemannianGradientFlow(SCALAR.manifold, SCALAR.flatness)
    start = jnp.array([[-0.5], [1.125 ** (1 / 3)]])
    precise = {"end_time": 100.0, "rtol": 1e-9, "atol": 1e-11}
    stalled = mf.solve(descent, start, **precise).final
    close("F where it stalls", SCALAR.flatness(stalled), 9.0, 1e-6)
    at_most("gradient", norm(gradient(SCALAR, stalled)), 1e-4)
    least = SCALAR.flatness(jnp.asarray(SCALAR.minimizer()))
    close("least F", least, 18 * 0.5 ** (4 / 3), 1e-9)
    at_least("what is left to fall", 9.0 - least, 1.8)

    bent = mf.models.TwoLayerNet([[1.0]], [1.0], 2, Cubic(0.05))
    descent = mf.RiemannianGradientFlow(bent.manifold, bent.flatness)
    end = mf.solve(descent, start, **precise).final
    close("with z/20 beside it", bent.features(end), bent.minimizer(), 1e-6)


# --- Close to stationary points ---------------------------------------------------------------


def test_convex_where_the_gradient_is_small(points):
    """‖∇F‖ ≤ √μβ: the covariant Hessian is PSD, ∇Fᵀ∇²F∇F ≥ ϱ₁ϱ₂μ‖∇F‖² [Lemmas 4, 10]."""
    close_by = points.gradient_norm <= np.sqrt(MU) * BETA
    at_least("points to look at", np.sum(close_by), 30)
    at_least("smallest eigenvalue", np.min(points.smallest[close_by]), -1e-9)
    at_least("∇Fᵀ∇²F∇F/‖∇F‖²", np.min(points.rayleigh[close_by]), NU * 6 * MU)
    at_most("somewhere it is not convex", np.min(points.smallest[~close_by]), -1.0)


def test_the_threshold_is_not_the_root_of_both():
    """Lemmas 4, 7 and 10 print √(μβ) in places. Here √μβ < ‖∇F‖ < √(μβ) and F is concave."""
    nu, mu = 0.05, 1.0
    beta = 16 / 3 * nu**1.5
    theta = jnp.array([[0.36], [0.08]])
    net = mf.models.TwoLayerNet([[1.0]], [jnp.sum(Cubic(nu)(theta))], 2, Cubic(nu))
    downhill = gradient(net, theta)
    assert np.sqrt(mu) * beta < norm(downhill) < np.sqrt(mu * beta)
    at_most("∇Fᵀ∇²F∇F", quadratic(net, theta, downhill), -0.5 * norm(downhill) ** 2)


def test_a_small_gradient_means_close_features(points):
    """|θⱼᵀxᵢ − φ⁻¹(yᵢ/m)| ≤ ‖∇F‖/(√μϱ₁ϱ₂), at all points of Γ [Lemma 6]."""
    bound = points.gradient_norm / (np.sqrt(MU) * NU * 6)
    at_most("error over its bound", np.max(points.error / bound), 1.0)
    at_least("it is not idle", np.max(points.error / bound), 0.1)


# --- The flow ---------------------------------------------------------------------------------


def test_the_flow_makes_all_neurons_the_same(flow):
    """To 1e-6, and the second singular value below 1e-6 of the first [Theorem 2, 3]."""
    at_least("μ", MU, 0.1)
    at_most("error", flow.error[-1], 1e-6)
    values = np.linalg.svd(NET.features(flow.solution.final), compute_uv=False)
    at_most("second singular value", values[1] / values[0], 1e-6)
    assert np.all(np.diff(flow.flatness) <= 1e-9), "F decreases, so the flow stays bounded"
    assert int(NET.manifold.rank(flow.solution.final)) == 3, "Γ is a manifold [Lemma 17]"


def test_weights_have_rank_one_from_starts_in_the_span_of_the_inputs(flow):
    """Elsewhere what is orthogonal to the inputs stays as it was."""
    values = np.linalg.svd(flow.solution.final, compute_uv=False)
    at_least("second singular value of the weights", values[1] / values[0], 0.1)
    outside = np.eye(5) - np.linalg.pinv(INPUTS) @ INPUTS
    moved = (flow.solution.final - flow.solution.point(0)) @ outside
    at_most("movement outside the span", norm(moved), 1e-9)
    start = flow.solution.point(0) @ (np.eye(5) - outside)
    final = walk_from(start).final
    values = np.linalg.svd(final, compute_uv=False)
    at_most("from the span", values[1] / values[0], 1e-6)


def test_the_squared_gradient_decays(flow):
    """‖∇F‖² falls like e^{−2ϱ₁ϱ₂μt} once it is below μβ²; Lemma 9 prints half that rate."""
    first = int(np.argmax(flow.gradient_norm <= np.sqrt(MU) * BETA))
    at_least("index where it begins", first, 1)
    later = slice(first, None)
    rate = 2 * NU * 6 * MU
    squares, times = flow.gradient_norm[later] ** 2, flow.times[later]
    bound = squares[0] * np.exp(-rate * (times - times[0]))
    at_most("‖∇F‖² over its bound", np.max(squares / np.maximum(bound, 1e-18)), 1 + 1e-9)
    assert np.all(squares[0] * np.exp(-rate / 2 * (times - times[0])) >= bound), "theirs follows"


def test_the_derivative_of_the_squared_gradient():
    """d/dt ‖∇F‖² = −2∇Fᵀ∇²F∇F; the proofs of Lemmas 7 and 9 print it without the 2."""
    theta = NET.manifold.project(0.6 * jr.normal(jr.key(3), (WIDTH, 5)))
    downhill = gradient(NET, theta)
    square = lambda theta: jnp.sum(gradient(NET, theta) ** 2)
    found = jax.jit(lambda v: jax.jvp(square, (theta,), (v,))[1])(-downhill)
    once = -quadratic(NET, theta, downhill)
    close("twice", found, 2 * once, 1e-8)
    at_least("as printed it is off by", abs(found / once - 1), 0.9)


@pytest.mark.parametrize("accuracy", [0.3, 1e-2, 1e-4])
def test_times_are_below_their_bounds(flow, accuracy):
    """Theorem 3 and (16), which also hold with half the logarithm."""
    found = theory.activation_constants(Cubic(NU))
    sharp = {"slope": found.slope, "third_derivative": found.third_derivative}
    sharp |= {"coherence": MU, "normality": found.normality, "halved": True}
    arrived = lambda values: flow.times[np.max(np.flatnonzero(values > accuracy)) + 1]
    features = theory.simplicity_time_bound(flow.flatness[0], accuracy, **sharp)
    at_least("it takes a while", arrived(flow.error), 0.01)
    at_most("features, half the logarithm", arrived(flow.error), features)
    gradient = theory.stationarity_time_bound(flow.flatness[0], accuracy, **sharp)
    at_most("gradient, half the logarithm", arrived(flow.gradient_norm), gradient)
    # And where F cannot fall below its least value.
    sharp["least_flatness"] = float(NET.flatness(with_features(NET, FLATTEST)))
    features = theory.simplicity_time_bound(flow.flatness[0], accuracy, **sharp)
    at_most("features, of what is above the least F", arrived(flow.error), features)
    gradient = theory.stationarity_time_bound(flow.flatness[0], accuracy, **sharp)
    at_most("gradient, of what is above the least F", arrived(flow.gradient_norm), gradient)


# --- Before the manifold ----------------------------------------------------------------------


def test_the_loss_dominates_nothing_but_its_gradient():
    """‖∇L‖² ≥ 4mμϱ₁²L everywhere, and nothing better holds [Lemma 12]."""
    constant = 4 * WIDTH * MU * NU**2
    ratio = jax.jit(jax.vmap(lambda x: jnp.sum(NET.loss.gradient(x) ** 2) / NET.loss(x)))
    sizes = jnp.geomspace(1e-2, 3.0, 500)[:, None, None]
    spread = sizes * jr.normal(jr.key(0), (500, WIDTH, 5))
    at_least("random points", jnp.min(ratio(spread)), constant)
    weakest = np.linalg.eigh(INPUTS @ INPUTS.T)[1][:, 0]
    net = mf.models.TwoLayerNet(INPUTS, weakest, WIDTH, Cubic(NU))
    zero = jnp.zeros((WIDTH, 5))
    close("sharp", jnp.sum(net.loss.gradient(zero) ** 2) / net.loss(zero), constant, 1e-9)


def test_gradient_flow_lands_at_the_rate_of_the_lemma():
    """L ≤ e^{−Ct}L(0), ‖θ(t) − Φ‖ ≤ (2/√C)e^{−Ct/2}√L(0), C = 4mμϱ₁² [Lemma 11, (32)]."""
    rate = 4 * WIDTH * MU * NU**2
    start = 0.5 * jr.normal(jr.key(5), (WIDTH, 5))
    path = mf.solve(
        mf.GradientFlow(NET.loss), start, end_time=3.0, num_saves=30, observe={"loss": NET.loss}
    )
    losses, decay = path.observables["loss"], np.exp(-rate * path.times)
    at_most("loss over its bound", np.max(losses / (decay * losses[0])), 1 + 1e-9)
    gaps = np.linalg.norm(path.points - mf.limit_map(NET.loss, start), axis=(1, 2))
    at_most("distance", np.max(gaps / (2 * np.sqrt(decay * losses[0] / rate))), 1.0)


def test_features_move_root_m_times_as_far_as_weights():
    """Σⱼ|Δθⱼᵀx| ≤ √m‖Δθ‖, with equality from θ = 0; the proof of Lemma 11 has no √m."""
    net = mf.models.TwoLayerNet(INPUTS[:1], [2.0], WIDTH, Cubic(NU))
    moved = mf.limit_map(net.loss, jnp.zeros((WIDTH, 5)))
    total = jnp.sum(jnp.abs(net.features(moved)))
    close("with √m", total, np.sqrt(WIDTH) * norm(moved), 1e-6)
    at_least("as printed it is exceeded by", total / norm(moved), 1.9)
