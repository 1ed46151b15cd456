"""The part of `fuzz_table` about what the start and the noise choose in small models."""

import jax.numpy as jnp
import numpy as np

import manifoldflow as mf

INPUTS = np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]])
LABELS = np.array([1.0, -1.0])
TALL = {"inputs": INPUTS, "targets": np.array([1.0, 0.0])}

INITIALISATION = {
    "RegularizedLoss": {
        "loss": mf.LeastSquares(**TALL, predict=jnp.dot), "strength": 0.1, "kind": "hessian"
    },
    "theory.margin_kkt": {
        "point": np.array([2.0, -2.0, 0.0]), "margins": np.array([2.0, 2.0]),
        "gradients": np.array([[1.0, 0, 0.5], [0, -1.0, -0.5]]), "degree": 1.0,
    },
    "theory.kernel_rich_interpolant": {**TALL, "scale": 1.0},
    "theory.max_margin_direction": {"inputs": INPUTS, "labels": LABELS},
    "theory.min_norm_interpolant": {**TALL, "start": np.zeros(3)},
    "theory.ornstein_uhlenbeck_covariance": {
        "hessian": np.eye(2), "covariance": np.eye(2), "learning_rate": 0.1, "discrete": True
    },
    "theory.overparametrized_linear_charges": {
        "inputs": INPUTS, "u": np.ones(3), "v": np.ones(3), "time": 1.0, "noise_constant": 1.0
    },
    "theory.overparametrized_linear_flow": {
        **TALL, "u": np.ones(3), "v": np.ones(3), "time": 1.0, "noise_constant": 1.0
    },
    "theory.restricted_isometry": {"inputs": INPUTS, "sparsity": 1, "num_starts": 2, "seed": 0},
    "theory.weighted_l1_interpolant": TALL,
    "theory.kernel_rich_potential": {"weights": np.ones(3), "scale": 1.0},
    "theory.ornstein_uhlenbeck_law": {
        "hessian": np.eye(2), "covariance": np.eye(2), "start": np.ones(2), "time": 1.0,
        "learning_rate": 0.1, "lag": 1.0, "discrete": True,
    },
    "theory.quadratically_parametrized_flow": {
        "weights": np.ones(2), "start": np.ones(2), "time": 1.0
    },
    "theory.recovery_stages": {
        "inputs": np.sqrt(2) * np.eye(2), "truth": np.array([1.0, 0.0]), "scale": 0.1,
        "learning_rate": 0.1,
    },
}  # fmt: skip
