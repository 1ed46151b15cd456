"""Two-layer networks with a fixed second layer, whose flattest fits have equal neurons."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, theory
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_floats
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import LeastSquares
from manifoldflow.manifolds import ZeroLossManifold

Weights = Float[Array, "m d"]


class TwoLayerNet(eqx.Module):
    """A network f_i = Σⱼ wⱼ φ(θⱼ·x_i) with fixed w, on points θ: (m, d), with L = Σ(f_i − y_i)².

    For activations with φ', φ''' > 0 the flattest fit has the same features in all neurons,
    and no other point of the zero-loss manifold is stationary.

    Args:
        inputs: x, (n, d).
        targets: y, (n,).
        width: m.
        activation: φ, number → number; z³ + z by default.
        second_layer: w, (m,), fixed; ones by default.

    References:
        [Gatmiry2024].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> net = mf.models.TwoLayerNet(jnp.eye(2), jnp.array([4.0, 20.0]), width=2)
        >>> print(net.minimizer().round(3))  # z³ + z is 2 at 1 and 10 at 2
        [[1. 2.]
         [1. 2.]]
        >>> print(net.loss(jnp.array([[1.0, 2.0], [1.0, 2.0]])))
        0.0
    """

    inputs: Float[Array, "n d"]
    targets: Float[Array, " n"]
    width: int = eqx.field(static=True)
    activation: Callable[..., Any]
    second_layer: Float[Array, " m"]

    @checked
    def __init__(
        self,
        inputs: Any,
        targets: Any,
        width: int,
        activation: Callable[[Any], Any] | None = None,
        second_layer: Any = None,
    ):
        self.inputs = checked_floats("TwoLayerNet: inputs", inputs)
        self.targets = checked_floats("TwoLayerNet: targets", targets)
        self.width = checked_count("TwoLayerNet: width", width)
        self.activation = _tree.as_pytree_callable(_cubic if activation is None else activation)
        layer = jnp.ones(self.width) if second_layer is None else second_layer
        self.second_layer = checked_floats("TwoLayerNet: second_layer", layer)
        if self.inputs.ndim != 2 or self.targets.shape != self.inputs.shape[:1]:
            raise ValueError(
                f"The inputs must be (n, d) and the targets (n,); got shapes "
                f"{self.inputs.shape} and {self.targets.shape}."
            )
        if self.second_layer.shape != (self.width,):
            raise ValueError(
                f"second_layer must have shape ({self.width},); got {self.second_layer.shape}."
            )

    @property
    def loss(self) -> LeastSquares:
        """The loss L, the sum of squares."""
        predict = _Network(self.activation, self.second_layer)
        return LeastSquares(self.inputs, self.targets, predict=predict, scale=2.0)

    @property
    def manifold(self) -> ZeroLossManifold:
        """The networks that fit all targets."""
        return ZeroLossManifold(self.loss)

    def initial(self, key: Key, scale: Any = 1.0) -> Weights:
        """Independent normal weights with standard deviation scale/√d."""
        size = self.inputs.shape[1]
        return scale * jr.normal(key, (self.width, size), self.inputs.dtype) / np.sqrt(size)

    def features(self, point: Weights) -> Float[Array, "m n"]:
        """The features θⱼ·x_i."""
        return _precision.matmul(point, self.inputs.T)

    def flatness(self, point: Weights) -> Scalar:
        """The flatness F = Σᵢⱼ wⱼ²φ'(θⱼ·x_i)²|x_i|²; tr∇²L = 2F on the manifold."""
        # ∂f_i/∂θⱼ = wⱼφ′(θⱼ·x_i)x_i, so that F = ½ tr∇²L is a sum over neurons and examples.
        slope = jax.vmap(jax.vmap(jax.grad(self.activation)))(self.features(point))
        squares = jnp.sum(self.inputs**2, axis=1)
        return jnp.sum(self.second_layer[:, None] ** 2 * slope**2 * squares)

    def minimizer(self) -> Float[np.ndarray, "m n"]:
        """The features of the flattest fit."""
        return theory.two_layer_minimizer(
            self.targets, self.width, self.activation, second_layer=self.second_layer
        )


def _cubic(z: Any) -> Any:
    return z**3 + z


class _Network(eqx.Module):
    activation: Callable[..., Any]
    second_layer: Float[Array, " m"]

    def __call__(self, point: Weights, x: Float[Array, " d"]) -> Scalar:
        # A fixed layer in float64 would promote a point in float32.
        layer = self.second_layer.astype(point.dtype)
        return jnp.vdot(layer, self.activation(point @ x))
