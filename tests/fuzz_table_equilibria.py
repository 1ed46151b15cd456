"""The part of `fuzz_table` about charges that are not quadratic and deep linear equilibria."""

import jax
import jax.numpy as jnp
import numpy as np

PAIR, INPUTS = {"a": jnp.array(2.0), "b": jnp.array(0.5)}, np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]])

EQUILIBRIA = {
    "symmetry.Charge": {"velocity_fn": lambda p: p, "origin": PAIR, "num_nodes": 3},
    "symmetry.check_charge": {
        "charge": lambda p: p["a"] ** 2 - p["b"] ** 2,
        "example_loss": lambda p, z: (p["a"] * p["b"] - z) ** 2,
        "point": PAIR, "data": np.array([1.0, 2.0]), "tolerance": 1e-3,
    },
    "theory.deep_linear_equilibrium_of_examples": {
        "product": np.eye(2, 3), "inputs": INPUTS, "targets": np.diag([2.0, 3.0]),
        "widths": [3], "key": jax.random.key(0), "batch_size": 1, "replacement": True,
    },
    "theory.deep_linear_sides_of_examples": {
        "weights": [np.eye(2, 3), np.eye(2)], "inputs": INPUTS, "targets": np.eye(2),
        "batch_size": 1, "replacement": True,
    },
}  # fmt: skip
