"""Networks of two layers with D = 8 or 9 weights on n = 3 or 2 examples, written out densely."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import manifoldflow as mf
from checks import at_least, at_most, close, flat, norm

STD = 0.6
rejected = pytest.raises(AssertionError, match="above the bound")


def once(point, x):
    """f(x) = v·tanh(W x): the gradient in W is of rank one."""
    return jnp.dot(point["v"], jnp.tanh(point["W"] @ x))


def twice(point, x):
    """v·tanh(W x) with the same W for two inputs: the gradient in W is of rank two."""
    return point["v"][0] * jnp.tanh(point["W"] @ x[:3])[0] + jnp.dot(
        point["v"], jnp.sin(point["W"] @ x[3:])
    )


SHAPES = {  # f, W, inputs, n
    "once": (once, (3, 2), 2, 3), "wide": (once, (2, 3), 3, 2), "twice": (twice, (2, 3), 6, 2)
}  # fmt: skip


class Problem:
    """A loss, a point of its zero set, and what of it is written out densely."""

    def __init__(self, name, seed=0):
        predict, shape, num_inputs, self.count = SHAPES[name]
        rng = np.random.default_rng(seed)
        inputs, targets = rng.normal(size=(self.count, num_inputs)), rng.normal(size=self.count) / 2
        self.loss = mf.LeastSquares(inputs, targets, predict=predict)
        self.manifold = mf.ZeroLossManifold(self.loss)
        start = {"W": rng.normal(size=shape), "v": rng.normal(size=shape[0])}
        self.point = self.manifold.project(jax.tree.map(jnp.asarray, start))
        self.flat, self.unravel = ravel_pytree(self.point)
        at_most("distance", self.manifold.defect(self.point), 1e-12)

    @functools.cached_property
    def residual(self):
        return jax.jit(lambda x: self.loss.residual(self.unravel(x)))

    @functools.cached_property
    def rows(self):
        """∇rᵢ, (n, D). Laws take them many times: they are traced once."""
        return jax.jit(jax.jacfwd(self.residual))

    def found(self, update, noise=None):
        noise = mf.LabelNoise(STD, batch_size=1) if noise is None else noise
        flow = mf.LimitDiffusion(self.manifold, noise, update)
        assert not flow.is_stochastic
        return flow


@functools.cache
def problem(name="once", seed=0):
    return Problem(name, seed)


def law(what, found, expected, bound=1e-9):
    at_least(f"the drift of {what}", norm(expected), 1e-3)
    close(f"the drift of {what}", flat(found), flat(expected), bound)
