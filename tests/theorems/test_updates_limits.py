"""Limits of updates in n dimensions against the dense formula for any iteration.

Mean fields, covariances and second moments are written out here; `IterationLimit` knows nothing of
rows, gains or preconditioners.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm as normal
from scipy.integrate import quad

import manifoldflow as mf
from checks import at_most, close, flat, norm, refused
from manifoldflow import updates
from update_problems import law, once, problem, rejected, SHAPES, STD

# --- updates that see one example at a time --------------------------------------------------


def of_rows(here, rows_fn, mean_fn, squares):
    """F = (1/n) Σ bᵢ E ψᵢ(rᵢ + ε), Σ = (1/n) Σ bᵢbᵢᵀ E ψᵢ²."""

    def field(x):
        return rows_fn(x).T @ mean_fn(x) / here.count

    def covariance(x):
        rows = rows_fn(x)
        return (rows.T * jnp.asarray(squares)) @ rows / here.count

    return mf.IterationLimit(field, covariance, rank=here.count).drift(here.flat)


def mean_clipped(r, height):
    """E clip(r + ε, ±h) = −h + δG((r + h)/δ) − δG((r − h)/δ) with G(z) = zΦ(z) + φ(z)."""
    g = lambda z: z * normal.cdf(z) + normal.pdf(z)
    return -height + STD * (g((r + height) / STD) - g((r - height) / STD))


def square_clipped(height):
    """E min(ε², h²) by quadrature."""
    density = lambda e: 2 * np.exp(-(e**2) / (2 * STD**2)) / np.sqrt(2 * np.pi) / STD
    inside = quad(lambda e: e**2 * density(e), 0, height, epsabs=1e-14)[0]
    return inside + height**2 * quad(density, height, 12 * STD, epsabs=1e-14)[0]


@pytest.mark.parametrize("max_norm", [0.3, 1.5])
def test_clipping(max_norm):
    here = problem()
    heights = lambda x: max_norm / jnp.linalg.norm(here.rows(x), axis=1)
    expected = of_rows(
        here, here.rows, lambda x: mean_clipped(here.residual(x), heights(x)),
        [square_clipped(float(h)) for h in heights(here.flat)],
    )  # fmt: skip
    law("clipping", here.found(updates.ClippedSGD(max_norm)).drift(here.point), expected)
    with rejected:
        law("SGD", here.found(updates.SGD()).drift(here.point), expected, 1e-2)
    with rejected:
        law("twice", here.found(updates.ClippedSGD(2 * max_norm)).drift(here.point), expected, 1e-2)


def test_clipping_far_out_is_sgd():
    here = problem()
    law(
        "no clipping", here.found(updates.ClippedSGD(1e3)).drift(here.point),
        here.found(updates.SGD()).drift(here.point),
    )  # fmt: skip
    still = here.found(updates.ClippedSGD(1.0), mf.LabelNoise(0.0, batch_size=1))
    at_most("without noise", norm(still.drift(here.point)), 1e-12)


def polar_by_hand(matrix):
    """(AAᵀ)^{−½}A for two rows, by M^½ = (M + √det M)/√(tr M + 2√det M)."""
    square = matrix @ matrix.T
    det = jnp.sqrt(jnp.linalg.det(square))
    root = (square + det * jnp.eye(2)) / jnp.sqrt(jnp.trace(square) + 2 * det)
    return jnp.linalg.inv(root) @ matrix


def unit(array):
    return array / jnp.linalg.norm(array)


@pytest.mark.parametrize("name", SHAPES)
def test_muon(name):
    here = problem(name)
    polar = polar_by_hand if name == "twice" else unit

    def rows(x):
        slopes = jax.vmap(here.unravel)(here.rows(x))
        return jax.vmap(lambda g: flat({"W": polar(g["W"]), "v": unit(g["v"])}))(slopes)

    mean = lambda x: jax.lax.erf(here.residual(x) / STD / jnp.sqrt(2.0))
    expected = of_rows(here, rows, mean, np.ones(here.count))
    law("Muon", here.found(updates.Muon()).drift(here.point), expected)
    louder = here.found(updates.Muon(), mf.LabelNoise(3 * STD, batch_size=1))
    law("Muon does not see the noise", louder.drift(here.point), expected)
    whole = lambda x: jax.vmap(unit)(here.rows(x))
    wrong = of_rows(here, whole, mean, np.ones(here.count))
    with rejected:
        law("one norm for all leaves", wrong, expected, 1e-2)


def test_sign_descent_does_not_move():
    here = problem("twice")
    flow = here.found(updates.SignSGD())
    at_most("the drift of signs", norm(flow.drift(here.point)), 0.0)
    at_most("part", norm(flow.normal_regularisation(here.point)), 0.0)


# --- Adam ------------------------------------------------------------------------------------


@functools.cache
def with_moments(here):
    """Adam as one iteration of θ and its second moments v; Cov g² matters to neither.

    Of b, ε and the decay: all values go through one program.
    """
    scale = float(here.loss.scale)
    strength = (scale * STD) ** 2 * here.count  # of batches of one
    moments = lambda x: strength * jnp.sum(here.rows(x) ** 2, axis=0)
    slope = lambda x: scale * here.rows(x).T @ here.residual(x)
    preconditioner = lambda v, eps: 1 / (jnp.sqrt(v) + eps)

    def field(b, eps, p):
        x, v = p["x"], p["z"]
        mean = slope(x)
        return {"x": preconditioner(v, eps) * mean, "z": b * (v - moments(x) - mean**2)}

    def covariance(b, eps, p):
        rows = here.rows(p["x"]) * preconditioner(p["z"], eps)
        zeros = jnp.zeros((len(p["x"]), len(p["x"])))
        spread = b**2 * jnp.diag(2 * p["z"] ** 2)
        return jnp.block([[strength * rows.T @ rows, zeros], [zeros, spread]])

    def slow(decay, p):
        return {"x": -decay * p["x"], "z": jnp.zeros_like(p["z"])}

    @jax.jit
    def drift(b, eps, decay):
        partial = jax.tree_util.Partial
        flow = mf.IterationLimit(
            partial(field, b, eps), partial(covariance, b, eps), partial(slow, decay),
            rank=here.count + len(here.flat),
        )  # fmt: skip
        return flow.drift({"x": here.flat, "z": moments(here.flat)})["x"]

    return drift


@pytest.mark.parametrize("b, eps, decay", [(0.8, 0.0, 0.0), (5.0, 0.3, 0.4), (0.05, 0.02, 0.0)])
def test_adam_whose_second_moments_lag(b, eps, decay):
    here = problem()
    expected = with_moments(here)(b, eps, decay)
    options = {"averaging": b, "eps": eps, "weight_decay": decay}
    flow = here.found(updates.Adam(**options))
    law("Adam", flow.drift(here.point), expected, 1e-8)
    law("parts", flat(flow.normal_regularisation(here.point)) + flat(flow.slow_drift(here.point)),
        expected, 1e-8)  # fmt: skip
    law("any β₁", here.found(updates.Adam(0.0, **options)).drift(here.point), expected, 1e-8)
    for name, wrong in {
        "2b": {"averaging": 2 * b}, "fast": {"averaging": "fast"}, "ε": {"eps": eps + 0.1},
        "decay": {"weight_decay": decay + 0.1},
    }.items():  # fmt: skip
        with rejected:
            found = here.found(updates.Adam(**(options | wrong))).drift(here.point)
            law(name, found, expected, 1e-3)


def g_s(here, eps):
    """G_S and u at the point."""
    scale = float(here.loss.scale)
    strength = (scale * STD) ** 2 * here.count
    rows = here.rows(here.flat)
    u = lambda x: jnp.sqrt(strength * jnp.sum(here.rows(x) ** 2, axis=0))
    s = jnp.diag(1 / (u(here.flat) + eps))
    return s - s @ rows.T @ jnp.linalg.solve(rows @ s @ rows.T, rows @ s), u


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("name", SHAPES)
def test_adam_with_fast_second_moments(name, eps):
    """−½G_S∇Σ[u − ε ln(u + ε)], which is where small b leads."""
    here = problem(name)
    matrix, u = g_s(here, eps)
    potential = lambda x: jnp.sum(u(x) - eps * jnp.log(u(x) + eps))
    expected = -matrix @ jax.jit(jax.grad(potential))(here.flat) / 2
    found = here.found(updates.Adam(eps=eps)).drift(here.point)
    law("Adam", found, expected, 1e-9)
    late = [flat(here.found(updates.Adam(averaging=b, eps=eps)).drift(here.point)) - flat(found)
            for b in (2e-4, 1e-4)]  # fmt: skip
    close("linear in b", late[0], 2 * late[1], 1e-2)
    close("as b → 0", 2 * late[1] - late[0], 0 * late[0], 1e-6, scale=norm(expected))
    if eps == 0:
        louder = here.found(updates.Adam(), mf.LabelNoise(5.0)).drift(here.point)
        law("whatever the noise", louder, expected)


def test_a_large_eps_is_sgd():
    here, eps = problem(), 1e6
    found = flat(here.found(updates.Adam(eps=eps)).drift(here.point)) * eps**2
    law("ε² × Adam", found, here.found(updates.SGD()).drift(here.point), 1e-5)


def test_adam_needs_to_see_every_coordinate():
    """A weight that no output depends on: 0/0, unless there is an ε or it is frozen."""
    here = problem()
    point = here.point | {"idle": jnp.ones(2)}
    flow = here.found(updates.Adam())
    with refused(ValueError, "Adam with eps=0 divides by", "freeze", "trainable"):
        flow.drift(point)
    assert bool(jnp.all(jnp.isnan(flat(eqx.filter_jit(flow.drift)(point)))))
    for b in ("fast", 1.0):
        kept = here.found(updates.Adam(averaging=b, eps=0.1))
        found = kept.drift(point)
        law("the rest", {k: found[k] for k in ("W", "v")}, kept.drift(here.point))
        at_most("the idle weight", norm(found["idle"]), 0.0)
    walk = mf.solve(flow, point, end_time=0.1, throw=False)
    assert walk.result == mf.RESULTS.step_too_small, walk.result


def test_a_second_moment_on_its_way_to_zero():
    """√Hⱼⱼ acts like |θⱼ|: on an ellipse θ₂ = 0 comes in a finite time, and the walk says so."""
    loss = mf.LeastSquares(np.ones(1), np.ones(1), predict=lambda p, x: p[0] ** 2 + 2 * p[1] ** 2)
    manifold = mf.ZeroLossManifold(loss)
    point = manifold.project(jnp.array([0.8, 0.4]))
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(STD), updates.Adam())
    at_most("a step", norm(flow.drift(point)), 10.0)
    options = {"end_time": 2.0, "num_saves": 8, "max_steps": 400}
    walk = mf.solve(flow, point, **options, throw=False)
    assert walk.result in (mf.RESULTS.max_steps_reached, mf.RESULTS.step_too_small), walk.result
    reached = np.isfinite(walk.points).all(axis=1)
    assert reached[0] and not reached[-1], walk.points
    with pytest.raises(eqx.EquinoxRuntimeError, match="step"):
        mf.solve(flow, point, **options)


def test_likelihoods_too():
    """Resampled labels of a logistic model with soft targets: Σ = c∇²L on the manifold only."""
    rng = np.random.default_rng(5)
    inputs, labels = rng.normal(size=(3, 2)), np.array([0.3, 0.6, 0.8])
    entropy = lambda f, y: jnp.logaddexp(0, f) - y * f
    loss = mf.PerExampleLoss(
        inputs, labels, entropy, predict=once, minimizer_fn=lambda y: jnp.log(y) - jnp.log1p(-y)
    )
    start = {"W": jnp.asarray(rng.normal(size=(3, 2))), "v": jnp.asarray(rng.normal(size=3))}
    manifold = mf.ZeroLossManifold(loss)
    point = manifold.project(start)
    x0, unravel = ravel_pytree(point)
    outputs = lambda x: jax.vmap(lambda z: once(unravel(x), z))(jnp.asarray(inputs))
    rows, b = jax.jit(jax.jacfwd(outputs)), 0.7
    mean = lambda x: rows(x).T @ (jax.nn.sigmoid(outputs(x)) - labels) / 3

    @jax.jit
    def covariance_of_gradient(x):
        """The labels of all three are drawn in every batch."""
        return (rows(x).T * labels * (1 - labels)) @ rows(x) / 9

    noise = mf.ResampledLabels()
    dense = jax.jit(lambda x: noise.factor(loss, unravel(x)).as_matrix())(x0 + 0.01)
    close("Σ off the manifold", dense @ dense.T, covariance_of_gradient(x0 + 0.01), 1e-9)

    def field(p):
        slope = mean(p["x"])
        seen = jnp.diag(covariance_of_gradient(p["x"])) + slope**2
        return {"x": slope / jnp.sqrt(p["z"]), "z": b * (p["z"] - seen)}

    def covariance(p):
        s = jnp.diag(p["z"] ** -0.5)
        zeros = jnp.zeros((9, 9))
        return jnp.block([[s @ covariance_of_gradient(p["x"]) @ s, zeros], [zeros, zeros]])

    start = {"x": x0, "z": jnp.asarray(np.diag(covariance_of_gradient(x0)))}
    expected = mf.IterationLimit(field, covariance, rank=12).drift(start)["x"]
    found = mf.LimitDiffusion(manifold, noise, updates.Adam(averaging=b)).drift(point)
    law("Adam on a likelihood", found, expected, 1e-8)
