"""Where SGD and gradient descent in steps of finite length rest [Ziyin2024, Theorem D.1]."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from checks import at_least, at_most, central_difference, close, refused
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

ETA = 0.1


def equilibrium(one, point=POINT, data=DATA, **options):
    return symmetry.noise_equilibrium(
        one, example_loss, point, data, **({"learning_rate": ETA} | options)
    )


def mean_change(parameter, batch_size, replacement, decay):
    """E[C₁] − C₀ from e^{λA}θ: every batch, every step taken, C by a dense matrix."""
    matrix, point = MATRICES["rotation"], SYMMETRIES["rotation"].act(POINT, parameter)
    draw = itertools.product if replacement else itertools.combinations
    chosen = draw(range(NUM_EXAMPLES), **{"repeat": batch_size}) if replacement else draw(
        range(NUM_EXAMPLES), batch_size
    )  # fmt: skip
    rows, theta = np.asarray(gradients(point)), flat(point)
    charge = lambda x: np.einsum("...i,ij,...j->...", x, matrix, x) / 2
    steps = np.array([rows[list(batch)].mean(axis=0) for batch in chosen]) + 2 * decay * theta
    return np.mean(charge(theta - ETA * steps)) - charge(theta)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("batch_size", "replacement"), [(1, False), (2, False), (2, True), (None, False)]
)
def test_the_mean_step_over_all_batches_keeps_the_charge_there(batch_size, replacement, decay):
    """E[C₁] = C₀ at λ*, above before it and below behind it; not at the roots of mutants."""
    one, size = SYMMETRIES["rotation"], batch_size or NUM_EXAMPLES
    star = float(
        equilibrium(one, batch_size=batch_size, replacement=replacement, weight_decay=decay)
    )
    at = lambda parameter: mean_change(parameter, size, replacement, decay)
    before, here, behind = at(star - 0.1), at(star), at(star + 0.1)
    at_most("E[C₁] − C₀ at λ*", abs(here) / abs(before), 1e-9)
    assert before > 0 > behind, (before, behind)
    limit = symmetry.noise_equilibrium(
        one, example_loss, POINT, DATA, noise_scale=ETA / (2 * size), weight_decay=decay
    )
    at_least("without ∇LᵀA∇L", abs(at(float(limit))) / abs(before), 1e-5)
    if size > 1:  # for one example f is 1
        other = equilibrium(one, batch_size=size, replacement=not replacement, weight_decay=decay)
        at_least("the other f", abs(at(float(other))) / abs(before), 1e-5)
    if decay:
        full = (1 - (1 - 4 * ETA * decay) ** 0.5) / (2 * ETA)  # −4γC in place of −4γ(1 − ηγ)C
        other = equilibrium(one, batch_size=size, replacement=replacement, weight_decay=full)
        at_least("4γ", abs(at(float(other))) / abs(before), 1e-5)


def test_a_rescaling_in_closed_form():
    """e^{4λ*} = (f·trΣ_U/S + |∇_U L|²)/(f·trΣ_W/S + |∇_W L|²): from the limit of small learning
    rates over S = 1 and S = 2 to gradient descent λ* moves one way."""
    sigma, mean = np.diag(covariance(POINT)), np.asarray(gradients(POINT)).mean(axis=0)
    one, found = SYMMETRIES["weights"], []
    for size in (1, 2, 6):
        f = (NUM_EXAMPLES - size) / (NUM_EXAMPLES - 1)
        squares = f / size * sigma + mean**2
        found.append(float(equilibrium(one, batch_size=size)))
        close("λ*", found[-1], np.log(squares[:6].sum() / squares[6:].sum()) / 4, 1e-11)
    limit = float(symmetry.noise_equilibrium(one, example_loss, POINT, DATA, noise_scale=ETA))
    moves = np.diff([limit, *found])
    assert np.all(moves > 0) or np.all(moves < 0), moves
    close("any learning rate", equilibrium(one, learning_rate=3.0, batch_size=2), found[1], 1e-12)
    small = equilibrium(one, learning_rate=1e-3, batch_size=2, weight_decay=0.01)
    apart = equilibrium(one, learning_rate=1e-1, batch_size=2, weight_decay=0.01)
    at_least("with decay it matters", abs(small - apart), 1e-3)


def test_a_rescaling_of_six_examples():
    """λ* = 0.353 in the limit of small learning rates, 0.387, 0.413 and 0.482 for S = 1, 2, 6."""
    rng = np.random.default_rng(0)
    u, w, x, y = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3), (3, 2), (6, 2), (6, 2)))
    find = lambda **options: float(
        symmetry.noise_equilibrium(
            SYMMETRIES["weights"], example_loss, {"U": u, "W": w}, (x, y), **options
        )
    )
    found = [find(noise_scale=1.0), *(find(learning_rate=ETA, batch_size=s) for s in (1, 2, 6))]
    at_most("to three digits", np.max(np.abs(np.array(found) - [0.353, 0.387, 0.413, 0.482])), 5e-4)
    close("gradient descent", find(learning_rate=ETA), found[-1], 1e-12)


def test_one_equilibrium_on_every_orbit():
    """Theorem D.1: the mean change of C falls along e^{λA}θ and vanishes at λ*, wherever on the
    orbit one starts; for a generator that is a function too."""
    grid = jnp.linspace(-1.0, 1.0, 9)
    options = {"learning_rate": ETA, "batch_size": 2, "weight_decay": 0.3}

    @jax.jit
    @jax.vmap
    def problem(seed):
        point, data, one = point_of(seed), data_of(seed + 100), rotation_of(matrix_of(seed + 200))
        drift = lambda p: symmetry.discrete_noether_drift(one, example_loss, p, data, **options)
        slopes = jax.vmap(lambda s: drift(one.act(point, s)))(grid)
        starts = jnp.array([0.0, 0.3])
        star, again = jax.vmap(lambda s: equilibrium(one, one.act(point, s), data, **options))(
            starts
        )
        return slopes, drift(one.act(point, star)), star - again

    slopes, left, shift = problem(jnp.arange(12))
    assert np.all(np.diff(slopes, axis=1) < 0), "E[C₁] − C₀ must fall along every orbit"
    at_most("at λ*", np.max(np.abs(left) / np.max(np.abs(slopes), axis=1)), 1e-10)
    at_most("λ* from 0.3 further along", np.max(np.abs(shift - 0.3)), 1e-9)
    by_sweeps = equilibrium(SYMMETRIES["function"], **options)
    close("a function", by_sweeps, equilibrium(SYMMETRIES["rotation"], **options), 1e-9)


def test_derivatives_of_the_discrete_equilibrium():
    """In the point and η, against differences."""
    rebuild = jax.flatten_util.ravel_pytree(POINT)[1]

    @jax.jit
    def found(vector):
        return equilibrium(
            SYMMETRIES["rotation"], rebuild(vector[:-1]), batch_size=2, weight_decay=0.3,
            learning_rate=ETA * (1 + vector[-1]), throw=False,
        )  # fmt: skip

    start = jnp.append(flat(POINT), 0.0)
    direction = jr.normal(jr.key(4), start.shape)
    finite = central_difference(lambda t: found(start + t * direction), 1e-3)
    close("vjp", jax.grad(found)(start) @ direction, finite, 1e-6)


def test_descent_at_a_minimum_rests_anywhere():
    """∇L = 0 but for rounding: without decay every point of the orbit is an equilibrium."""
    inputs, noise = DATA
    noise = noise - inputs @ jnp.linalg.lstsq(inputs, noise)[0]
    data = inputs, inputs @ (POINT["U"] @ POINT["W"]).T + noise
    assert equilibrium(SYMMETRIES["weights"], data=data) == 0.0
    decayed = equilibrium(SYMMETRIES["weights"], data=data, weight_decay=0.1)
    u, w = (float(jnp.sum(leaf**2)) for leaf in (POINT["U"], POINT["W"]))
    close("decay alone: the norms are equal", decayed, np.log(w / u) / 4, 1e-11)
    one_step = equilibrium(SYMMETRIES["weights"], data=data, batch_size=1)
    limit = symmetry.noise_equilibrium(
        SYMMETRIES["weights"], example_loss, POINT, data, noise_scale=1.0
    )
    close("with noise alone", one_step, limit, 1e-9)


def spreads(point, data):
    """tr Σ_U, tr Σ_W, |∇_U L|², |∇_W L|²."""
    rows, cut = gradients(point, data), point["U"].size
    mean, variance = jnp.mean(rows, axis=0), jnp.var(rows, axis=0)
    parts = [variance[:cut], variance[cut:], mean[:cut] ** 2, mean[cut:] ** 2]
    return jnp.stack([jnp.sum(part) for part in parts])


def stepped(point, data, eta):
    return jax.tree.map(
        lambda x, g: x - eta * g,
        point,
        jax.grad(lambda p: jnp.mean(jax.vmap(lambda e: example_loss(p, e))(data)))(point),
    )


def test_sgd_ends_there():
    """Long runs, three of six examples a step: at the end λ* is 0 in the mean, that of the limit
    of small learning rates and that without f are not."""
    eta, size, seeds, num_steps = 0.2, 3, 64, 3000
    start = {"U": 0.3 * POINT["U"], "W": POINT["W"]}

    @jax.jit
    @jax.vmap
    def run(key):
        def step(point, key):
            batch = jr.permutation(key, NUM_EXAMPLES)[:size]
            there = stepped(point, tuple(leaf[batch] for leaf in DATA), eta)
            return there, spreads(point, DATA)

        end, seen = jax.lax.scan(step, start, jr.split(key, num_steps))
        star = equilibrium(SYMMETRIES["weights"], end, learning_rate=eta, batch_size=size)
        return jnp.mean(seen[1000:], axis=0), star

    means, stars = map(np.asarray, run(jr.split(jr.key(0), seeds)))
    root = lambda share: np.log(
        (share * means[:, 0] + means[:, 2]) / (share * means[:, 1] + means[:, 3])
    ) / 4  # fmt: skip
    error = lambda values: values.std(ddof=1) / np.sqrt(seeds)
    f = (NUM_EXAMPLES - size) / (NUM_EXAMPLES - 1)
    found, limit, no_f = root(f / size), root(1e9), root(1 / size)
    at_least(
        "|λ*| at the start",
        abs(equilibrium(SYMMETRIES["weights"], start, learning_rate=eta, batch_size=size)),
        0.2,
    )
    at_most("|λ*| of the late means", abs(found.mean()), 4 * error(found))
    at_most("λ* at the end", abs(stars.mean()), 4 * error(stars) + 2e-3)
    at_least("of the limit, over its error", abs(limit.mean()) / error(limit), 6)
    at_least("without f, over its error", abs((no_f - found).mean()) / error(no_f - found), 6)


def test_descent_beyond_its_edge_ends_there():
    """η‖∇²L‖ > 2 at every minimum keeps ∇L alive, and the charge falls to the λ* of descent,
    which is far from that of the noise, by exactly 1 − η²E|∂L/∂(ab)|² a step."""
    inputs = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    noise = jnp.array([[1.0, 0.2], [1.0, 0.2], [-0.4, 0.7], [-0.4, 0.7]])
    data = inputs, inputs @ jnp.array([[1.0, 0.0], [0.0, 0.0]]) + noise
    start = {"U": jnp.array([[1.3], [0.0]]), "W": jnp.array([[0.7, 0.0]])}
    eta, one = 1.1, symmetry.rescaling(start, first, second)
    charge = lambda point: symmetry.noether_charge(one, point)

    def step(point, _):
        slope = point["U"][0, 0] * point["W"][0, 0] - 1
        return stepped(point, data, eta), (slope, charge(point), spreads(point, data)[2:])

    end, (slopes, charges, squares) = jax.jit(
        lambda point: jax.lax.scan(step, point, None, length=400)
    )(start)
    at_least("∇L at the end", np.min(squares[-4:]), 0.01)
    close("C", charges[1:], charges[:-1] * (1 - (eta * slopes[:-1]) ** 2), 1e-12)
    at_most("C at the end", abs(charges[-1]) / abs(charges[0]), 1e-9)
    at_least("|λ*| at the start", abs(equilibrium(one, start, data, learning_rate=eta)), 0.1)
    at_most("|λ*| at the end", abs(equilibrium(one, end, data, learning_rate=eta)), 1e-8)
    noisy = symmetry.noise_equilibrium(one, example_loss, end, data, noise_scale=eta)
    at_least("|λ*| of the noise at the end", abs(noisy), 0.1)


def test_what_holds_no_charge_is_refused():
    """For γ < 0, and from ηγ = 1 on, decay makes charges grow: Theorem D.1 allows any γ."""
    one, grid = SYMMETRIES["rotation"], np.linspace(-1, 1, 9)
    for decay, falls in ((0.3, True), (-6.0, False), (30.0, False)):
        slopes = [mean_change(s, 2, False, decay) for s in grid]
        assert np.all(np.diff(slopes) < 0) == falls, (decay, slopes)
    with refused(ValueError, "1 − learning_rate·weight_decay must be positive", "Lower one"):
        equilibrium(one, weight_decay=10.0)
    with refused(ValueError, "got neither", "learning_rate"):
        symmetry.noise_equilibrium(one, example_loss, POINT, DATA)
    with refused(ValueError, "got both"):
        equilibrium(one, noise_scale=0.1)
    with refused(ValueError, "batch_size and replacement go with learning_rate"):
        equilibrium(one, noise_scale=0.1, learning_rate=None, batch_size=2)
    with refused(ValueError, "batch_size=7 exceeds the 6 examples", "replacement=True"):
        equilibrium(one, batch_size=7)
    with refused(ValueError, "learning_rate must be finite"):
        equilibrium(one, learning_rate=-1.0)
