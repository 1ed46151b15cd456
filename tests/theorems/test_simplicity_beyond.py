"""Simplicity bias beyond the theorems: higher powers, second layers of both signs, all inputs.

Stationary points of F on Γ have w_jφ''(θⱼᵀxᵢ) = αᵢ for all j, and where φ'' increases they are one
[Gatmiry2024, Theorem 2 and after]; that needs less than the assumptions of Theorem 3.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.integrate
import scipy.optimize

import manifoldflow as mf
from checks import at_least, at_most, close, slope

WIDTH, NUM_STARTS = 4, 8


def unit_inputs():
    inputs = np.random.default_rng(3).normal(size=(3, 4))
    return inputs / np.linalg.norm(inputs, axis=1, keepdims=True)


INPUTS = unit_inputs()
STARTS = jr.normal(jr.key(0), (NUM_STARTS, WIDTH, 4))


def activation(coefficients, z):
    """Odd powers of z, and e^z, each with its coefficient."""
    linear, cubic, quintic, seventh, exponential = coefficients
    powers = linear * z + cubic * z**3 + quintic * z**5 + seventh * z**7
    return powers + exponential * jnp.exp(z)


def network(coefficients, targets, second_layer=(1.0, 1.0, 1.0, 1.0), inputs=INPUTS):
    """All are one structure, so one program serves them all."""
    phi = jax.tree_util.Partial(activation, jnp.array(coefficients))
    return mf.models.TwoLayerNet(inputs, targets, WIDTH, phi, second_layer)


@functools.cache
def program():
    def flow(net, start, end_time):
        descent = mf.RiemannianGradientFlow(net.manifold, net.flatness)
        fit = net.manifold.project(start, throw=False)
        walk = mf.solve(descent, fit, end_time=end_time, num_saves=5, rtol=1e-6, atol=1e-8)
        return walk.points

    return jax.jit(jax.vmap(flow, in_axes=(None, 0, None)))


def ends(net, starts=STARTS, end_time=12.0):
    """Where θ' = −P∇F is at the end, for each start."""
    points = program()(net, starts, jnp.asarray(end_time))[:, -1]
    assert bool(jnp.all(jnp.isfinite(points)))
    return points


def check_ends(net, bound):
    """All starts end at the one stationary point of Theorem 2."""
    points = ends(net)
    errors = jnp.abs(jax.vmap(net.features)(points) - net.minimizer())
    at_most("largest |θⱼᵀxᵢ − …| of all starts", jnp.max(errors), bound)
    at_least("it was further at the start", jnp.max(jnp.abs(STARTS @ INPUTS.T)), 1.0)


# --- Higher odd powers ------------------------------------------------------------------------


def test_higher_powers_make_all_features_equal():
    """z^{2k+1} + νz with k ≥ 2 has φ'''(0) = 0, against Assumption 1, and an increasing φ''."""
    for coefficients in ((1.0, 0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 1.0, 0.0)):
        net = network(coefficients, [2.4, -1.8, 3.0])
        assert mf.theory.activation_constants(net.activation).third_derivative == 0.0
        check_ends(net, 1e-3)
        features = np.asarray(net.minimizer())
        assert np.ptp(features, axis=0).max() == 0.0


def test_where_a_label_is_zero_they_take_for_ever():
    """φ''' = 0 at the end, so no rate: z² falls like 1/(80νs) where z³ + νz has e^{−…s}.

    From features (z, −z, z, −z) for the label 0 and orthonormal inputs z' = −2φ'(z)φ''(z).
    """
    net = network((1.0, 0.0, 1.0, 0.0, 0.0), [0.0, 0.0, 0.0], inputs=np.eye(4)[:3])
    start = jnp.zeros((WIDTH, 4)).at[:, 0].set(0.5 * jnp.array([1, -1, 1, -1]))
    times = np.linspace(0, 400.0, 6)
    found = np.abs(np.asarray(program()(net, start[None], jnp.asarray(400.0)))[0, :, 0, 0])
    needed = lambda z: scipy.integrate.quad(lambda x: 1 / (40 * x**3 * (5 * x**4 + 1)), z, 0.5)[0]
    close("the time it takes", [needed(z) for z in found[1:]], times[1:], 1e-5)
    at_most("order", abs(slope(times[1:], found[1:]) + 0.5), 0.02)
    close("its constant", found[-1], (80 * times[-1]) ** -0.5, 0.02)


# --- Second layers of both signs --------------------------------------------------------------


def by_constrained_search(net, seed):
    """The features of least F, one example after the other, by sequential quadratic programs."""
    c, w = net.activation.args[0], np.asarray(net.second_layer)
    phi = lambda z: np.asarray(activation(c, z))
    step = 1e-6
    first = lambda z: (phi(z + step) - phi(z - step)) / (2 * step)
    rng = np.random.default_rng(seed)
    rows = []
    for target in np.asarray(net.targets):
        found = scipy.optimize.minimize(
            lambda z: np.sum(w**2 * first(z) ** 2),
            rng.normal(size=WIDTH),
            constraints={"type": "eq", "fun": lambda z, y=target: w @ phi(z) - y},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert found.success, found.message
        rows.append(found.x)
    return np.array(rows).T


def test_second_layers_of_both_signs():
    """w_jφ''(zᵢⱼ) = αᵢ: groups by sign, ±φ⁻¹(yᵢ/m) where φ is odd and w = ±1.

    The flow from all starts, and a search that knows of no manifold, end where
    `two_layer_minimizer` says.
    """
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    odd = network((1.0, 1.0, 0.0, 0.0, 0.0), [1.2, -0.4, 0.7], signs)
    plain = network((1.0, 1.0, 0.0, 0.0, 0.0), [1.2, -0.4, 0.7])
    close("±φ⁻¹(y/m)", odd.minimizer(), signs[:, None] * plain.minimizer(), 1e-9)
    check_ends(odd, 1e-3)
    bent = network((1.0, 1.0, 0.0, 0.0, 0.3), [1.2, -0.4, 0.7], [1.0, -1.0, 0.5, -1.0])
    check_ends(bent, 1e-3)
    features = bent.minimizer()
    at_most("equal in the group −1", np.max(np.abs(features[1] - features[3])), 1e-9)
    at_least("no rank one", np.linalg.svd(features, compute_uv=False)[1], 0.05)
    second = jax.vmap(jax.vmap(jax.grad(jax.grad(bent.activation))))(jnp.asarray(features))
    levels = np.asarray(bent.second_layer)[:, None] * np.asarray(second)
    at_most("w_jφ'' differs by", np.max(np.ptp(levels, axis=0)), 1e-9)
    for net in (odd, bent):
        for seed in range(2):
            searched = by_constrained_search(net, seed)
            # Its gradients are differences, which leaves errors of some 10⁻⁴.
            at_most("by a search", np.max(np.abs(searched - net.minimizer())), 1e-3)


# --- All inputs -------------------------------------------------------------------------------


def test_the_function_becomes_one_of_a_direction():
    """f(x) = mφ(θᵀx) for every x, where θ in the span of the inputs has θᵀxᵢ = φ⁻¹(yᵢ/m).

    From starts in that span; its sub-level sets are half-spaces. From others f keeps what is
    orthogonal to the inputs.
    """
    net = network((1.0, 1.0, 0.0, 0.0, 0.0), [1.2, -0.4, 0.7])
    within = STARTS @ (np.linalg.pinv(INPUTS) @ INPUTS)
    direction = np.linalg.pinv(INPUTS) @ net.minimizer()[0]
    x = np.random.default_rng(1).normal(size=(500, 4))
    phi = lambda z: np.asarray(net.activation(jnp.asarray(z)))
    values = np.sum(phi(np.asarray(ends(net, within)) @ x.T), axis=1)
    wanted = WIDTH * phi(x @ direction)
    at_most("f − mφ(θᵀx), starts in the span", np.max(np.abs(values - wanted)), 0.02)
    level = 0.5
    border = float(scipy.optimize.brentq(lambda z: WIDTH * float(phi(z)) - level, -1.0, 1.0))
    is_below = (x @ direction) <= border
    far = np.abs(x @ direction - border) > 1e-2
    assert np.all((values <= level)[:, far] == is_below[far]), "{f ≤ c} is a half-space"
    others = np.sum(phi(np.asarray(ends(net)) @ x.T), axis=1)
    at_least("starts elsewhere", np.max(np.abs(others - wanted)), 0.1)
    at_least("not even monotone in θᵀx", np.mean((others <= level) != is_below), 0.02)
