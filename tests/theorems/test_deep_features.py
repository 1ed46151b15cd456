"""Networks of three layers under label noise, of which no theorem of [Gatmiry2024] speaks.

The features of both hidden layers fall to rank one along the flow of F = tr ∇²L/2; the weights, of
which the inputs see only a part, do not.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from checks import at_least, at_most

NUM_EXAMPLES, NUM_INPUTS, WIDTH, END, SEEDS = 4, 5, 6, 3.0, 12


def activation(z):
    return z**3 + z


def network(point, x):
    return jnp.sum(activation(point["second"] @ activation(point["first"] @ x)))


def second_over_first(matrix):
    values = jnp.linalg.svd(matrix, compute_uv=False)
    return values[1] / values[0]


def ratios(point, x):
    hidden = point["first"] @ x.T
    features = [hidden, point["second"] @ activation(hidden)]
    return jnp.stack([second_over_first(m) for m in (*features, point["first"], point["second"])])


@jax.jit
@jax.vmap
def runs(key):
    """Second over first singular value, of features and weights of both layers; and F."""
    of_inputs, of_labels, of_first, of_second = jr.split(key, 4)
    x = jr.normal(of_inputs, (NUM_EXAMPLES, NUM_INPUTS))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    start = {
        "first": jr.normal(of_first, (WIDTH, NUM_INPUTS)) / NUM_INPUTS**0.5,
        "second": 0.7 * jr.normal(of_second, (WIDTH, WIDTH)) / WIDTH**0.5,
    }
    labels = jr.uniform(of_labels, (NUM_EXAMPLES,), minval=-1, maxval=1)
    loss = mf.LeastSquares(x, labels, predict=network, scale=2.0)
    manifold = mf.ZeroLossManifold(loss)
    # The drift is −rate·P∇tr∇²L = −2·rate·P∇F.
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0))
    speed = flow.short_limit.rate * 2
    fit = manifold.project(start, throw=False)
    options = {"rtol": 1e-4, "atol": 1e-6, "throw": False, "max_steps": 4_000}
    walk = mf.solve(flow, fit, end_time=END / speed, **options)
    ends = [fit, walk.final]
    values = jnp.stack([ratios(point, x) for point in ends])
    return values, jnp.stack([loss.trace_gauss_newton(point) / 2 for point in ends])


def test_features_of_both_layers_fall_to_rank_one_and_weights_do_not():
    values, flatness = map(np.asarray, runs(jr.split(jr.key(0), SEEDS)))
    first, last = np.median(values, axis=0)
    for layer in (0, 1):
        at_least(f"features of layer {layer + 1} at first, median", first[layer], 0.1)
        at_most(f"features of layer {layer + 1} at the end, median", last[layer], 0.02)
        at_least(f"weights of layer {layer + 1} at the end, median", last[2 + layer], 0.2)
    for seed, (before, after) in enumerate(flatness):
        at_most(f"F at the end over F at first, seed {seed}", after / before, 0.9)
