"""The laws of manifolds, as functions: the library must pass them, the mutants must not.

Each takes a `zoo.Place`. Expected values come from dense matrices by NumPy's SVD and from
finite differences, never from the package.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

import zoo
from checks import at_least, at_most, central_difference, close, flat, in_window, norm, slope


def tangent_projection_law(place, seed=1, bound=1e-10):
    """P² = P = Pᵀ, JP = 0, v = Pv + P⊥v, and P is the projector on the null space of J."""
    manifold, point = place.manifold, place.point
    v, w = place.random_vector(seed), place.random_vector(seed + 1000)
    pv, pw = (manifold.tangent_projection(point, x) for x in (v, w))
    again = manifold.tangent_projection(point, pv)
    close(f"P² = P, seed {seed}", again, pv, bound, scale=norm(v))
    left, right = (float(flat(a) @ flat(b)) for a, b in ((pv, w), (v, pw)))
    at_most(f"P = Pᵀ, seed {seed}", abs(left - right), bound * norm(v) * norm(w))
    size = np.linalg.norm(place.jacobian, 2) * norm(v)
    at_most(f"JP = 0, seed {seed}", norm(place.jacobian @ np.asarray(flat(pv))), bound * size)
    normal = manifold.normal_projection(point, v)
    close(f"Pv + P⊥v = v, seed {seed}", flat(pv) + flat(normal), v, bound)
    expected = place.projector @ np.asarray(flat(v))
    close(f"P against the SVD, seed {seed}", pv, expected, 10 * bound, scale=norm(v))


def dimension_law(place):
    manifold, point, codimension = place.manifold, place.point, place.codimension
    total = flat(place.coordinates).size
    counted = manifold.dimension(point), manifold.codimension(point)
    assert counted == (total - codimension, codimension), f"{counted}, D = {total}"
    rank = int(manifold.rank(point))
    assert rank == codimension, f"rank {rank}, codimension {codimension}"


def small_tangent(place, seed, size=0.3):
    v = place.manifold.tangent_projection(place.point, place.random_vector(seed))
    return jax.tree.map(lambda leaf: size / norm(v) * leaf, v)


def retraction_law(place, seed=1):
    """y = R(x, v) is on the manifold and P(y − x) = Pv; normal parts of v do not count."""
    manifold, point = place.manifold, place.point
    v = small_tangent(place, seed)
    y = place.coordinates_of(manifold.retract(point, v))
    at_most(f"defect of R(x, v), seed {seed}", manifold.defect(manifold.retract(point, v)), 1e-9)
    forward = manifold.tangent_projection(point, jax.tree.map(jnp.subtract, y, place.coordinates))
    close(f"P(R(x, v) − x) = Pv, seed {seed}", forward, v, 1e-9)
    normal = manifold.normal_projection(point, place.random_vector(seed + 1000))
    same = manifold.retract(point, jax.tree.map(jnp.add, v, normal))
    close(f"R(x, v + n) = R(x, v), seed {seed}", place.coordinates_of(same), y, 1e-9)


def second_fundamental_form(place, v):
    """II(v, v) = −J†D²f[v, v], dense."""
    fn, x = zoo.constraint_of(place.manifold, place.point)
    v = flat(v)
    along = lambda y: jax.jvp(fn, (y,), (v,))[1]
    second = jax.jit(lambda y: jax.jvp(along, (y,), (v,))[1])(x)
    return -place.pseudo_inverse @ np.asarray(second)


def retraction_order_law(place, seed=2):
    """|R(x, tv) − x − tPv − ½t²II(Pv, Pv)| falls like t³ or faster: a second-order retraction."""
    v = small_tangent(place, seed, size=1.0)
    bend = second_fundamental_form(place, v)
    x, step = np.asarray(flat(place.coordinates)), np.asarray(flat(v))
    times, errors = np.array([0.08, 0.04, 0.02, 0.01]), []
    for t in times:
        y = place.manifold.retract(place.point, jax.tree.map(lambda leaf: t * leaf, v))
        expansion = x + t * step + t**2 / 2 * bend
        errors.append(norm(flat(place.coordinates_of(y)) - expansion))
    found = slope(times, errors)
    in_window(f"slope of the retraction's error {errors}, seed {seed}", found, 2.8, 4.4)


def projection_law(place, seed=3, size=0.1):
    """project lands, stays where it landed, moves about as far as the manifold is away."""
    manifold, away = place.manifold, place.random_vector(seed)
    start = zoo.moved(place.point, away, size / norm(away))
    landed = manifold.project(start)
    assert bool(manifold.is_on(landed)), f"project missed the manifold, seed {seed}"
    at_most(f"defect after project, seed {seed}", manifold.defect(landed), 1e-9)
    here, there = place.coordinates_of(landed), place.coordinates_of(start)
    again = place.coordinates_of(manifold.project(landed))
    close(f"project is idempotent, seed {seed}", again, here, 1e-10)
    at_most(f"way of project, seed {seed}", norm(flat(here) - flat(there)), 2 * size)
    assert not bool(manifold.is_on(zoo.moved(place.point, away, 1e-3))), "is_on is always true"


def derivative_law(name, fn, vector, seed, bound=1e-6, step=1e-3):
    """jvp = central difference, and ⟨jvp v, w⟩ = ⟨v, vjp w⟩; fn maps a vector to a vector."""
    v = jr.normal(jr.key(seed), vector.shape)
    w = jr.normal(jr.key(seed + 1), jax.eval_shape(fn, vector).shape)

    @jax.jit
    def both_modes(x):
        value, forward = jax.linearize(fn, x)
        return value, forward(v), jax.linear_transpose(forward, x)(w)[0]

    value, tangent, cotangent = both_modes(vector)
    # Of the same program: the values alone would be one more.
    finite = central_difference(lambda t: both_modes(vector + t * v)[0], step)
    close(f"{name}: jvp against differences, seed {seed}", tangent, finite, bound, scale=norm(v))
    gap = abs(float(tangent @ w - v @ cotangent))
    at_most(f"{name}: jvp against vjp, seed {seed}", gap, 1e-9 * norm(v) * norm(w))


def project_derivative_law(place, seed=5):
    """∂project = P on the manifold; off it, the rule is P at the result."""
    manifold = place.manifold
    rebuild, x = zoo.unraveller(manifold, place.point)

    def project(y):
        return flat(place.coordinates_of(manifold.project(rebuild(y))))

    derivative_law("project", project, x, seed)
    v = jr.normal(jr.key(seed + 2), x.shape)
    off = x + 0.05 * jr.normal(jr.key(seed + 3), x.shape)
    landed, tangent = jax.jit(lambda y: jax.jvp(project, (y,), (v,)))(off)
    expected = manifold.tangent_projection(rebuild(landed), place.coordinates_of(rebuild(v)))
    close(f"∂project off the manifold, seed {seed}", tangent, expected, 1e-9)


def retract_derivative_law(place, seed=6):
    """In the point and in the vector together."""
    rebuild, x = zoo.unraveller(place.manifold, place.point)

    def retract(both):
        at, along = jnp.split(both, 2)
        vector = place.coordinates_of(rebuild(along))
        return flat(place.coordinates_of(place.manifold.retract(rebuild(at), vector)))

    start = jnp.concatenate([x, flat(small_tangent(place, seed))])
    derivative_law("retract", retract, start, seed, bound=1e-5)


def random_tangent_law(place, seed=8, num_samples=1000):
    """random_tangent is tangent and has covariance P, within four standard errors."""
    keys = jr.split(jr.key(seed), num_samples)
    drawn = eqx.filter_vmap(lambda key: place.manifold.random_tangent(place.point, key))(keys)
    drawn = np.asarray(jax.vmap(flat)(drawn))
    worst = np.max(np.linalg.norm(drawn @ place.jacobian.T, axis=1))
    size = np.linalg.norm(place.jacobian, 2) * np.sqrt(drawn.shape[1])
    at_most(f"J·random_tangent, seed {seed}", worst, 1e-9 * size)
    for a in np.random.default_rng(seed).normal(size=(4, drawn.shape[1])):
        variance = a @ place.projector @ a
        off = abs(np.mean((drawn @ a) ** 2) - variance)
        allowed = 4 * variance * np.sqrt(2 / num_samples)
        at_most(f"variance of ⟨a, random tangent⟩, seed {seed}", off, allowed)


# --- noise, drift and Φ ----------------------------------------------------------------------


@eqx.filter_jit
def _gradients(noise, loss, point, keys):
    return jax.vmap(lambda key: flat(noise.gradient(loss, point, key)))(keys)


def sampled_gradients(noise, loss, point, seed, num_samples=4000):
    return np.asarray(_gradients(noise, loss, point, jr.split(jr.key(seed), num_samples)))


@eqx.filter_jit
def _stated_moments(noise, loss, point, directions):
    """The mean, and Σ times each direction."""
    unravel = ravel_pytree(loss.split(point)[0])[1]
    covariance = noise.covariance(loss, point)
    along = jax.vmap(lambda a: flat(covariance.mv(unravel(a))))(directions)
    return flat(loss.gradient(point)), along


def noise_moments_law(noise, loss, point, seed):
    """Samples have mean ∇L and the stated variance ⟨a, Σa⟩, within four standard errors."""
    samples = sampled_gradients(noise, loss, point, seed)
    directions = np.random.default_rng(100 * seed).normal(size=(3, samples.shape[1]))
    mean, along = map(np.asarray, _stated_moments(noise, loss, point, directions))
    for direction, (a, sigma_a) in enumerate(zip(directions, along)):
        seen = (samples - mean) @ a
        error = seen.std() / np.sqrt(len(seen))
        at_most(f"mean along direction {direction}, seed {seed}", abs(seen.mean()), 4 * error)
        variance = a @ sigma_a
        off, error = abs(np.mean(seen**2) - variance), np.std(seen**2) / np.sqrt(len(seen))
        at_most(f"variance off {variance:.3g}, direction {direction}, seed {seed}", off, 4 * error)
        at_least("what the test could see", 0.3 * variance, 4 * error)


def label_noise_drift_law(flow, point, c):
    """⟨drift, v⟩ = −(c/4) d/dt tr∇²L along the manifold, the trace of the brute-force Hessian."""
    manifold = flow.manifold
    rebuild, _ = zoo.unraveller(manifold, point)
    drift = jax.jit(lambda flow, p: flow.drift(p))(flow, point)

    @jax.jit
    def trace(v, t):
        moved = manifold.retract(point, jax.tree.map(lambda leaf: t * leaf, v))
        hessian = jax.hessian(lambda x: manifold.loss(rebuild(x)))
        return jnp.trace(hessian(flat(manifold.split(moved)[0])))

    for seed in range(3):
        v = manifold.random_tangent(point, jr.key(seed))
        slope_of_trace = central_difference(lambda t, v=v: trace(v, t), 1e-3)[0]
        error = abs(float(flat(drift) @ flat(v)) + c / 4 * float(slope_of_trace))
        at_most(f"⟨drift, v⟩ + (c/4)·∂tr H, seed {seed}", error, 1e-7 * norm(drift) * norm(v))
    at_most("normal part of the drift", norm(manifold.normal_projection(point, drift)), 1e-12)


def limit_map_law(limit_map_with_info, name, loss, start, limit, most_factorizations):
    """Φ(start) to 1e-6, within so many factorisations; returns how many there were."""
    found, info = limit_map_with_info(loss, start)
    assert bool(info.is_successful), f"{name}: {info.result}"
    at_most(f"{name}: factorisations", info.num_factorizations, most_factorizations)
    close(f"{name}: error in θ", found, limit, 1e-6)
    return int(info.num_factorizations)


def defect_law(manifold, mixed, point, seed=61):
    """The defect does not change when the constraint is multiplied by a matrix."""
    off = point + 0.01 * jr.normal(jr.key(seed), point.shape)
    plain = float(manifold.defect(off))
    at_least(f"defect off the manifold, seed {seed}", plain, 1e-3)
    at_most(f"defect of A·f, seed {seed}", abs(float(mixed.defect(off)) - plain), 1e-9 * plain)
