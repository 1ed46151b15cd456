"""A part of the table of calls: losses of examples and level sets of outputs."""

import jax.numpy as jnp
import numpy as np

import manifoldflow as mf
from manifoldflow import linalg

DATA = {"inputs": np.array([[1.0, 0, 0.5], [0, 1.0, 0.5]]), "targets": np.array([1.0, 0.0])}


def squares(f, y):
    return (f - y) ** 2


EXAMPLES = {
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
    "losses.ResidualForm": {"loss": mf.PerExampleLoss(**DATA, loss_fn=squares, predict=jnp.dot)},
}
