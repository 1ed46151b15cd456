"""Symmetries and noise equilibria: the theorems of [Ziyin2024], and what their print lacks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, refused
from manifoldflow import symmetry
from symmetric_problems import (
    covariance,
    DATA,
    data_of,
    example_loss,
    first,
    flat,
    gradients,
    MATRICES,
    matrix_of,
    NUM_EXAMPLES,
    POINT,
    point_of,
    rotation_of,
    second,
    SYMMETRIES,
)

SIGMA2, DECAY = 0.05, 0.3
NAMES = list(SYMMETRIES)


def drift(one, point, decay=0.0, data=DATA):
    return symmetry.noether_drift(
        one, example_loss, point, data, noise_scale=SIGMA2, weight_decay=decay
    )


def charge_drift(charge, point, decay=0.0, loss=example_loss, sigma2=SIGMA2):
    return symmetry.charge_drift(charge, loss, point, DATA, noise_scale=sigma2, weight_decay=decay)


def equilibrium(one, point, decay=0.0, data=DATA):
    return symmetry.noise_equilibrium(
        one, example_loss, point, data, noise_scale=SIGMA2, weight_decay=decay
    )


def mean_loss(point, data=DATA):
    return jnp.mean(jax.vmap(lambda example: example_loss(point, example))(data))


# --- The charge and its drift ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_charge_and_its_drift_by_dense_matrices(name):
    theta, matrix, one = flat(POINT), MATRICES[name], SYMMETRIES[name]
    charge = theta @ matrix @ theta / 2
    close("C", symmetry.noether_charge(one, POINT), charge, 1e-13)
    expected = SIGMA2 * np.trace(covariance(POINT) @ matrix) - 4 * DECAY * charge
    close("G", drift(one, POINT, DECAY), expected, 1e-12)
    of_point = lambda point: symmetry.noether_charge(one, point)
    close("as any charge", charge_drift(of_point, POINT, DECAY), expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_covariance_along_an_orbit(name):
    """Σ(e^{λA}θ) = e^{−λA}Σ(θ)e^{−λA} [Lemma B.1], and so the drift there."""
    values, vectors = np.linalg.eigh(MATRICES[name])
    moved = SYMMETRIES[name].act(POINT, 0.7)
    inverse = vectors @ np.diag(np.exp(-0.7 * values)) @ vectors.T
    close("e^{λA}θ", flat(moved), np.linalg.solve(inverse, flat(POINT)), 1e-11)
    close("Σ", covariance(moved), inverse @ covariance(POINT) @ inverse, 1e-10)
    close("loss", mean_loss(moved), mean_loss(POINT), 1e-11)


@jax.jit
def sgd(key, eta, decay):
    """The charges of a run, their kicks ½η²gᵀAg, and the points."""
    inputs, targets = DATA
    matrix = jnp.asarray(MATRICES["rotation"])

    def step(point, key):
        batch = jr.choice(key, NUM_EXAMPLES, (2,), replace=False)
        gradient = jax.grad(mean_loss)(point, (inputs[batch], targets[batch]))
        g = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
        moved = jax.tree.map(lambda x, g: x - eta * (g + 2 * decay * x), point, gradient)
        charge = symmetry.noether_charge(SYMMETRIES["rotation"], point)
        return moved, (charge, eta**2 / 2 * g @ matrix @ g, point)

    return jax.lax.scan(step, POINT, jr.split(key, 60))[1]


def test_sgd_changes_the_charge_by_an_exact_law():
    """C_{k+1} = (1 − 2ηγ)²C_k + ½η²gᵀAg, step by step, with and without decay."""
    for decay in (0.0, 0.3):
        charges, kicks, _ = sgd(jr.key(3), 0.02, decay)
        expected = (1 - 2 * 0.02 * decay) ** 2 * charges[:-1] + kicks[:-1]
        at_least("motion", np.ptp(charges), 1e-2)
        at_most(f"error, γ = {decay}", np.max(np.abs(charges[1:] - expected)), 1e-14)


def test_gradient_flow_conserves_charges():
    loss = mf.LeastSquares(*DATA, predict=lambda p, x: p["U"] @ (p["W"] @ x))
    observe = {name: lambda p, s=s: symmetry.noether_charge(s, p) for name, s in SYMMETRIES.items()}
    flow = mf.solve(mf.GradientFlow(loss), POINT, end_time=5.0, num_saves=4, observe=observe)
    at_least("fall of the loss", loss(POINT) - loss(flow.final), 0.1)
    for name, charges in flow.observables.items():
        at_most(f"change of C, {name}", np.ptp(charges), 1e-5)


def every_batch(point, batch_size, replacement, eta, matrix):
    """E[C₁] − C₀ as the mean over all batches."""
    draw = itertools.product if replacement else itertools.combinations
    chosen = draw(range(NUM_EXAMPLES), **{"repeat": batch_size}) if replacement else draw(
        range(NUM_EXAMPLES), batch_size
    )  # fmt: skip
    rows = np.asarray(gradients(point))
    means = np.array([rows[list(batch)].mean(axis=0) for batch in chosen])
    return eta**2 / 2 * np.mean(np.einsum("ni,ij,nj->n", means, matrix, means))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_the_mean_of_one_step_over_all_batches(batch_size, replacement):
    if replacement and batch_size == 6:
        batch_size = 4  # 6⁴ batches are enough
    eta, matrix, one = 0.1, MATRICES["rotation"], SYMMETRIES["rotation"]
    expected = every_batch(POINT, batch_size, replacement, eta, matrix)
    options = dict(learning_rate=eta, batch_size=batch_size, replacement=replacement)
    found = symmetry.discrete_noether_drift(one, example_loss, POINT, DATA, **options)
    close("E[C₁] − C₀", found, expected, 1e-11)
    # Centred: the second moment in place of Σ counts the mean gradient twice.
    rows, mean = np.asarray(gradients(POINT)), np.asarray(gradients(POINT)).mean(axis=0)
    finite = 1.0 if replacement else (NUM_EXAMPLES - batch_size) / (NUM_EXAMPLES - 1)
    raw = finite / batch_size * np.einsum("ni,ij,nj->", rows, matrix, rows) / NUM_EXAMPLES
    uncentred = eta**2 / 2 * (raw + mean @ matrix @ mean)
    if finite > 0:
        at_least("uncentred", abs(uncentred - expected) / abs(expected), 0.01)
    if not replacement and batch_size == 2:
        forgotten = symmetry.discrete_noether_drift(
            one, example_loss, POINT, DATA, **(options | {"replacement": True})
        )
        at_least("without (N − S)/(N − 1)", abs(forgotten - expected) / abs(expected), 0.01)


def test_the_drift_is_what_ensembles_of_sgd_do():
    """E[C_K − C₀] = Σ E G(θ_k)η within four standard errors, but for ½η²Σ∇LᵀA∇L."""
    eta, one, matrix = 0.01, SYMMETRIES["rotation"], MATRICES["rotation"]
    # Two of six examples without replacement: S is 2·5/4.
    sigma2 = eta / (2 * 2) * (6 - 2) / (6 - 1)

    @jax.jit
    def run(key):
        charges, _, points = sgd(key, eta, DECAY)

        def rates(point):
            g = symmetry.noether_drift(
                one, example_loss, point, DATA, noise_scale=sigma2, weight_decay=DECAY
            )
            mean = jnp.mean(gradients(point), axis=0)
            exact = symmetry.discrete_noether_drift(
                one, example_loss, point, DATA,
                learning_rate=eta, batch_size=2, weight_decay=DECAY,
            )  # fmt: skip
            smooth = eta**2 / 2 * mean @ matrix @ mean
            bend = 4 * (eta * DECAY) ** 2 * symmetry.noether_charge(one, point)
            return jnp.stack([eta * g, exact, smooth + bend])

        sums = jnp.sum(jax.vmap(rates)(jax.tree.map(lambda leaf: leaf[:-1], points)), axis=0)
        return charges[-1] - charges[0], *sums

    change, diffusive, exact, bias = (
        np.asarray(x) for x in jax.vmap(run)(jr.split(jr.key(5), 300))
    )
    for name, foreseen in (("exact", exact), ("diffusion, but for its bias", diffusive + bias)):
        error = (change - foreseen).std() / np.sqrt(len(change))
        at_most(f"{name}: mean", abs(np.mean(change - foreseen)), 4 * error)
        at_least("the change, against what is allowed", abs(np.mean(change)), 20 * error)


# --- Theorem 4.3 -------------------------------------------------------------------------------


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def along_orbits(seed, decay):
    """Slopes and charges along an orbit, and what is to vanish at its equilibrium."""
    point, data, one = point_of(seed), data_of(seed + 100), rotation_of(matrix_of(seed + 200))
    along = jax.vmap(lambda s: one.act(point, s))(jnp.linspace(-1.0, 1.0, 11))
    slopes = jax.vmap(lambda p: drift(one, p, decay, data))(along)
    charges = jax.vmap(lambda p: symmetry.noether_charge(one, p))(along)
    star = equilibrium(one, point, decay, data)
    again = equilibrium(one, one.act(point, 0.3), decay, data)
    there = one.act(point, star)
    potential = lambda p: (
        decay * jnp.sum(jax.flatten_util.ravel_pytree(p)[0] ** 2)
        + (SIGMA2 / 2 * jnp.sum(jnp.var(gradients(p, data), axis=0)))
    )
    beside = [potential(one.act(point, star + s)) for s in (-0.1, 0.1)]
    low = jnp.min(jnp.stack(beside)) - potential(there)
    return slopes, charges, drift(one, there, decay, data), star - again, low


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_one_equilibrium_on_every_orbit(decay):
    """G(θ_λ) falls, C(θ_λ) grows; G vanishes at λ*, wherever on the orbit one starts."""
    slopes, charges, left, shift, low = along_orbits(jnp.arange(12), decay)
    assert np.all(np.diff(slopes, axis=1) < 0), "G must fall along every orbit"
    assert np.all(np.diff(charges, axis=1) > 0), "C must grow along every orbit"
    size = np.max(np.abs(slopes), axis=1)
    at_most("G at λ*", np.max(np.abs(left) / size), 1e-10)
    at_most("λ* from 0.3 further along", np.max(np.abs(shift - 0.3)), 1e-9)
    at_least("noise and decay beside λ* less those at λ*", np.min(low), 1e-6)


def test_equilibria_at_infinity():
    norm = symmetry.scaling(POINT)
    normalised = lambda p, e: example_loss(
        jax.tree.map(lambda x: x / jnp.sqrt(sum(jnp.sum(y**2) for y in p.values())), p), e
    )
    assert mf.symmetry.check_symmetry(norm, normalised, POINT, DATA)
    found = lambda one, point, decay=0.0, data=DATA, loss=normalised: symmetry.noise_equilibrium(
        one, loss, point, data, noise_scale=SIGMA2, weight_decay=decay
    )
    assert found(norm, POINT) == jnp.inf  # the norm grows for ever
    shrinking = symmetry.ExponentialSymmetry({"U": -1.0, "W": -1.0})
    assert found(shrinking, POINT) == -jnp.inf
    assert np.isfinite(found(norm, POINT, DECAY))
    single = jax.tree.map(lambda leaf: leaf[:1], DATA)  # no noise: decay alone
    assert found(norm, POINT, DECAY, single) == -jnp.inf
    assert found(norm, POINT, 0.0, single) == 0.0  # nothing acts: every point is one
    # Of a rescaling: noise on one side only, where the other layer is zero.
    one_sided = {"U": jnp.zeros_like(POINT["U"]), "W": POINT["W"]}
    rescaling = symmetry.rescaling(POINT, first, second)
    assert found(rescaling, one_sided, loss=example_loss) == jnp.inf
    # Residuals orthogonal to the columns of U, but for rounding.
    column, across = jnp.array([0.3, 0.7]), jnp.array([0.7, -0.3])
    thin = {"U": jnp.outer(column, POINT["U"][0]), "W": POINT["W"]}
    x = DATA[0]
    noisy = x @ (thin["U"] @ thin["W"]).T + jnp.outer(DATA[1][:, 0], across)
    assert found(rescaling, thin, loss=example_loss, data=(x, noisy)) == jnp.inf
    # A start far from a balance that exists is no such thing.
    near, far = POINT, {"U": 3e8 * POINT["U"], "W": POINT["W"] / 3e8}
    ends = [found(rescaling, point, loss=example_loss) for point in (near, far)]
    close("λ* from afar", ends[1] + np.log(3e8), ends[0], 1e-12)


def test_rescaling_in_closed_form():
    """Of A = diag(I, −I): e^{4λ*} = tr Σ_U/tr Σ_W without decay."""
    sigma = np.diag(covariance(POINT))
    expected = np.log(sigma[:6].sum() / sigma[6:].sum()) / 4
    close("λ*", equilibrium(SYMMETRIES["weights"], POINT), expected, 1e-11)


def test_several_symmetries_at_once():
    """One for each neuron, as rotations by sweeps over the data, as weights by one pass."""
    basis = jnp.eye(3)
    rotations = [rotation_of(jnp.diag(b)) for b in basis]
    weights = [symmetry.ExponentialSymmetry({"U": b, "W": -b[:, None]}) for b in basis]
    found = equilibrium(rotations, POINT, DECAY)
    close("λ* by weights", equilibrium(weights, POINT, DECAY), found, 1e-9)
    there = symmetry.act_together(rotations, POINT, found)
    at_most("all drifts", np.max(np.abs(drift(weights, there, DECAY))), 1e-9)


def test_two_layers_are_balanced_for_all_rotations():
    """WΓ_WWᵀ = UᵀΓ_UU at a global minimum, where the drifts of all symmetric B vanish.

    Γ_W = 2σ²E[|r|²xxᵀ] + γI and Γ_U = 2σ²E[|x|²rrᵀ] + γI; (13) prints no σ², and 2γ. The B
    do not commute: only the flow leads there.
    """
    inputs, noise = DATA
    noise = noise - inputs @ jnp.linalg.lstsq(inputs, noise)[0]  # so that ∇L = 0
    data = inputs, inputs @ (POINT["U"] @ POINT["W"]).T + noise
    at_most("∇L", np.max(np.abs(jnp.mean(gradients(POINT, data), axis=0))), 1e-13)
    units = [jnp.eye(3)[jnp.array([i, j])] for i in range(3) for j in range(i + 1)]
    many = [rotation_of(jnp.outer(a, b) + jnp.outer(b, a)) for a, b in units]

    @jax.jit
    def imbalance(point, sigma2=SIGMA2, decay=DECAY):
        weights = 2 * sigma2 / len(inputs)
        residuals = inputs @ (point["U"] @ point["W"]).T - data[1]
        squares = [jnp.sum(a**2, axis=1, keepdims=True) for a in (residuals, inputs)]
        gamma_w = weights * (inputs * squares[0]).T @ inputs + decay * jnp.eye(2)
        gamma_u = weights * (residuals * squares[1]).T @ residuals + decay * jnp.eye(2)
        sides = point["W"] @ gamma_w @ point["W"].T, point["U"].T @ gamma_u @ point["U"]
        return jnp.linalg.norm(sides[0] - sides[1]) / jnp.linalg.norm(sides[0])

    at_least("imbalance at the start", imbalance(POINT), 0.3)
    flow = mf.NoetherFlow(many, example_loss, data, noise_scale=SIGMA2, weight_decay=DECAY)
    end = mf.solve(flow, POINT, end_time=10.0, rtol=1e-8, atol=1e-10).final
    at_most("imbalance at the end", imbalance(end), 1e-6)
    at_least("as printed", imbalance(end, 0.5, 2 * DECAY), 1e-3)
    close("loss", mean_loss(end, data), mean_loss(POINT, data), 1e-7)


# --- The Noether flow --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "function"])
def test_the_flow_moves_the_charge_at_its_drift_to_the_equilibrium(name):
    one = SYMMETRIES[name]
    flow = mf.NoetherFlow(one, example_loss, DATA, noise_scale=SIGMA2, weight_decay=DECAY)
    charge = lambda p: symmetry.noether_charge(one, p)
    rate = jax.jvp(charge, (POINT,), (flow.drift(POINT),))[1]
    close("dC/dt", rate, drift(one, POINT, DECAY), 1e-12)
    noise = symmetry.SGDNoise(example_loss, DATA, noise_scale=SIGMA2, weight_decay=DECAY)
    velocity, along = symmetry.orbit_velocity(one, noise, POINT), one.velocity(POINT)
    square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(along))
    expected = jax.tree.map(lambda leaf: rate / square * leaf, along)
    close("Aθ·G/|Aθ|²", velocity, expected, 1e-12)
    # Where C has come to rest, only the errors of the steps move it.
    walk = mf.solve(
        flow, POINT, end_time=5.0, num_saves=5, rtol=1e-8, atol=1e-10,
        observe={"C": charge, "L": mean_loss},
    )  # fmt: skip
    losses, charges = walk.observables["L"], walk.observables["C"]
    at_most("change of the loss", np.ptp(losses) / losses[0], 1e-5)
    assert np.all(np.diff(charges) * np.sign(rate) > -1e-5), "C goes one way"
    there = one.act(POINT, equilibrium(one, POINT, DECAY))
    close("end", walk.final, there, 1e-5)


def test_the_flow_keeps_to_a_manifold_that_holds_the_orbit():
    """Steps of low accuracy leave the predictions where they were, and end at λ* all the same."""
    few = jax.tree.map(lambda leaf: leaf[:2], DATA)
    predict = lambda p, x: p["U"] @ (p["W"] @ x)
    predictions = jax.vmap(lambda x: predict(POINT, x))(few[0])
    manifold = mf.ZeroLossManifold(mf.LeastSquares(few[0], predictions, predict=predict))
    one, options = SYMMETRIES["weights"], {"noise_scale": SIGMA2, "weight_decay": DECAY}

    def ended(manifold):
        flow = mf.NoetherFlow(one, example_loss, DATA, manifold=manifold, **options)
        end = mf.solve(flow, POINT, end_time=5.0, rtol=3e-3, atol=1e-4).final
        return end, np.max(np.abs(jax.vmap(lambda x: predict(end, x))(few[0]) - predictions))

    kept, gap = ended(manifold)
    at_most("predictions", gap, 1e-10)
    at_least("without it", ended(None)[1], 1e-6)
    close("end", kept, one.act(POINT, equilibrium(one, POINT, DECAY)), 2e-2)
    with refused(ValueError, "manifold must be one that holds the orbit", wrong_type=True):
        mf.NoetherFlow(one, example_loss, DATA, manifold=jnp.arange(2), **options)


def test_a_fixed_point_of_a_symmetry_stays():
    zero = jax.tree.map(jnp.zeros_like, POINT)
    flow = mf.NoetherFlow(SYMMETRIES["weights"], example_loss, DATA, noise_scale=SIGMA2)
    assert all(np.all(leaf == 0) for leaf in flow.drift(zero).values())
