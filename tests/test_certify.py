"""Certificates: what holds is certified, what fails is named, with the place where it fails."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import close, refused
from manifoldflow.diagnostics import Certificate, Certificates, certify

INPUTS = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
TARGETS = jnp.array([1.0, -0.5])


def on_manifold(net, key=1):
    return net.manifold.project(net.initial(jr.key(key)))


@pytest.fixture(scope="module")
def walk():
    net = mf.models.TwoLayerNet(INPUTS, TARGETS, 3)
    flow = mf.RiemannianGradientFlow(net.manifold, net.flatness)
    path = mf.solve(flow, on_manifold(net), end_time=2.0, num_saves=4)
    return net, path, certify(net.manifold, path, noise=mf.LabelNoise(1.0), network=net)


def test_all_holds_for_the_network_of_the_theorem(walk):
    net, path, found = walk
    assert found, f"\n{found}"
    assert found.named("rank").value == 2
    mu = float(np.linalg.eigvalsh(INPUTS @ INPUTS.T)[0])
    close("μ", found.named("coherence μ").value, mu, 1e-12)
    # Lemma 12 of φ′ ≥ 1 and m = 3, and the constants of z³ + z.
    close("4mμϱ₁²", found.named("c ≥ 4μϱ₁²·½s‖w‖²").threshold, 12 * mu, 1e-6)
    close("ϱ₂", found.named("ϱ₂ = min φ‴").value, 6.0, 1e-6)
    stationary = found.named("‖∇F‖ ≤ √μ·β")
    features = jax.vmap(net.features)(path.points)
    low, high = float(features.min()), float(features.max())
    constants = mf.theory.activation_constants(net.activation, low, high)
    close("√μ·β", stationary.threshold, np.sqrt(mu) * constants.normality, 1e-3)
    slope = mf.riemannian_gradient(net.manifold, net.flatness, path.final)
    close("‖∇F‖", stationary.value, jnp.linalg.norm(slope), 1e-6)


def test_the_table(walk):
    lines = str(walk[2]).splitlines()
    assert len(lines) == 1 + len(walk[2])
    assert all("holds" in line and "20" in line for line in lines[1:]), str(walk[2])


def test_contraction_is_measured(walk):
    """‖∇L‖² ≥ c·L at points round the path, and c is not far too small."""
    net, path, found = walk
    c = found.named("c of ‖∇L‖² ≥ c·L").value
    near = path.final + 1e-4 * jr.normal(jr.key(2), (200, *path.final.shape))
    ratio = jax.vmap(lambda x: jnp.sum(net.loss.gradient(x) ** 2) / net.loss(x))(near)
    assert c * 0.99 <= float(jnp.min(ratio)) <= 3 * c, (c, float(jnp.min(ratio)))


@pytest.mark.parametrize(
    ("activation", "broken", "place"),
    [
        (lambda z: z**3, "ϱ₁ = min φ′", 0.0),
        (lambda z: z**5 + z, "ϱ₂ = min φ‴", 0.0),
        (lambda z: jnp.tanh(z) + 0.3 * z, "ϱ₂ = min φ‴", 0.0),
        (jax.nn.leaky_relu, "ϱ₂ = min φ‴", None),
    ],
    ids=["cube", "fifth power", "tanh", "leaky ReLU"],
)
def test_an_activation_that_breaks_an_assumption(activation, broken, place):
    """A certificate that names it, not an error."""
    net = mf.models.TwoLayerNet(INPUTS, TARGETS / 4, 4, activation)
    rows = jnp.array([[0.5, 0.4, 0.1], [-0.4, 0.8, 0.2], [0.7, -0.9, 0.3], [-0.6, 0.2, 0.4]])
    found = certify(net.manifold, net.manifold.project(rows), network=net)
    certificate = found.named(broken)
    assert not found and not certificate.holds, f"\n{found}"
    assert "FAILS" in str(found)
    if place is not None:
        close("where", float(certificate.where.removeprefix("z = ")), place, 1e-2)


def test_noise_that_is_not_the_hessian():
    """Isotropic noise is neither normal nor proportional; noise of one example is normal only."""
    net = mf.models.TwoLayerNet(INPUTS, TARGETS, 3)
    point = on_manifold(net)
    isotropic = certify(net.manifold, point, noise=mf.IsotropicNoise())
    assert not isotropic.named("|PΣv|/|Σv|").holds
    one_row = mf.CustomNoise(lambda x: jax.grad(lambda x: net.loss.residual(x)[1])(x)[..., None])
    normal = certify(net.manifold, point, noise=one_row)
    assert normal.named("|PΣv|/|Σv|").holds
    assert normal[-1].name.startswith("|Σv") and not normal[-1].holds


def test_a_path_that_sharpens(walk):
    """Run backwards the regulariser grows, and the save where it does most is named."""
    net, path, _ = walk
    backwards = eqx.tree_at(lambda path: path.points, path, path.points[::-1])
    growth = certify(net.manifold, backwards).named("growth of tr∇²L")
    assert not growth.holds and growth.where == "save 4", growth


def test_rank_that_is_lost():
    doubled = mf.LevelSet(lambda x: jnp.stack([jnp.sum(x**2) - 1, 2 * jnp.sum(x**2) - 2]))
    found = certify(doubled, jnp.array([0.6, 0.8, 0.0]))
    assert not found.named("rank").holds and not found.named("λ_min/λ_max of JJᵀ").holds


def test_bad_input():
    net = mf.models.TwoLayerNet(INPUTS, TARGETS, 3)
    with refused(ValueError, "NaN or infinite"):
        certify(net.manifold, jnp.full((3, 3), jnp.nan))
    with refused(ValueError, "about LeastSquares", "SquaredNorm"):
        certify(mf.LevelSet(net.loss.residual), on_manifold(net), network=net)
    with refused(KeyError, "No certificate 'width'"):
        certify(net.manifold, on_manifold(net)).named("width")


def test_a_certificate_of_nothing_does_not_hold():
    unknown = Certificate("it", float("nan"), 0.0, ">", "", "")
    assert not unknown.holds and not Certificates([unknown])
