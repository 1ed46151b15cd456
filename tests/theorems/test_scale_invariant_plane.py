"""ℓ(θ) = −⟨z, θ⟩/‖θ‖ in the plane, [Ziyin2024, Figure 1] in closed form.

With z normal of mean e₁ and covariance s²I, tr Σ = s²/‖θ‖² everywhere: with σ² = η/(2S) the
Noether flow d‖θ‖²/dt = 2σ² tr Σ gives ‖θ‖⁴ = ‖θ₀‖⁴ + 4σ²s²t, whatever the angle does.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import manifoldflow as mf
from checks import at_least, at_most, close
from manifoldflow import symmetry

SPREAD, RATE, BATCH_SIZE, STEPS, SEEDS = 1.5, 0.05, 2, 4000, 256
START = jnp.array([-0.6, 0.8])


def example_loss(point, example):
    return -jnp.dot(example, point) / jnp.linalg.norm(point)


def sample(key, count):
    return jnp.array([1.0, 0.0]) + SPREAD * jr.normal(key, (count, 2))


LOSS = mf.FunctionLoss(lambda point: example_loss(point, jnp.array([1.0, 0.0])))
NOISE = mf.noise.OnlineBatch(sample, example_loss, BATCH_SIZE)


def squared_norm(point):
    return jnp.sum(point**2)


def test_the_drift_of_the_norm_is_the_same_at_every_angle():
    points = sample(jr.key(0), 4000)
    points -= points.mean(0)
    root = jnp.linalg.cholesky(points.T @ points / len(points))
    examples = jnp.array([1.0, 0.0]) + SPREAD * jnp.linalg.solve(root, points.T).T  # exact moments
    for radius, angle in ((1.0, 0.3), (2.0, 2.0), (0.5, 3.1)):
        point = radius * jnp.array([jnp.cos(angle), jnp.sin(angle)])
        assert symmetry.check_symmetry(symmetry.scaling(point), example_loss, point, examples)
        drift = symmetry.noether_drift(
            symmetry.scaling(point), example_loss, point, examples, noise_scale=0.1
        )
        close("dC/dt, C = ‖θ‖²/2", drift, 0.1 * SPREAD**2 / radius**2, 1e-9)


def test_the_flow_stays_on_its_circle_and_sgd_goes_outwards():
    """The fourth power of the norm grows linearly; with (24) as printed, σ² tr Σ, half as fast."""
    flow = mf.solve(
        mf.GradientFlow(LOSS), START, end_time=5.0, num_saves=10, rtol=1e-9, atol=1e-11,
        observe={"square": squared_norm},
    )  # fmt: skip
    close("the circle", flow.observables["square"], np.ones(11), 1e-6)
    at_least("and the flow moves on it", flow.final[0] - START[0], 1.0)

    def run(key):
        return mf.simulate(
            LOSS, NOISE, optax.sgd, START, learning_rate=RATE, num_steps=STEPS, num_saves=STEPS,
            key=key, observe={"square": squared_norm},
        ).observables["square"]  # fmt: skip

    squares = np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(1), SEEDS)))
    assert np.all(np.diff(squares, axis=1) >= 0), "every step leads outwards"
    end = squares[:, -1] ** 2
    mean, error = end.mean(), end.std(ddof=1) / np.sqrt(SEEDS)
    growth = 4 * RATE / (2 * BATCH_SIZE) * SPREAD**2 * STEPS * RATE
    # Steps are finite: on its way to the minimum ‖∇L‖² adds to the noise, and E[Δr⁴] has the square
    # of Δr² as well. Both are of order η beside the growth.
    at_most("‖θ‖⁴, key 1", abs(mean - 1 - growth), 4 * error + RATE * growth)
    at_least("as printed, over that", abs(mean - 1 - growth / 2), 5 * (4 * error + RATE * growth))
