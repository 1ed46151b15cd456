"""Noise equilibria of linear networks: closed forms of [Ziyin2024], beside what it prints."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import symmetry, theory

KEY = jr.key(0)


def covariance_of(rng, size, trace=None):
    root = rng.normal(size=(size, size))
    found = root @ root.T
    return found if trace is None else found * trace / np.trace(found)


def problem(seed, d_x=4, d_y=3, rank=3, **traces):
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(d_y, rank)) @ rng.normal(size=(rank, d_x))
    return v, covariance_of(rng, d_x, **traces), covariance_of(rng, d_y, **traces)


def product_of(weights):
    found = weights[0]
    for layer in weights[1:]:
        found = layer @ found
    return found


def imbalance(weights, sigma_x, sigma_eps):
    """The largest relative difference of the two sides of all hidden layers."""
    sides = theory.deep_linear_noise_sides(weights, sigma_x, sigma_eps)
    return max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in sides)


def root_of(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


# --- Deep linear networks ---------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_deep_linear_networks_are_balanced(depth):
    for seed, rank in ((0, 3), (1, 2), (2, 1)):
        v, sigma_x, sigma_eps = problem(seed, rank=rank)
        weights = theory.deep_linear_noise_equilibrium(
            v, sigma_x, sigma_eps, widths=[4, 3, 6, 5, 3][: depth - 1], key=jr.key(seed)
        )
        close("W_D ... W_1 = V", product_of(weights), v, 1e-12)
        at_most("imbalance", imbalance(weights, sigma_x, sigma_eps), 1e-12)
        norms = [np.sum(layer**2) for layer in weights[1:-1]]
        scale = np.trace(sigma_x), np.trace(sigma_eps)
        c2 = np.trace(weights[0] @ sigma_x @ weights[0].T) / scale[0]
        close(
            "the last layer",
            np.trace(weights[-1].T @ sigma_eps @ weights[-1]) / scale[1],
            c2,
            1e-11,
        )
        close("layers between", np.array(norms), np.full(depth - 2, c2 * rank), 1e-11, scale=c2)


def gradient_moments(weights, sigma_x, sigma_eps):
    """E grad'grad of W_{i+1} and E grad grad' of W_i at a minimum, by autodiff: x and eps on all
    pairs of +-sqrt(d) roots, which have these second moments."""
    columns = lambda s: np.sqrt(len(s)) * np.concatenate([root_of(s), -root_of(s)])
    x, eps = columns(sigma_x), columns(sigma_eps)
    x, eps = np.repeat(x, len(eps), 0), np.tile(eps, (len(x), 1))
    v = product_of(weights)

    @jax.jit
    @jax.vmap
    def gradients(x, eps):
        return jax.grad(lambda w: jnp.sum((product_of(w) @ x - v @ x - eps) ** 2))(weights)

    found = gradients(x, eps)
    mean = lambda a: np.mean(np.asarray(a), axis=0)
    return [
        (mean(jnp.einsum("nij,nik->njk", g1, g1)), mean(jnp.einsum("nij,nkj->nik", g0, g0)))
        for g0, g1 in zip(found, found[1:])
    ]  # fmt: skip


def test_the_sides_are_the_moments_of_the_gradients():
    v, sigma_x, sigma_eps = problem(3)
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=s) for s in ((3, 4), (5, 3), (3, 5)))
    sides = theory.deep_linear_noise_sides(weights, sigma_x, sigma_eps)
    for side, moments in zip(sides, gradient_moments(weights, sigma_x, sigma_eps), strict=True):
        close("W_{i+1}", 4 * side[0], moments[0], 1e-12)
        close("W_i", 4 * side[1], moments[1], 1e-12)


def printed_theorem(v, sigma_x, sigma_eps, depth):
    """(17) and (18) as printed, with U_i = I."""
    left, s, right = np.linalg.svd(root_of(sigma_eps) @ v @ root_of(sigma_x))
    d = len(s)
    ends = (d / np.sum(s)) ** ((depth - 2) / (2 * depth)) * np.sqrt(s)
    last = np.linalg.solve(root_of(sigma_eps), left * ends)
    first = np.linalg.solve(root_of(sigma_x), (ends[:, None] * right).T).T
    return first, *[(np.sum(s) / d) ** (1 / depth) * np.eye(d)] * (depth - 2), last


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_printed_theorem_needs_traces_that_are_the_dimension(depth):
    """Theorem 5.4 as printed balances where tr Sigma_x = tr Sigma_eps = d, and nowhere else."""
    v, sigma_x, sigma_eps = problem(4, d_x=3, trace=3.0)
    printed = printed_theorem(v, sigma_x, sigma_eps, depth)
    at_most("imbalance, traces d", imbalance(printed, sigma_x, sigma_eps), 1e-12)
    here = theory.deep_linear_noise_equilibrium(
        v, sigma_x, sigma_eps, widths=[3] * (depth - 1), key=KEY
    )
    close("norms", [np.sum(w**2) for w in here], [np.sum(w**2) for w in printed], 1e-11)
    for scales in ((4.0, 1.0), (2.0, 3.0)):
        sigmas = scales[0] * sigma_x, scales[1] * sigma_eps
        printed = printed_theorem(v, *sigmas, depth)
        close("its product", product_of(printed), v, 1e-11)
        at_least("its imbalance", imbalance(printed, *sigmas), 0.1)
        here = theory.deep_linear_noise_equilibrium(v, *sigmas, widths=[3] * (depth - 1), key=KEY)
        at_most("imbalance", imbalance(here, *sigmas), 1e-12)


def test_noise_that_does_not_span_everything():
    """Singular covariances do as long as they reach all of V; else there is no equilibrium."""
    v, sigma_x, _ = problem(5, rank=1)
    flat_noise = np.diag([1.0, 0.0, 2.0])
    weights = theory.deep_linear_noise_equilibrium(v, sigma_x, flat_noise, widths=[2, 2], key=KEY)
    close("V", product_of(weights), v, 1e-12)
    at_most("imbalance", imbalance(weights, sigma_x, flat_noise), 1e-12)
    with refused(ValueError, "no finite equilibrium", "rank 3"):
        theory.deep_linear_noise_equilibrium(
            problem(5)[0], sigma_x, flat_noise, widths=[3], key=KEY
        )


def test_the_key_only_turns_the_hidden_layers():
    v, sigma_x, sigma_eps = problem(6)
    find = lambda seed: theory.deep_linear_noise_equilibrium(
        v, sigma_x, sigma_eps, widths=[4, 4], key=jr.key(seed)
    )
    one, other = find(0), find(1)
    close("the same key", find(0), one, 0.0)
    at_least("another key", np.linalg.norm(one[1] - other[1]), 0.1)
    close("singular values", np.linalg.svd(one[1])[1], np.linalg.svd(other[1])[1], 1e-12)
    close("W_1'W_1", one[0].T @ one[0], other[0].T @ other[0], 1e-12)


# --- Two layers -------------------------------------------------------------------------------

SIZES = 3, 4, 2  # d_x, d, d_y


def finite_set(seed=0, count=12):
    """Examples, their least-squares map and residuals, at which the mean gradient is 0."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, 3)), rng.normal(size=(count, 2)) * [1.0, 3.0]
    solved, *_ = np.linalg.lstsq(x, y, rcond=None)
    return x, y, solved.T, x @ solved - y


def example_loss(point, example):
    x, y = example
    return jnp.sum((point["U"] @ (point["W"] @ x) - y) ** 2)


def drifts(point, data, noise_scale, weight_decay):
    """dC_B/dt for a basis of the symmetric B, over the size of either of its parts."""
    basis = [np.zeros((4, 4)) for _ in range(10)]
    for b, (i, j) in zip(basis, zip(*np.triu_indices(4))):
        b[i, j] = b[j, i] = 1.0
    rotations = [
        symmetry.double_rotation(point, lambda p: p["U"], lambda p: p["W"], b) for b in basis
    ]
    found = symmetry.noether_drift(
        rotations, example_loss, point, data, noise_scale=noise_scale, weight_decay=weight_decay
    )
    return np.asarray(found)


def as_point(weights):
    return {"W": jnp.asarray(weights[0]), "U": jnp.asarray(weights[1])}


@pytest.mark.parametrize("decay", [0.0, 0.05, 3.0])
def test_two_layers_rest_where_their_noise_matrices_balance(decay):
    """No charge moves, by the gradients of all examples; with (13) as printed they do."""
    x, y, v, r = finite_set()
    sigma2 = 0.05
    at = lambda g_w, g_u: as_point(
        theory.two_layer_noise_equilibrium(v, g_w, g_u, width=4, key=KEY)
    )
    matrices = theory.two_layer_noise_matrices(x, r, noise_scale=sigma2, weight_decay=decay)
    here = at(*matrices)
    w, u = here["W"], here["U"]
    close("U W", u @ w, v, 1e-12)
    close("balance", w @ matrices[0] @ w.T, u.T @ matrices[1] @ u, 1e-12)
    away = {"W": 2 * w, "U": u / 2}
    scale = np.max(np.abs(drifts(away, (x, y), sigma2, decay)))
    at_most("drifts", np.max(np.abs(drifts(here, (x, y), sigma2, decay))) / scale, 1e-11)
    noise = theory.two_layer_noise_matrices(x, r, noise_scale=0.5)
    printed = at(*(g + 2 * decay * np.eye(len(g)) for g in noise))
    drift = np.max(np.abs(drifts(printed, (x, y), sigma2, decay))) / scale
    if decay:  # without it sigma^2 drops out
        at_least("drifts as printed", drift, 1e-3)


def test_two_layers_are_the_deep_network_of_depth_two():
    v, sigma_x, sigma_eps = problem(7)
    deep = theory.deep_linear_noise_equilibrium(v, sigma_x, sigma_eps, widths=[5], key=KEY)
    matrices = np.trace(sigma_eps) * sigma_x, np.trace(sigma_x) * sigma_eps
    two = theory.two_layer_noise_equilibrium(v, *matrices, width=5, key=KEY)
    for a, b in zip(deep, two, strict=True):
        close("W", a, b, 1e-12)
    w, u = two
    bars = sigma_x / np.trace(sigma_x), sigma_eps / np.trace(sigma_eps)
    close("(14)", w @ bars[0] @ w.T, u.T @ bars[1] @ u, 1e-12)


def test_one_neuron_loses_its_charge_at_twice_the_variance():
    """d(W_k W_l - U_k U_l)/dt = -2 sigma^2 Var[r] (W_k W_l - U_k U_l), r = dl/d(UW); printed
    -Var[r]. One step of SGD multiplies it by 1 - eta^2 r^2 exactly, so it never grows again."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 1))
    y = 1.5 * x + rng.normal(size=(20, 1))
    point = {"U": jnp.array([[0.9, -0.9, 0.8]]), "W": jnp.array([[1.0], [-0.7], [-0.3]])}
    slopes = 2 * (x * float((point["U"] @ point["W"])[0, 0]) - y) * x
    charge = lambda p: p["W"] @ p["W"].T - p["U"].T @ p["U"]
    start, sigma2 = charge(point), 0.02
    for i, j in ((0, 0), (0, 2), (1, 2)):
        drift = symmetry.charge_drift(
            lambda p, i=i, j=j: charge(p)[i, j], example_loss, point, (x, y), noise_scale=sigma2
        )
        close("dC/dt", drift, -2 * sigma2 * np.var(slopes) * start[i, j], 1e-12)
        at_least("printed", abs(drift / (-np.var(slopes) * start[i, j]) - 1), 0.5)
    eta, kept, before = 0.1, 1.0, jnp.sign(point["U"][0] * point["W"][:, 0])
    for k in rng.integers(20, size=400):
        gradient = jax.grad(example_loss)(point, (x[k], y[k]))
        kept *= 1 - eta**2 * float(2 * (x[k] * (point["U"] @ point["W"])[0] - y[k]) @ x[k]) ** 2
        point = jax.tree.map(lambda p, g: p - eta * g, point, gradient)
    close("charges", charge(point), kept * start, 1e-9, scale=float(jnp.linalg.norm(start)))
    at_most("what is left of them", abs(kept), 0.01)
    signs = jnp.sign(point["U"][0] * point["W"][:, 0])
    assert len(set(np.asarray(before))) == 2 and len(set(np.asarray(signs))) == 1, (before, signs)
    assert len(set(np.asarray(jnp.sign(point["U"][0])))) == 2, "signs of U_i alone still differ"


# --- Sharpness --------------------------------------------------------------------------------


def test_the_sharpness_is_twice_what_is_printed():
    """Proposition 5.3: d_y |W Sigma_x^(1/2)|^2 + |U|^2 tr Sigma_x is half the trace."""
    x, y, _, _ = finite_set()
    rng = np.random.default_rng(2)
    w, u = rng.normal(size=(4, 3)), rng.normal(size=(2, 4))
    loss = mf.FunctionLoss(
        lambda p: jnp.mean(jax.vmap(lambda *e: example_loss(p, e))(jnp.asarray(x), jnp.asarray(y)))
    )
    trace = loss.trace_hessian(as_point((w, u)))
    sigma_x = x.T @ x / len(x)
    close("tr H", trace, theory.deep_linear_sharpness((w, u), sigma_x), 1e-12)
    printed = 2 * np.trace(w @ sigma_x @ w.T) + np.sum(u**2) * np.trace(sigma_x)
    close("tr H / 2", trace / 2, printed, 1e-12)


def test_the_sharpness_of_a_deep_network():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 2))
    weights = tuple(jnp.asarray(rng.normal(size=s)) for s in ((3, 2), (2, 3), (2, 2)))
    y = rng.normal(size=(6, 2))
    loss = mf.FunctionLoss(lambda w: jnp.mean(jnp.sum((x @ product_of(w).T - y) ** 2, axis=1)))
    close(
        "tr H",
        loss.trace_hessian(weights),
        theory.deep_linear_sharpness(weights, x.T @ x / 6),
        1e-12,
    )


def test_sharpness_before_and_after():
    """(15) has half of each side; Kaiming's start has sigma_U^2 = 1/d, not 1: only then is it as
    sharp as the end where d = d_x, and sharper elsewhere."""
    d_x, sigma_x, rng = 4, np.eye(4) * 0.7, np.random.default_rng(4)
    trace = np.trace(sigma_x)
    for d in (4, 7):
        kaiming = theory.deep_linear_initial_sharpness((d_x, d, d_x), (1 / d_x, 1 / d), trace)
        drawn = [
            theory.deep_linear_sharpness(
                (rng.normal(size=(d, d_x)) / np.sqrt(d_x), rng.normal(size=(d_x, d)) / np.sqrt(d)),
                sigma_x,
            )
            for _ in range(2000)
        ]
        error = np.std(drawn) / np.sqrt(len(drawn))
        at_most("mean of draws", abs(np.mean(drawn) - kaiming) / error, 4)
        weights = theory.deep_linear_noise_equilibrium(
            np.eye(d_x), sigma_x, np.eye(d_x), widths=[d], key=KEY
        )
        end = theory.deep_linear_sharpness(weights, sigma_x)
        close("S_end", end, 4 * min(d, d_x) * trace, 1e-12)
        at_least("S_init/S_end", kaiming / end, 1 - 1e-12)
        printed = d_x * d * (1 + 1 / d_x) * trace
        if d == d_x:
            close("S_init = S_end", kaiming, end, 1e-12)
            at_least("printed S_init/S_end", printed / (2 * d * trace), 1.2)
        else:
            at_least("S_init/S_end", kaiming / end, 1.2)
    deep = theory.deep_linear_initial_sharpness((4, 3, 5, 2), (0.5, 0.3, 0.2), 1.5)
    close("three layers", deep, 2 * 1.5 * 30 * (0.06 + 0.1 + 0.15), 1e-12)


def test_only_isotropic_noise_finds_the_flattest_factors():
    """Of all (Q W, U Q^-1), the equilibrium is the least sharp where Sigma_eps is a multiple of I,
    for any inputs; other noise ends at factors that are sharper even than those of one norm."""
    v, sigma_x, _ = problem(8, d_x=3, d_y=3)
    rng = np.random.default_rng(8)

    def sharpness(sigma_eps, change=None, inputs=sigma_x, target=v):
        w, u = theory.deep_linear_noise_equilibrium(target, inputs, sigma_eps, widths=[3], key=KEY)
        q = np.eye(3) if change is None else change
        return theory.deep_linear_sharpness((q @ w, u @ np.linalg.inv(q)), inputs)

    least = sharpness(0.3 * np.eye(3))
    others = [
        sharpness(0.3 * np.eye(3), np.eye(3) + size * rng.normal(size=(3, 3)))
        for size in (0.01, 0.3)
        for _ in range(20)
    ]
    at_least("others over the equilibrium", np.min(others) / least, 1 + 1e-6)
    uneven = np.diag([0.1, 1.0, 3.0])
    one_norm = theory.deep_linear_sharpness((np.eye(3), np.eye(3)), np.eye(3))
    end = sharpness(uneven, inputs=np.eye(3), target=np.eye(3))
    at_least("uneven noise over factors of one norm", end / one_norm, 1.1)


# --- What breaks a symmetry -------------------------------------------------------------------


def test_the_displacement_of_an_approximate_symmetry():
    """(20), solved for s by the gradients of all examples, against (22)."""
    x, y, v, _ = finite_set()
    point = as_point(theory.two_layer_noise_equilibrium(v, np.eye(3), np.eye(2), width=4, key=KEY))
    flat, unravel = jax.flatten_util.ravel_pytree(point)
    rng = np.random.default_rng(5)
    root = rng.normal(size=(flat.size, flat.size))
    hessian, direction = root @ root.T / flat.size, rng.normal(size=flat.size)
    signs = jnp.concatenate([jnp.full(8, 1.0), jnp.full(12, -1.0)])  # U, W
    zeta, sigma2 = 2.0, 1e-6

    def noisy(theta, e):
        gap = theta - flat
        return example_loss(unravel(theta), e) + zeta * gap @ hessian @ gap / 2

    @jax.jit
    def balance(s):
        return symmetry.charge_drift(
            lambda t: t @ (signs * t) / 2, noisy, flat + s * direction, (x, y), noise_scale=sigma2
        )

    rows = jax.vmap(lambda *e: jax.grad(noisy)(flat, e))(jnp.asarray(x), jnp.asarray(y))
    predicted = theory.approximate_symmetry_displacement(
        flat, np.diag(signs), np.cov(rows.T, bias=True), hessian, direction,
        noise_scale=sigma2, strength=zeta,
    )  # fmt: skip
    size = abs(balance(2 * predicted))
    at_most("drift at the displacement", abs(balance(predicted)) / size, 1e-3)
    at_least("drift at the minimiser", abs(balance(0.0)) / size, 0.9)
