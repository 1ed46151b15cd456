"""Losses with symmetries, and Σ as a matrix, for the tests of `symmetry`."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

from manifoldflow import symmetry

WIDTH, NUM_INPUTS, NUM_OUTPUTS, NUM_EXAMPLES = 3, 2, 2, 6
SIZE = WIDTH * (NUM_INPUTS + NUM_OUTPUTS)


def example_loss(point, example):
    """‖UWx − y‖², a linear network of two layers."""
    x, y = example
    return jnp.sum((point["U"] @ (point["W"] @ x) - y) ** 2)


def data_of(seed, count=NUM_EXAMPLES):
    keys = jr.split(jr.key(seed), 2)
    return jr.normal(keys[0], (count, NUM_INPUTS)), jr.normal(keys[1], (count, NUM_OUTPUTS))


def point_of(seed):
    keys = jr.split(jr.key(seed), 2)
    return {
        "U": jr.normal(keys[0], (NUM_OUTPUTS, WIDTH)),
        "W": jr.normal(keys[1], (WIDTH, NUM_INPUTS)),
    }


def matrix_of(seed):
    root = jr.normal(jr.key(seed), (WIDTH, WIDTH))
    return (root + root.T) / 2


DATA, POINT, B = data_of(0), point_of(1), matrix_of(2)
TURN = jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # antisymmetric


def first(point):
    return point["U"]


def second(point):
    return point["W"]


def rotation_of(matrix):
    return symmetry.double_rotation(POINT, first, second, matrix)


def dense_generator(matrix):
    """diag(I ⊗ B, −B ⊗ I) on the raveled point."""
    upper = jnp.kron(jnp.eye(NUM_OUTPUTS), matrix)
    lower = jnp.kron(matrix, jnp.eye(NUM_INPUTS))
    return jax.scipy.linalg.block_diag(upper, -lower)


WEIGHTS = {"U": 1.0, "W": -1.0}

SYMMETRIES = {
    "weights": symmetry.ExponentialSymmetry(WEIGHTS),
    "rotation": rotation_of(B),
    "function": symmetry.ExponentialSymmetry(lambda p: {"U": p["U"] @ B, "W": -B @ p["W"]}),
}
MATRICES = {
    "weights": np.asarray(dense_generator(jnp.eye(WIDTH))),
    "rotation": np.asarray(dense_generator(B)),
    "function": np.asarray(dense_generator(B)),
}


@jax.jit
def gradients(point, data=DATA):
    """(N, D)."""
    flat, unravel = ravel_pytree(point)
    gradient = jax.grad(lambda x, example: example_loss(unravel(x), example))
    return jax.vmap(lambda example: gradient(flat, example))(data)


def covariance(point, data=DATA):
    """Σ, centred, as a matrix."""
    rows = np.asarray(gradients(point, data))
    rows = rows - rows.mean(axis=0)
    return rows.T @ rows / len(rows)


def flat(point):
    return np.asarray(ravel_pytree(point)[0])
