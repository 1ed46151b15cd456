"""Formulas of [Ziyin2024] as they are printed, beside those that hold."""

import jax
import jax.numpy as jnp
import numpy as np

from checks import at_least, at_most, close
from manifoldflow import symmetry
from symmetric_problems import (
    covariance,
    DATA,
    dense_generator,
    example_loss,
    flat,
    gradients,
    MATRICES,
    matrix_of,
    POINT,
    point_of,
    rotation_of,
    SYMMETRIES,
)

SIGMA2, DECAY = 0.05, 0.3
ONE, A = SYMMETRIES["rotation"], MATRICES["rotation"]
TRACE = np.trace(covariance(POINT) @ A)
THETA = flat(POINT)


def drift_of(charge, *, decay=0.0, loss=example_loss, sigma2=SIGMA2, point=POINT):
    """dC/dt by Itô's formula with derivatives of C by autodiff."""
    return float(
        symmetry.charge_drift(charge, loss, point, DATA, noise_scale=sigma2, weight_decay=decay)
    )


def norm_squared(point):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(point))


def differs(what, value, printed):
    at_least(f"{what}: distance from what is printed", abs(value - printed) / abs(value), 0.1)


def test_the_charge_has_a_half():
    """(6) prints θᵀAθ, for which (7) does not hold."""
    half = lambda p: symmetry.noether_charge(ONE, p)
    whole = lambda p: 2 * symmetry.noether_charge(ONE, p)
    right_hand_side = lambda charge: -4 * DECAY * float(charge(POINT)) + SIGMA2 * TRACE
    close("½θᵀAθ", drift_of(half, decay=DECAY), right_hand_side(half), 1e-11)
    differs("θᵀAθ", drift_of(whole, decay=DECAY), right_hand_side(whole))
    gradient = jax.grad(half)(POINT)
    close("∇C = Aθ", flat(gradient), A @ THETA, 1e-12)


def test_the_norm_grows_twice_as_fast_and_decays_four_times():
    """(24) prints −γ‖θ‖² + σ²trΣ for a loss that only knows directions."""
    on_sphere = lambda p, e: example_loss(
        jax.tree.map(lambda x: x / jnp.sqrt(norm_squared(p)), p), e
    )
    flat_loss = lambda x, e: on_sphere({"U": x[:6].reshape(2, 3), "W": x[6:].reshape(3, 2)}, e)
    rows = jax.vmap(lambda e: jax.grad(flat_loss)(jnp.asarray(THETA), e))(DATA)
    trace, size = float(jnp.sum(jnp.var(rows, axis=0))), float(THETA @ THETA)
    found = drift_of(norm_squared, decay=0.003, loss=on_sphere)
    close("d‖θ‖²/dt", found, -4 * 0.003 * size + 2 * SIGMA2 * trace, 1e-11)
    differs("(24)", found, -0.003 * size + SIGMA2 * trace)


def test_the_noise_counts_in_full():
    """(31) prints σ²/2, against the mean of one step of SGD over all examples (S = 1)."""
    eta = 1e-3
    rows = np.asarray(gradients(POINT))
    mean = rows.mean(axis=0)
    steps = np.array([(THETA - eta * g) @ A @ (THETA - eta * g) / 2 for g in rows])
    smooth = eta / 2 * mean @ A @ mean  # what gradient descent does, not noise
    found = (steps.mean() - THETA @ A @ THETA / 2) / eta - smooth
    close("σ² tr(ΣA)", found, eta / 2 * TRACE, 1e-6)
    differs("(31)", found, eta / 4 * TRACE)


def test_the_condition_of_an_equilibrium():
    """§4.3 prints −γC + η tr(ΣA) = 0; it is 4γC = σ² tr(ΣA), (9)."""
    star = symmetry.noise_equilibrium(
        ONE, example_loss, POINT, DATA, noise_scale=SIGMA2, weight_decay=DECAY
    )
    there = ONE.act(POINT, star)
    noise = SIGMA2 * np.trace(covariance(there) @ A)
    decay = 4 * DECAY * float(symmetry.noether_charge(ONE, there))
    close("4γC", decay, noise, 1e-9)
    batch = 1
    printed = 2 * batch * noise  # η tr(ΣA), with η = 2Sσ²
    differs("γC", decay / 4, printed)
    differs("γC, in charges without the half", decay / 2, printed)


@jax.jit
@jax.vmap
def far_from_equilibrium(seed):
    """Random problems without decay, an orbit's parameter 1 and more away from λ*: θ, θ*,
    |A| on its positive and negative parts squared, λ*, tr(Σ*A₊²), the drift at θ, C and C*."""
    matrix = matrix_of(seed + 300)
    one, start = rotation_of(matrix), point_of(seed + 400)
    find = lambda p: symmetry.noise_equilibrium(one, example_loss, p, DATA, noise_scale=SIGMA2)
    point = one.act(start, find(start) - 1.0)
    star = find(point)
    there = one.act(point, star)
    values, vectors = jnp.linalg.eigh(dense_generator(matrix))
    parts = [(vectors * jnp.where(s * values > 0, values**2, 0)) @ vectors.T for s in (1, -1)]
    rows = gradients(there)
    spread = jnp.einsum("ni,ij,nj->", rows - rows.mean(0), parts[0], rows) / len(rows)
    drift = symmetry.noether_drift(one, example_loss, point, DATA, noise_scale=SIGMA2)
    charges = [symmetry.noether_charge(one, p) for p in (point, there)]
    ends = [jax.flatten_util.ravel_pytree(p)[0] for p in (point, there)]
    size = lambda x, part: x @ part @ x
    return (
        star, drift, *charges, spread, size(ends[1], parts[0]), size(ends[0], parts[1])
    )  # fmt: skip


def test_the_rate_of_approach():
    """Lemma B.3 and Corollary B.4 forget the part of A of the other sign."""
    found = far_from_equilibrium(jnp.arange(40))
    star, drift, here, there, spread, growing, shrinking = map(np.asarray, found)
    at_most("λ* − 1", np.max(np.abs(star - 1)), 1e-9)
    noise, slack = SIGMA2 * spread, 1 + 1e-9
    at_least("Ċ/λ* over its bound, Lemma B.2", np.min(drift / star / (2 * noise)), 1 / slack)
    at_most("(C* − C)/λ*", np.max((there - here) / star / (growing + shrinking)), slack)
    rate = drift / (there - here)
    at_least("the rate over its bound", np.min(rate / (2 * noise / (growing + shrinking))), 1)
    # As printed, where C is θᵀAθ: 2(C* − C) ≤ 2λ*θ*ᵀA₊²θ*.
    at_least("Lemma B.3, broken cases of 40", np.sum(there - here > star * growing), 4)
    at_least("Corollary B.4, broken cases of 40", np.sum(rate < noise / growing), 1)


def test_an_approximate_symmetry_moves_the_charge_by_the_noise_over_the_stiffness():
    """(20)-(23): with ζ½h|θ − θ°|² in the loss, C − C° → σ²tr(ΣA)/(ζh); (23) prints a 2."""
    zeta, h = 3.0, 2.0
    direction = {"U": jnp.ones((2, 3)), "W": jnp.zeros((3, 2))}  # n, with n·Aθ° ≠ 0
    charge = lambda p: symmetry.noether_charge(ONE, p)

    def both(p, e):
        gap = norm_squared(jax.tree.map(jnp.subtract, p, POINT))
        return example_loss(p, e) + zeta * h / 2 * gap

    sigma2 = 1e-6
    at = lambda s: jax.tree.map(lambda x, n: x + s * n, POINT, direction)
    balance = lambda s: drift_of(charge, loss=both, sigma2=sigma2, point=at(s))
    low, high = 0.0, 2 * sigma2 * TRACE / (zeta * h * float(flat(direction) @ A @ THETA))
    assert balance(low) * balance(high) < 0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if balance(middle) * balance(low) > 0 else (low, middle)
    moved = float(charge(at(low)) - charge(POINT))
    close("C − C°", moved, sigma2 * TRACE / (zeta * h), 1e-3)
    differs("(23)", moved, 2 * sigma2 * TRACE / (zeta * h))
