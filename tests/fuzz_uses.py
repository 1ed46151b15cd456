"""Valid calls for `fuzz`, as in `fuzz_table`, of what needs functions and classes of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow import linalg


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


USES = {
    "linalg.eigh": {"matrix": np.diag([0.0, 1.0, 2.0])},
    "linalg.Recognised": {"use": Halved()},
    "linalg.register_use": {"operation": halved},
    "linalg.tangent_solve": {"mv": doubled, "right": jnp.ones(3), "rtol": 1e-6, "max_steps": 5},
}
