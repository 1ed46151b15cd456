"""The flow along the orbit of a symmetry, driven by the noise of SGD."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked, checked_but
from manifoldflow._clock import GradientClock
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._base import AbstractFlow
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.symmetry import (
    ExponentialSymmetry,
    orbit_velocity,
    SGDNoise,
    symmetries_of,
)


class NoetherFlow(AbstractFlow):
    """The flow θ' = Aθ·G(θ)/‖Aθ‖² along the orbit e^{λA}θ, so that dC/dt = G, on the clock kη.

    It is the mean effect of SGD on the charge C = ½θᵀAθ, by itself: the loss does not change.
    It ends at the noise equilibrium of its start; see `symmetry.noise_equilibrium`.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k that commute; then θ' lies in
            the span of all A_iθ, with dC_i/dt = G_i for each.
        example_loss: ℓ(point, example) → scalar, without the decay.
        data: PyTree of arrays with a leading axis of examples.
        noise_scale: σ² = η/(2S), learning rate over twice the batch size.
        weight_decay: γ, where γ‖θ‖² is added to the loss.
        manifold: one that holds the orbit, on which `solve` keeps every step. For the weights
            with the predictions of the start it is
            `ZeroLossManifold(LeastSquares(inputs, predictions, predict))`. By default orbits
            are kept to the tolerance of the solver.

    Raises:
        ValueError: wrong data, σ² or γ; no manifold.

    References:
        [Ziyin2024, eq. (7)].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> scale = mf.symmetry.ExponentialSymmetry(jnp.array([1.0, -1.0]))
        >>> example_loss = lambda w, example: (w[0] * w[1] * example[0] - example[1]) ** 2
        >>> data = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
        >>> flow = mf.NoetherFlow(scale, example_loss, data, noise_scale=0.1)
        >>> x = jnp.array([2.0, 0.5])  # the drift is along (w₀, −w₁), which keeps w₀w₁
        >>> print(f"{flow.drift(x) @ x[::-1]:.4f}", flow.drift(x)[0] < 0)
        0.0000 True
    """

    symmetries: tuple[ExponentialSymmetry, ...]
    noise: SGDNoise
    manifold: AbstractManifold | None

    @checked_but("manifold")
    def __init__(
        self,
        symmetry: ExponentialSymmetry | Sequence[ExponentialSymmetry],
        example_loss: Callable[..., Any],
        data: PyTree[Any],
        *,
        noise_scale: Any,
        weight_decay: Any = 0.0,
        manifold: AbstractManifold | None = None,
    ):
        # A tuple, so that k symmetries are part of the structure and not of the data.
        self.symmetries = symmetries_of(symmetry)
        self.noise = SGDNoise(
            example_loss,
            data,
            noise_scale=noise_scale,
            weight_decay=weight_decay,
            name="NoetherFlow",
        )
        if not isinstance(manifold, AbstractManifold | None):
            raise ValueError(
                "NoetherFlow: manifold must be one that holds the orbit, such as a "
                f"ZeroLossManifold, or None; got {type(manifold).__name__}."
            )
        self.manifold = manifold

    @property
    def clock(self) -> GradientClock:
        """The clock Ση of gradient flow."""
        return GradientClock()

    def split(self, point: Point) -> tuple[Coordinates, Point]:
        return _tree.split(point)

    @checked
    @eqx.filter_jit
    def drift(self, point: Point) -> Tangent:
        return orbit_velocity(self.symmetries, self.noise, point)
