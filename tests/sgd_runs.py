"""Small runs of SGD, and the same by hand."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import optax.contrib

import manifoldflow as mf
import zoo

INPUTS, TARGETS = zoo.data()
POINT = zoo.network_point(jr.key(5))
LOSS = mf.LeastSquares(INPUTS, TARGETS, predict=zoo.network)
NOISE = mf.LabelNoise(0.5)
KEY = jr.key(42)
RADIUS = 0.1


class Silent(mf.AbstractNoise):
    """No noise at all, which compiles in a third of the time; any function as the gradient."""

    gradient_fn: Callable = mf.AbstractLoss.gradient

    def gradient(self, loss, point, key):
        return self.gradient_fn(loss, point)

    def factor(self, loss, point):
        structure = jax.eval_shape(lambda: loss.split(point)[0])
        return 0.0 * lx.IdentityLinearOperator(structure)


STILL = Silent()
LINEAR = mf.LeastSquares(INPUTS, TARGETS[:, 0], predict=jnp.dot)


def heavy_ball(rate):
    return optax.sgd(rate, momentum=0.9)


def nesterov(rate):
    return optax.sgd(rate, momentum=0.9, nesterov=True)


def climb():
    return optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))


def sam(rate):
    return optax.contrib.sam(optax.sgd(rate), climb(), opaque_mode=True)


def sam_in_a_chain(rate):
    return optax.chain(optax.clip(10.0), sam(rate))


def polyak(rate):
    return optax.polyak_sgd(scaling=rate)


def schedule(step):
    return 0.2 / (1 + 0.1 * step)


def run(optimizer=optax.sgd, point=POINT, *, loss=LOSS, noise=NOISE, key=KEY, **options):
    options = {"learning_rate": 0.1, **options}
    if "end_time" not in options:
        options.setdefault("num_steps", 10)
    return mf.simulate(loss, noise, optimizer, point, key=key, **options)


def short(optimizer=optax.sgd, **options):
    """A run on a small problem."""
    return run(optimizer, **{"point": jnp.ones(3), "loss": LINEAR, "noise": STILL, **options})


def by_hand(transform, num_steps, loss=LOSS, noise=NOISE, point=POINT, key=KEY):
    """The loop that anyone would write, one compiled step after the other; all its points."""
    transform = optax.with_extra_args_support(transform)

    @jax.jit
    def step(point, state, k):
        gradient = noise.gradient(loss, point, jr.fold_in(key, k))
        updates, state = transform.update(gradient, state, point, value=loss(point))
        return optax.apply_updates(point, updates), state

    points, state = [point], transform.init(point)
    for k in range(num_steps):
        point, state = step(point, state, k)
        points.append(point)
    return points


@functools.cache
def ten_noisy_points():
    return by_hand(heavy_ball(0.1), 10, LINEAR, NOISE, jnp.ones(3))


def same_bits(what, value, expected):
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True), (
            f"{what}: differ by {np.max(np.abs(np.asarray(one - other)))}"
        )
