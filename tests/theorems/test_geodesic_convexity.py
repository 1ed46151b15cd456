"""Convexity along geodesics: of F = ½ tr ∇²L where its gradient is small [Gatmiry2024].

‖∇F‖ ≤ √μβ: the covariant Hessian is PSD [Lemma 4], so F is convex along geodesics [Lemma 19].
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import geometry, theory
from manifoldflow.diagnostics import check_geodesic_convexity, ConvexityCheck

SPHERE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
ANGLE = 0.7
PLACE = jnp.array([np.cos(ANGLE), 0.0, np.sin(ANGLE)])
UP = jnp.array([-np.sin(ANGLE), 0.0, np.cos(ANGLE)])


def height(sign, x):
    return sign * x[2]


HEIGHT, DEPTH, NOTHING = (jax.tree_util.Partial(height, jnp.array(s)) for s in (1.0, -1.0, np.nan))


def test_heights_on_the_sphere():
    """Along geodesics of the unit sphere F = ±height has F″ = −F, whatever the direction.

    The second derivative of F in space is 0: on a manifold that is another question.
    """
    both = 3 * jnp.stack([jnp.array([0.0, 1.0, 0.0]), UP])
    found = check_geodesic_convexity(SPHERE, HEIGHT, PLACE, directions=both, length=0.5)
    assert isinstance(found, ConvexityCheck) and not found and "NOT" in str(found)
    close("least", found.least, -np.sin(ANGLE + 0.5), 1e-7)
    close("largest", found.largest, -np.sin(ANGLE - 0.5), 1e-7)
    close("where", (found.direction, found.time), (1, 0.5), 1e-12)
    close("steepest", found.steepest, np.cos(ANGLE - 0.5), 1e-7)
    found = check_geodesic_convexity(SPHERE, DEPTH, PLACE, directions=both, length=0.5)
    assert found and "convex there" in str(found)
    close("least", found.least, np.sin(ANGLE - 0.5), 1e-7)
    close("where", (found.direction, found.time), (1, -0.5), 1e-12)
    far = check_geodesic_convexity(SPHERE, DEPTH, PLACE, directions=both, length=0.8)
    assert not far, "beyond the equator"
    close("least", far.least, np.sin(ANGLE - 0.8), 1e-6)
    with refused(ValueError, "fn has two derivatives", "a shorter one"):
        check_geodesic_convexity(SPHERE, NOTHING, PLACE, directions=both, length=0.5)


def test_what_cannot_be_asked():
    with refused(ValueError, "neither directions nor a key"):
        check_geodesic_convexity(SPHERE, HEIGHT, PLACE, length=0.1)
    with refused(ValueError, "lengths", "expected all above 0"):
        check_geodesic_convexity(SPHERE, HEIGHT, PLACE, directions=PLACE[None], length=0.1)


# --- The flatness of two-layer networks -------------------------------------------------------

INPUTS = np.array([[1.0, 0.0, 0.0], [0.2, 0.96**0.5, 0.0]])
MU = theory.coherence(INPUTS)
NUM = 16


def cubic(nu, z):
    return z**3 + nu * z


def network(nu, targets):
    """And √μβ; all are one structure, so one program serves them all."""
    activation = jax.tree_util.Partial(cubic, jnp.array(nu))
    net = mf.models.TwoLayerNet(INPUTS, targets, 3, activation)
    return net, MU**0.5 * theory.activation_constants(activation).normality


def with_features(features):
    return jnp.asarray(features) @ jnp.linalg.pinv(jnp.asarray(INPUTS)).T


NET, THRESHOLD = network(0.5, [1.2, -0.4])
FLATTEST = with_features(NET.minimizer())


def test_flatness_is_convex_along_geodesics_below_the_threshold():
    """At random points, along random geodesics on which ‖∇F‖ stays below √μβ [Lemma 4, 19]."""
    steepest = 0.0
    for seed in range(6):
        away = 0.03 * jr.normal(jr.key(seed), FLATTEST.shape)
        point = NET.manifold.project(FLATTEST + away)
        found = check_geodesic_convexity(
            NET.manifold, NET.flatness, point, jr.key(9), length=0.02, num_directions=NUM
        )
        at_most("‖∇F‖ over its threshold", found.steepest / THRESHOLD, 1.0)
        assert found, found
        steepest = max(steepest, found.steepest)
    at_least("some come close to it", steepest / THRESHOLD, 0.5)


def test_flatness_is_not_convex_above_the_threshold():
    """Two neurons change places on one example: F is convex in space, and not along Γ."""
    nu, features = 0.05, np.array([[0.36, 0.05], [0.08, 0.05], [0.08, 0.05]])
    net, threshold = network(nu, np.sum(cubic(nu, features), axis=0))
    slope = 3 * features[:, 0] ** 2 + nu
    swap = with_features([[1 / slope[0], 0.0], [-1 / slope[1], 0.0], [0.0, 0.0]])
    found = check_geodesic_convexity(
        net.manifold,
        net.flatness,
        with_features(features),
        directions=jnp.stack([swap] * NUM),
        length=1e-3,
    )
    assert not found, found
    at_least("‖∇F‖ over its threshold", found.steepest / threshold, 1.5)
    at_most("second derivative", found.largest, -0.3)
    blocks = 2 * (6 * features) ** 2 + 2 * 6 * (3 * features**2 + nu)  # D²F in space, by features
    at_least("in space", np.min(blocks), 0.0)


def test_second_derivatives_along_geodesics():
    """d²F(γ)/dt² = ⟨∇²F γ′, γ′⟩ ≠ 0. Lemma 19 keeps ⟨∇F, ∇_γ′γ′⟩ = 0 of the two terms.

    By differences of F at points of the geodesic, which know of no Hessian.
    """
    point = NET.manifold.project(FLATTEST + 0.3 * jr.normal(jr.key(1), FLATTEST.shape))
    vector = NET.manifold.random_tangent(point, jr.key(2))
    vector = vector / jnp.linalg.norm(vector)
    found = check_geodesic_convexity(
        NET.manifold, NET.flatness, point, directions=jnp.stack([vector] * NUM), length=1e-4
    )
    step = 0.01
    ends = step * jnp.array([1.0, 2.0])
    both = jax.vmap(lambda v: geometry.geodesic_with_velocity(NET.manifold, point, v, ends))
    (forwards, backwards), moving = both(jnp.stack([vector, -vector]))
    halfway = (forwards[1] - point) / ends[1]
    close("γ′ by differences", moving[0, 0], halfway, 1e-3)
    at_least("γ′ changes", jnp.linalg.norm(moving[0, 0] - vector), 2e-3)
    values = jax.vmap(NET.flatness)(jnp.concatenate([backwards[::-1], point[None], forwards]))
    second = jnp.dot(jnp.array([-1, 16, -30, 16, -1]), values) / (12 * step**2)
    middle = (found.least + found.largest) / 2
    close("⟨∇²F γ′, γ′⟩ by differences", second, middle, 1e-3)
    at_least("as printed it is off by", abs(second), 0.5)
