"""Valid calls for `fuzz`, as in `fuzz_table`, of what needs functions and classes of its own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import manifoldflow as mf
from manifoldflow import linalg, symmetry, walks


@jax.jit
def halved(weight):
    return weight[::2]


class Halved(linalg.AbstractPairUse):
    @classmethod
    def recognise(cls, equation, index):
        return linalg.Recognised(cls())

    def apply(self, weight, factor):
        return weight[::2]

    def inner(self, delta, factor, other_delta, other_factor):
        return jnp.vdot(delta, other_delta)


def doubled(vector):
    return jax.tree.map(lambda x: 2 * x, vector)


def product_loss(point, z):
    return jnp.sum((point["U"] @ (point["W"] @ z)) ** 2)


TWO_LAYERS = {"U": jnp.ones((2, 3)), "W": jnp.ones((3, 3))}
FACTORS = {"first": lambda p: p["U"], "second": lambda p: p["W"]}
TO_FIND = {
    "network": TWO_LAYERS, "example_loss": product_loss, "data": np.ones((4, 3)),
    "tolerance": 1e-4,
}  # fmt: skip
HEADS = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))

HYPERBOLA = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda w, x: w[0] * w[1] * x)
LEAST = {"loss": HYPERBOLA, "point": jnp.array([2.0, 0.5])}

USES = {
    "walk": {
        **LEAST, "objective": walks.WeightNorm(), "manifold": mf.ZeroLossManifold(HYPERBOLA),
        "method": "flow", "end_time": 0.1, "max_steps": 9, "num_saves": 2, "stationarity": 0.1,
        "observe": {"first": lambda w: w[0]}, "throw": False,
    },
    "walks.Flatness": {}, "walks.LargestEigenvalue": {}, "walks.WeightNorm": {},
    "walks.Rounding": {"bits": 4, "per": "row"},
    "linalg.eigh": {"matrix": np.diag([0.0, 1.0, 2.0])},
    "linalg.Recognised": {"use": Halved()},
    "linalg.register_use": {"operation": halved},
    "linalg.tangent_projector": {
        **LEAST, "batch_size": 1, "gram": linalg.DenseGram(), "tolerance": 1e-3, "max_steps": 5,
    },
    "linalg.tangent_solve": {"mv": doubled, "right": jnp.ones(3), "rtol": 1e-6, "max_steps": 5},
    "symmetry.attention_products": {"point": HEADS, "where": lambda p: p, "name": "heads"},
    "symmetry.find_products": TO_FIND,
    "symmetry.find_scalings": TO_FIND,
    "symmetry.product_drift": {
        "product": symmetry.product_symmetry(TWO_LAYERS, **FACTORS), "point": TWO_LAYERS,
        "example_loss": product_loss, "data": np.ones((4, 3)), "noise_scale": 0.1,
        "weight_decay": 0.1,
    },
    "symmetry.product_symmetry": {
        "point": TWO_LAYERS, **FACTORS, "axes": (1, 0), "num_blocks": 1, "name": "U W",
    },
}  # fmt: skip
