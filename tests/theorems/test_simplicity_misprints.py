"""Simplicity bias: what the paper prints, where it is another formula that holds [Gatmiry2024].

Beside those in test_simplicity_bias.py and test_geodesic_convexity.py.
"""

import jax.numpy as jnp
import numpy as np

import manifoldflow as mf
from checks import at_least, at_most, close, norm
from manifoldflow import theory


def flow_down(net_slope, phi, inputs, targets, theta, end, num_steps):
    """θ' = −∇L by the classical Runge-Kutta method: all points and losses."""

    def down(theta):
        z = theta @ inputs.T
        residual = np.sum(phi(z), axis=0) - targets
        return -2 * (residual * net_slope(z)) @ inputs

    points, step = [theta], end / num_steps
    for _ in range(num_steps):
        a = down(theta)
        b = down(theta + step / 2 * a)
        c = down(theta + step / 2 * b)
        theta = theta + step / 6 * (a + 2 * b + 2 * c + down(theta + step * c))
        points.append(theta)
    points = np.array(points)
    losses = np.sum((np.sum(phi(points @ inputs.T), axis=1) - targets) ** 2, axis=1)
    return points, losses


def test_the_normality_is_one_of_absolute_values():
    """Assumption 3 prints βφ'' ≤ φ'²φ''' for β|φ''|: the same for odd φ alone.

    φ = −e^{−z} has φ', φ''' > 0 > φ'': as printed all β are fine, and then Lemma 4 would have F
    convex at every fit. With p = e^{−z} it is Σp² on Σp = −y, and not convex where one p is small.
    """
    activation = lambda z: -jnp.exp(-z)
    z = np.array([[0.0], [1.5]])
    found = theory.activation_constants(activation, 0.0, 1.5)
    close("ϱ₁, ϱ₂, β", found[:3], np.exp([-1.5, -1.5, -3.0]), 1e-9)
    grid = np.linspace(0.0, 1.5, 100)
    assert np.all(1e9 * -np.exp(-grid) <= np.exp(-3 * grid)), "printed: any β"
    net = mf.models.TwoLayerNet([[1.0]], [-np.sum(np.exp(-z))], 2, activation)
    theta = jnp.asarray(z)
    hessian = mf.covariant_hessian(net.manifold, net.flatness, theta)
    tangent = net.manifold.tangent_projection(theta, jnp.array([[1.0], [-1.0]]))
    tangent = tangent / jnp.linalg.norm(tangent)
    p = np.exp(-z)
    turned = np.array([p[1], -p[0]]) / np.hypot(*p)
    weights = 4 * p**2 - 2 * p * np.sum(p**3) / np.sum(p**2)
    bend = float(jnp.vdot(tangent, hessian.mv(tangent)))
    close("⟨u, ∇²F u⟩ by hand", bend, np.sum(weights * turned**2), 1e-9)
    at_most("it is not convex", bend, -0.1)
    gradient = norm(mf.riemannian_gradient(net.manifold, net.flatness, theta))
    at_least("so ‖∇F‖ must be above √μβ", gradient, found.normality)


def test_a_path_is_bounded_by_the_loss_at_its_start():
    """(36): ‖θ(t₁) − θ(t₂)‖ ≤ (2/√C)√L(θ(t₂)) for t₁ ≥ t₂; it is printed with L(θ(t₁))."""
    nu = 0.5
    inputs = np.array([[1.0, 0.0], [0.6, 0.8]])
    phi, slope = lambda z: z**3 + nu * z, lambda z: 3 * z**2 + nu
    start = np.random.default_rng(0).normal(size=(3, 2))
    points, losses = flow_down(slope, phi, inputs, np.array([0.5, -1.0]), start, 1.0, 2000)
    at_least("the loss falls", losses[0] / losses[-1], 1e3)
    unit = {"width": 3, "coherence": theory.coherence(inputs), "slope": nu}
    earlier = np.array([theory.landing_distance_bound(loss, **unit) for loss in losses])
    far = np.linalg.norm(points[-1] - points, axis=(1, 2))
    at_most("distance over its bound", np.max(far[:-1] / earlier[:-1]), 1.0)
    at_least("as printed it is exceeded by", far[0] / earlier[-1], 3.0)


def test_where_gradient_flow_lands_has_twice_the_trace():
    """(37) has tr ∇²L = Σ‖∇fᵢ‖², so the bound of Lemma 11 lacks a 2: it fails even on Γ."""
    z, width, unit = 0.3, 4, {"coherence": 1.0, "slope": 1.0}
    net = mf.models.TwoLayerNet([[1.0]], [width * (z**3 + z)], width)
    theta = jnp.full((width, 1), z)
    at_most("loss, so that gradient flow is there already", net.loss(theta), 1e-24)
    trace, square = float(net.loss.trace_hessian(theta)), (3 * z**2 + 1) ** 2
    printed = width * square + square  # Σφ'² + Σᵢ maxⱼ φ'²(… ± 0)
    at_least("as printed it is exceeded by", trace / printed, 1.5)
    corrected = 2 * theory.landed_flatness_bound(theta, 0.0, net.activation, **unit)
    close("corrected, sharp there", corrected, trace, 1e-9)


def test_features_are_bounded_by_the_root_of_flatness():
    """Lemma 15 goes on from φ'² ≤ F with φ' ≤ F; it is φ' ≤ √F, and F may be below 1.

    |z| ≤ max(ε, φ'/(6ε) + ε/2) for every ε > 0 and φ = z³ + νz: least at ε = √(φ'/3).
    """
    nu, z = 0.05, np.linspace(-2, 2, 401)
    flatness = (3 * z**2 + nu) ** 2  # of one neuron on one example
    bound = lambda slope: np.sqrt(slope / 3)
    at_least("room with √F", np.min(bound(np.sqrt(flatness)) - np.abs(z)), 0.0)
    at_most("as printed", np.min(bound(flatness) - np.abs(z)), -0.1)
    for reach in (0.05, 0.2, 1.0):
        some = np.maximum(reach, np.sqrt(flatness) / (6 * reach) + reach / 2)
        at_least(f"room with √F and ε = {reach}", np.min(some - np.abs(z)), 0.0)
