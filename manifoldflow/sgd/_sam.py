"""Sharpness-aware gradients, one ascent step for each draw."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.noise import AbstractStochasticGradient


class SAMGradient(AbstractStochasticGradient):
    """The sharpness-aware gradient: the mean over some draws of g(θ + ρ g(θ)/‖g(θ)‖).

    Every draw of a gradient climbs alone. It is given to `simulate` in the place of a noise. Near
    the zero-loss manifold and for a small ρ ≫ ‖r‖, SGD on this gradient follows, on the clock kηρ²,
    that is `Solution.times`·ρ²/η, θ' = −½P∇tr∇²L where g is the gradient of one example,
    `MinibatchNoise(1)`, and θ' = −½P∇λ_max where it is that of all, `MinibatchNoise(N)`. A single
    draw climbs as in `optax.contrib.sam`; with several, Optax climbs along the mean. A gradient of
    zero does not climb.

    Args:
        noise: draws g; both gradients of a climb are taken at the same draw.
        radius: ρ ≥ 0, the length of a climb; 0 leaves the gradient as it is.
        num_draws: the number of independent climbs. They take the memory of as many points.

    Raises:
        ValueError: a negative radius, fewer draws than one.

    References:
        [WenMaLi2023].

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(1), jnp.zeros(1), predict=jnp.dot)  # ½θ²
        >>> climbing = mf.SAMGradient(mf.MinibatchNoise(1), radius=0.1)
        >>> print(climbing.gradient(loss, jnp.array([1.0]), jr.key(0)).round(3))  # θ + ρ
        [1.1]
    """

    noise: AbstractStochasticGradient
    radius: Scalar
    num_draws: int = eqx.field(static=True)

    @checked
    def __init__(self, noise: AbstractStochasticGradient, radius: Any, num_draws: int = 1):
        self.noise = noise
        self.radius = checked_nonnegative("SAMGradient: radius", radius, "It is a length.")
        self.num_draws = checked_count("SAMGradient: num_draws", num_draws)

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        """The sharpness-aware gradient of one batch."""
        coordinates, remainder = loss.split(point)

        def climbed(key: Key) -> Tangent:
            slope = self.noise.gradient(loss, point, key)
            size = _tree.norm(slope)
            length = jnp.where(size > 0, self.radius / jnp.where(size > 0, size, 1), 0)
            # The same key at the top: a climb on one batch and a slope of another would be plain
            # noise.
            top = _tree.add(coordinates, _tree.scale(length, slope))
            return self.noise.gradient(loss, _tree.join(top, remainder), key)

        if self.num_draws == 1:
            return climbed(key)
        # One key per draw: climbs with the same batch would be no independent draws.
        climbs = jax.vmap(climbed)(jr.split(key, self.num_draws))
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), climbs)
