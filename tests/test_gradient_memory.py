"""Reverse mode keeps the points between steps, and not what is inside of each step."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from checks import at_most

NUM_STEPS, NUM_EXAMPLES, DIMENSION = 2000, 10, 60
# Points, as they are kept, given to the loop that goes back, and stacked once more by it.
MOST = 20


def problem():
    inputs = jr.normal(jr.key(0), (NUM_EXAMPLES, DIMENSION))
    targets = jnp.ones(NUM_EXAMPLES)
    return mf.LeastSquares(inputs, targets, predict=lambda w, x: jnp.sin(w**2) @ x)


@pytest.mark.parametrize("name", ["limit_map", "stochastic solve"])
def test_only_points_are_kept(name):
    loss = problem()
    motion = mf.BrownianMotion(mf.ZeroLossManifold(loss))
    step_size = 1 / NUM_STEPS
    functions = {
        "limit_map": lambda w: mf.limit_map(loss, w, max_steps=NUM_STEPS, throw=False),
        "stochastic solve": lambda w: (
            mf.solve(motion, w, end_time=1.0, step_size=step_size, key=jr.key(1), throw=False).final
        ),
    }
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(functions[name](w) ** 2)))
    start = jnp.ones(DIMENSION)
    memory = gradient.lower(start).compile().memory_analysis().temp_size_in_bytes
    points = memory / (NUM_STEPS * start.nbytes)
    at_most(f"memory of a gradient of {name}, in points a step", points, MOST)
