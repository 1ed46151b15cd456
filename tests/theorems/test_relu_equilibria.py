"""SGD takes a ReLU network to the noise equilibrium that `symmetry` computes [Ziyin2024, 4.2, 4.3].

f = U relu(Wx) has a rescaling for every hidden neuron. λ*(θ) says how far along each of them the
equilibrium is. Descent ends at a minimum with the charges of its start, so with λ* ≠ 0. From
there SGD takes every λ* to 0, on the clock σ²kη, σ² = η/(2S).
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import manifoldflow as mf
from checks import at_least, at_most, norm
from manifoldflow import models, symmetry
from quick import long_jit

WIDTH, NUM_EXAMPLES, BATCH_SIZE, SEEDS, SAVES = 3, 60, 2, 32, 200
RATES = np.array([0.014, 0.02, 0.028])
HORIZON = 1.8  # σ²kη to which the slowest runs go
TEACHER = {
    "W": jnp.array([[1.2, 0.0, 0.0], [-0.6, 1.0, 0.0], [-0.6, -1.0, 0.5]]),
    "U": jnp.array([[1.0, 0.3, -0.5], [-0.4, 1.0, 0.8]]),
}


def data():
    of_x, of_noise = jr.split(jr.key(0))
    x = jr.normal(of_x, (NUM_EXAMPLES, 3))
    noise = jr.normal(of_noise, (NUM_EXAMPLES, 2)) * jnp.array([0.36, 0.6])
    return models.FiniteData(x, jax.nn.relu(x @ TEACHER["W"].T) @ TEACHER["U"].T + noise)


DATA = data()
EXAMPLES = DATA.inputs, DATA.targets
NET = models.NonlinearFactorization(DATA, WIDTH, jax.nn.relu)
LOSS = mf.LeastSquares(*EXAMPLES, predict=NET.predict, scale=2 / NUM_EXAMPLES)
NEURONS = [symmetry.ExponentialSymmetry({"U": -e, "W": e[:, None]}) for e in jnp.eye(WIDTH)]
LAYER = symmetry.ExponentialSymmetry({"U": -1.0, "W": 1.0})


def distances(point):
    """λ* of every neuron, all at once, and of the layer as a whole."""
    find = lambda ones: symmetry.noise_equilibrium(
        ones, NET.example_loss, point, EXAMPLES, noise_scale=1.0
    )
    return jnp.append(find(NEURONS), find(LAYER))


def charges(point):
    return jnp.stack([symmetry.noether_charge(one, point) for one in NEURONS])


def unbalanced():
    near = jax.tree.map(lambda p, q: p + 0.2 * q, TEACHER, NET.initial(jr.key(7)))
    return symmetry.act_together(NEURONS, near, jnp.array([0.8, 0.4, 0.6]))


@functools.cache
def descent():
    return mf.simulate(
        LOSS, mf.IsotropicNoise(0.0), optax.sgd, unbalanced(), learning_rate=0.02,
        num_steps=4000, key=jr.key(0), observe={"charges": charges, "loss": LOSS},
    )  # fmt: skip


@functools.cache
def descending():
    """From the end of descent: clocks σ²kη (rates, saves), and λ* (rates, seeds, saves, 4)."""
    num_steps = int(HORIZON * 2 * BATCH_SIZE / RATES[0] ** 2)
    rest = descent().final

    def run(rate, key):
        return mf.simulate(
            LOSS, NET.noise(BATCH_SIZE), optax.sgd, rest, learning_rate=rate, num_steps=num_steps,
            num_saves=SAVES, key=key, observe={"distances": distances},
        ).observables["distances"]  # fmt: skip

    every = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    found = long_jit(every)(jnp.asarray(RATES), jr.split(jr.key(1), SEEDS))
    clocks = np.linspace(0, num_steps, SAVES + 1) * RATES[:, None] ** 2 / (2 * BATCH_SIZE)
    return clocks, np.asarray(found)


@functools.cache
def predicted():
    """λ* along the Noether flow of all neurons, at σ² = 1, from the end of descent."""
    flow = mf.NoetherFlow(NEURONS, NET.example_loss, EXAMPLES, noise_scale=1.0)
    walk = mf.solve(
        flow, descent().final, end_time=HORIZON, num_saves=90, observe={"distances": distances}
    )
    return np.linspace(0, HORIZON, 91), np.asarray(walk.observables["distances"])


def half_times(clock, paths):
    """When each column of a mean path has lost half of its first value: where a straight line
    through its logarithm between 0.7 and 0.3 says so, which single crossings do not disturb."""
    found = []
    for left in np.abs(paths / paths[0]).T:
        end = np.argmax(left < 0.3)
        assert end > 0, f"what is left at the end: {left[-1]:.3f}"
        part = slice(np.argmax(left < 0.7), end)
        slope, level = np.polyfit(clock[part], np.log(left[part]), 1)
        found.append((np.log(0.5) - level) / slope)
    return np.array(found)


def half_times_and_errors(clock, paths):
    """Of the mean over seeds, with errors by leaving out one seed at a time."""
    without = [half_times(clock, np.delete(paths, i, 0).mean(0)) for i in range(len(paths))]
    return half_times(clock, paths.mean(0)), np.sqrt((len(paths) - 1) * np.var(without, axis=0))


def test_descent_keeps_its_charges_and_sgd_goes_to_the_equilibrium():
    """|λ*| at the end is below 4 standard errors + η; that of descent is not, by far."""
    first, last = descent().observables["charges"]
    at_most("change of descent's charges", np.max(np.abs(last / first - 1)), 1e-3)
    at_most("descent rests: |∇L|", norm(LOSS.gradient(descent().final)), 1e-6)
    clocks, paths = descending()
    late = paths[-1][:, clocks[-1] > 3.5 * HORIZON].mean(axis=1)
    mean, error = late.mean(0), late.std(0, ddof=1) / np.sqrt(SEEDS)
    bounds = 4 * error + RATES[-1]
    still = np.abs(np.asarray(distances(descent().final)))
    for name, end, bound, kept in zip(("0", "1", "2", "layer"), mean, bounds, still):
        at_most(f"|λ*| of {name} after SGD, key 1", abs(end), bound)
        at_least(f"|λ*| of {name} after descent, over that bound", kept / bound, 4)


def test_the_time_to_equilibrium_is_one_over_the_noise_scale():
    """σ²·t½ is one number, that of the Noether flow, up to a share like σ². With t½ ∝ σ², as
    section 4.2 prints, t½/σ² would be one; a flow of the other sign never halves."""
    clocks, paths = descending()
    found = [half_times_and_errors(c, p) for c, p in zip(clocks, paths)]
    products, errors = (np.array(each) for each in zip(*found))
    scales = RATES / (2 * BATCH_SIZE)
    expected = half_times(*predicted())
    # A straight line in σ² through the three of them, read at 0.
    design = np.stack([np.ones(3), scales], axis=1)
    for j, name in enumerate(("0", "1", "2", "layer")):
        weights = np.linalg.pinv(design / errors[:, j : j + 1]) / errors[:, j]
        limit, error = weights[0] @ products[:, j], np.linalg.norm(weights[0] * errors[:, j])
        at_most(f"σ²t½ of {name} at σ² → 0, off theory", abs(limit - expected[j]),
                4 * error + 0.02 * expected[j])  # fmt: skip
        spread = np.max(products[:, j]) / np.min(products[:, j])
        at_most(f"σ²t½ of {name}: largest over smallest", spread, 1.25)
        printed = products[:, j] / scales**2
        at_least(f"t½/σ² of {name}: largest over smallest", np.max(printed) / np.min(printed), 3)
