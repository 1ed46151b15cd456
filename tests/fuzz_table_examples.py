"""A part of the table of calls: losses of examples and level sets of outputs."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from manifoldflow import linalg

DATA = {"inputs": np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]]), "targets": np.array([1.0, 0.0])}
POINT = jnp.array([1.0, 0.5, 0])
SQUARES = mf.LeastSquares(**DATA, predict=lambda point, x: x @ point**2)


def squares(f, y):
    return (f - y) ** 2


EXAMPLES = {
    "mesh": {"examples": 1, "parameters": 1},
    "diagnostics.is_gradient_flow": {
        "flow": mf.WeightDecayFlow(mf.LevelSet(lambda x: x[0] ** 2 + 2 * x[1] ** 2 - 1)),
        "point": jnp.array([1.0, 0.0]),
        "metric": lambda point, vector: vector,
        "loop": lambda t: jnp.stack([jnp.cos(2 * jnp.pi * t), jnp.sin(2 * jnp.pi * t) / 2**0.5]),
        "num_tangents": 2,
        "tolerance": 1e-3,
        "key": jr.key(0),
    },
    "OutputManifold": {
        "predict": jnp.dot,
        "inputs": DATA["inputs"],
        "like": jnp.array([1.0, 0, 0]),
        "gram": linalg.DenseGram(),
    },
    "PerExampleLoss": {
        **DATA,
        "loss_fn": squares,
        "predict": jnp.dot,
        "minimizer_fn": lambda y: y,
        "weight_decay": 0.1,
    },
    "linalg.displacement": {"coordinates": jnp.ones(3), "origin": jnp.zeros(3)},
    "linearized": {"loss": SQUARES, "point": POINT},
    "diagnostics.kernel_change": {"loss": SQUARES, "point": POINT, "other": 2 * POINT},
    "theory.kernel_regime_error_bound": {"num_examples": 2, "truth": np.array([1.0, 0, 0])},
    "theory.sparse_recovery_certificate": {
        "inputs": DATA["inputs"],
        "truth": np.array([1.0, 0, 0]),
        "weights": np.ones(3),
    },
    "theory.sparse_recovery_sample_size": {
        "num_features": 5,
        "sparsity": 1,
        "failure_probability": 0.1,
        "design": "boolean",
    },
    "FlippedLabels": {"batch_size": 1},
    "HessianNoise": {"multiple": 1.0, "rank": 1, "gauss_newton": False},
    "linalg.square_root": {"matrix": np.diag([0.0, 1.0, 2.0]), "rank": 2},
    "losses.flipped_labels_loss": {
        "inputs": DATA["inputs"],
        "labels": np.array([1.0, -1.0]),
        "margin_loss": lambda z: jnp.exp(-z),
        "probability": 0.1,
        "predict": jnp.dot,
    },
    "theory.overparametrized_linear_rates": {**DATA, "noise_constant": 1.0},
    "losses.ResidualForm": {"loss": mf.PerExampleLoss(**DATA, loss_fn=squares, predict=jnp.dot)},
}
