"""A noise that turns SGD round a circle for ever, without a function that falls."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Scalar
from manifoldflow.losses import FunctionLoss
from manifoldflow.manifolds import MinimizerManifold
from manifoldflow.noise import CustomNoise


class KPhaseMotor(eqx.Module):
    """The k-phase motor: gradient noise that drives the limit of SGD round the unit circle.

    On x ∈ R^D, D = k + 2, with the angles αⱼ = 2πj/k, the unit vectors vⱼ = (cos αⱼ, sin αⱼ)
    and z = (x₁, x₂),

        L(x) = ⅛(‖z‖² − 1)² + ½ Σⱼ (2 + ⟨vⱼ, z⟩) x²_{j+3},   j = 0 … k − 1,

    is minimal on the unit circle of the first plane. The noise is independent on the last k
    coordinates, with variances (1 + ⟨vⱼ, Qz⟩)(2 + ⟨vⱼ, z⟩), Q the clockwise quarter turn:
    larger ahead of the sharpest direction than behind it. The limiting diffusion is a turn
    with the constant angular speed `angular_speed`, so it has no potential.

    Args:
        num_phases: k ≥ 3.

    Raises:
        ValueError: fewer than three phases, with which the speed is not constant.

    References:
        [LiWangArora2022, Appendix C.4]; the speed is (D−2)/8, not (D−2)/2 as printed in C.8.

    Examples:
        >>> import manifoldflow as mf
        >>> motor = mf.models.KPhaseMotor()
        >>> flow = mf.LimitDiffusion(motor.manifold, motor.noise)
        >>> print((flow.drift(motor.point(0.0)) + 0.0).round(3), motor.angular_speed)
        [0.    0.375 0.    0.    0.   ] 0.375
    """

    num_phases: int = eqx.field(static=True)

    @checked
    def __init__(self, num_phases: int = 3):
        self.num_phases = checked_count("KPhaseMotor: num_phases", num_phases)
        if self.num_phases < 3:
            raise ValueError(f"KPhaseMotor needs at least three phases; got {num_phases}.")

    @property
    def dimension(self) -> int:
        """The number of coordinates, D = k + 2."""
        return self.num_phases + 2

    @property
    def loss(self) -> FunctionLoss:
        """The loss L."""
        return FunctionLoss(_Loss(self.num_phases))

    @property
    def manifold(self) -> MinimizerManifold:
        """The unit circle of the first plane."""
        return MinimizerManifold(self.loss, self.dimension - 1)

    @property
    def noise(self) -> CustomNoise:
        """The noise on the last k coordinates, as a factor (D, k)."""
        return CustomNoise(_Factor(self.num_phases))

    @property
    def angular_speed(self) -> float:
        """The angular speed (D − 2)/8, anticlockwise on the limit clock t = kη²."""
        return (self.dimension - 2) / 8

    def point(self, angle: Any = 0.0) -> Float[Array, " D"]:
        """The point of the circle at this angle."""
        angle = jnp.asarray(angle, jnp.result_type(float))
        plane = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        return jnp.concatenate([plane, jnp.zeros(self.num_phases, plane.dtype)])

    def angle(self, point: Float[Array, " D"]) -> Scalar:
        """The angle in (−π, π] of any point whose first two coordinates are not both zero."""
        return jnp.arctan2(point[1], point[0])


def _phases(num_phases: int, point: Float[Array, " D"]) -> Float[Array, "k 2"]:
    """The unit vectors vⱼ."""
    # In NumPy, in double precision: constants of the program in any precision of the point.
    angles = 2 * np.pi * np.arange(num_phases) / num_phases
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1), point.dtype)


class _Loss(eqx.Module):
    num_phases: int = eqx.field(static=True)

    def __call__(self, point: Float[Array, " D"]) -> Scalar:
        plane, rest = point[:2], point[2:]
        ring = (jnp.sum(plane**2) - 1) ** 2 / 8
        return ring + jnp.sum((2 + _phases(self.num_phases, point) @ plane) * rest**2) / 2


class _Factor(eqx.Module):
    num_phases: int = eqx.field(static=True)

    def __call__(self, point: Float[Array, " D"]) -> Float[Array, "D k"]:
        plane = point[:2]
        clockwise = jnp.stack([plane[1], -plane[0]])
        # Angles in NumPy: constants of the program, in the dtype of the point.
        phases = _phases(self.num_phases, point)
        # Off the circle a variance may turn negative: there is then no noise.
        variances = jnp.maximum((1 + phases @ clockwise) * (2 + phases @ plane), 0)
        # Derivative zero, not NaN, where a variance vanishes.
        positive = variances > 0
        roots = jnp.where(positive, jnp.sqrt(jnp.where(positive, variances, 1)), 0)
        return jnp.concatenate([jnp.zeros((2, self.num_phases), point.dtype), jnp.diag(roots)])
