"""SGD towards the unit circle under noise that is normal, tangent and mixed at once.

L = (|x|² − 1)²/8, and the noise turns with the point: F = n aᵀ + τ bᵀ for the unit normal n and the
unit tangent τ. So the angle of the limit is a Brownian motion with constant drift −a·b, all of it
from the mixed part, and variance |b|² per unit of time: its law, that of its exit times and that
of its running maximum are known. Gradient flow is radial, with a closed form of its own.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from scipy.special import ndtr

import manifoldflow as mf

LOSS = mf.LeastSquares(np.zeros(1), np.ones(1), predict=lambda x, i: x @ x, scale=0.25)
NORMAL, TANGENT = np.array([0.5, 0.3, 0.3]), np.array([-0.3, -0.1, 0.1])
DRIFT, VARIANCE = -float(NORMAL @ TANGENT), float(TANGENT @ TANGENT)
RADIUS = 1.6
OFF = jnp.array([RADIUS, 0.0])  # a start that is not on the circle; its Φ is (1, 0)


def columns(normal, tangent):
    """x ↦ F for these columns in the frame that turns with x."""

    def factor(x):
        n = x / jnp.linalg.norm(x)
        return n[:, None] * normal + jnp.array([-n[1], n[0]])[:, None] * tangent

    return factor


NOISE = mf.CustomNoise(columns(NORMAL, TANGENT))


def angle(x):
    return jnp.arctan2(x[..., 1], x[..., 0])


def drawn(key, step):
    """What `NOISE` draws at this step, and what `solve` draws for it."""
    return jr.normal(jr.split(jr.fold_in(key, step), 1)[0], (3,))


def brownian_angle(key, rates, sign=-1):
    """The limit's angle, exact in law, after steps that take rate² each with SGD's own noise."""
    pushes = jax.vmap(lambda k: drawn(key, k))(jnp.arange(len(rates))) @ TANGENT
    return DRIFT * jnp.sum(rates**2) + sign * jnp.sum(rates * pushes)


def radial_flow(radius, time):
    """|φ(x, t)| for |x| = radius: r² follows the logistic equation."""
    return (1 + (radius**-2 - 1) * np.exp(-time)) ** -0.5


def landing_time(radius, end):
    return np.log((1 - radius**-2) / (1 - end**-2))


def exit_law(time, left, right, drift=DRIFT):
    """P(the angle has left (−left, right) by this time), by the eigenfunctions of the interval."""
    x, time, width = np.linspace(-left, right, 2001), np.asarray(time), left + right
    inside = np.zeros_like(time)
    for k in range(1, 120):
        mode = np.sin(k * np.pi * (x + left) / width)
        weight = 2 / width * np.trapezoid(np.exp(drift * x / VARIANCE) * mode, x)
        fall = (k * np.pi / width) ** 2 * VARIANCE / 2
        inside += weight * np.sin(k * np.pi * left / width) * np.exp(-fall * time)
    return 1 - np.exp(-(drift**2) * time / (2 * VARIANCE)) * inside


def maximum_law(height, time, drift=DRIFT):
    """P(the running maximum of the angle is at most this high), by the reflection principle."""
    spread = np.sqrt(VARIANCE * time)
    mirrored = np.exp(2 * drift * height / VARIANCE) * ndtr((-height - drift * time) / spread)
    return ndtr((height - drift * time) / spread) - mirrored


def mean_of(law, most, *args):
    """The mean of a number ≥ 0 capped at `most`, from its distribution function."""
    grid = np.linspace(1e-9, most, 20001)
    return np.trapezoid(1 - law(grid, *args), grid)


def kolmogorov_distance(values, law, most=np.inf):
    """sup |F_n − F| up to `most`, beyond which nothing was measured."""
    values = np.sort(values)
    shown, count = values[values < most], len(values)
    expected, ranks = law(shown), np.arange(len(shown))
    return max(np.max((ranks + 1) / count - expected), np.max(expected - ranks / count))
