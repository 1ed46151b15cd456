"""Nonlinear networks of two layers whose layers the noise of SGD aligns, or lets grow."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import LeastSquares
from manifoldflow.models._linear_data import AbstractLinearData, Matrix
from manifoldflow.noise import OnlineBatch
from manifoldflow.symmetry import ExponentialSymmetry, scaling

Layers = dict[str, Matrix]
KINDS = ("A", "B")


class AbstractTwoLayers(eqx.Module):
    """A network on points {"U": (d_y, d), "W": (d, d_x)}, with ℓ = ‖f − y‖²."""

    data: eqx.AbstractVar[AbstractLinearData]
    width: eqx.AbstractVar[int]

    @abc.abstractmethod
    def predict(self, point: Layers, x: Float[Array, " d_x"]) -> Float[Array, " d_y"]:
        """The output f(x)."""

    def example_loss(self, point: Layers, example: Any) -> Scalar:
        """The loss ‖f(x) − y‖² of an example, for `symmetry` and `OnlineBatch`."""
        x, y = example
        return jnp.sum((self.predict(point, x) - y) ** 2)

    def noise(self, batch_size: int) -> OnlineBatch:
        """The gradients of SGD: batches of examples drawn anew at every step."""
        return OnlineBatch(self.data.sample, self.example_loss, batch_size)

    def loss(self, key: Key, num_examples: int) -> LeastSquares:
        """The mean of ‖f − y‖² over examples that are drawn once, for descent without noise."""
        inputs, targets = self.data.sample(key, num_examples)
        # L = (scale/2)·Σ r², and a mean of ‖f − y‖² has no ½.
        return LeastSquares(inputs, targets, predict=self.predict, scale=2 / num_examples)

    def initial(self, key: Key, scale: Any = 1.0) -> Layers:
        """Independent normal weights with standard deviation scale/√inputs in each layer."""
        outputs, inputs = self.data.target_map.shape
        keys, shapes = jr.split(key), ((outputs, self.width), (self.width, inputs))
        drawn = [scale * jr.normal(k, s) / jnp.sqrt(s[1]) for k, s in zip(keys, shapes)]
        return {"U": drawn[0], "W": drawn[1]}


class NonlinearFactorization(AbstractTwoLayers):
    """The network f = Uφ(Wx): a matrix factorisation with an activation between its factors.

    As for the linear network, SGD makes the two matrices of `representations` similar; descent
    without noise does not.

    Args:
        data: a `LinearStream` or `FiniteData`.
        width: d.
        activation: φ, number → number: `jnp.tanh`, `jax.nn.swish`, `jax.nn.relu`,
            `jax.nn.leaky_relu`, …

    References:
        [Ziyin2024, Figures 6 and 9].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> stream = mf.models.LinearStream(jnp.array([[2.0, -1.0]]), jnp.ones(2), jnp.ones(1))
        >>> model = mf.models.NonlinearFactorization(stream, width=1, activation=jnp.tanh)
        >>> point = {"U": jnp.array([[2.0]]), "W": jnp.array([[1.0, 0.0]])}
        >>> print(model.predict(point, jnp.array([0.5, 3.0])).round(3), model.alignment(point))
        [0.924] 1.0
    """

    data: AbstractLinearData
    width: int = eqx.field(static=True)
    activation: Callable[..., Any]

    @checked
    def __init__(self, data: AbstractLinearData, width: int, activation: Callable[[Any], Any]):
        self.data = data
        self.width = checked_count("NonlinearFactorization: width", width)
        self.activation = _tree.as_pytree_callable(activation)

    def predict(self, point: Layers, x: Float[Array, " d_x"]) -> Float[Array, " d_y"]:
        return point["U"] @ self.activation(point["W"] @ x)

    def representations(self, point: Layers) -> tuple[Matrix, Matrix]:
        """The matrices WΣ_xWᵀ/trΣ_x, of the inputs of the hidden layer, and UᵀΣ_εU/trΣ_ε."""
        w, u = point["W"], point["U"]
        bars = self.data.input_covariance, self.data.noise_covariance
        of_inputs, of_noise = (sigma / jnp.trace(sigma) for sigma in bars)
        return w @ of_inputs @ w.T, u.T @ of_noise @ u

    def alignment(self, point: Layers) -> Scalar:
        """The cosine of the two `representations`, as vectors of d² numbers."""
        a, b = self.representations(point)
        return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


class ScaleInvariantNet(AbstractTwoLayers):
    """Two tanh layers that only enter normalised: SGD lets their norm grow for ever.

    Kind "A" is f = Uφ(Wx/‖U‖)/‖W‖, invariant when both layers are scaled by one number. Kind "B"
    is f = Uφ(Wx/‖W‖)/‖U‖, invariant under the scaling of each layer alone. Gradient flow conserves
    the norms; SGD has d‖θ‖²/dt = −4γ‖θ‖² + 2σ² tr Σ, for every layer with its own invariance as
    well.

    Args:
        data: a `LinearStream` or `FiniteData`.
        width: d.
        kind: "A" or "B".

    Raises:
        ValueError: a width below 1, another kind.

    References:
        [Ziyin2024, section A.1 and Figure 7].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> stream = mf.models.LinearStream(jnp.array([[2.0, -1.0]]), jnp.ones(2), jnp.ones(1))
        >>> model = mf.models.ScaleInvariantNet(stream, width=1, kind="B")
        >>> x, weights = jnp.array([1.0, 1.0]), {"U": jnp.array([[3.0]]), "W": jnp.ones((1, 2))}
        >>> larger = {"U": 5 * weights["U"], "W": 2 * weights["W"]}
        >>> print(model.predict(weights, x).round(3), model.predict(larger, x).round(3))
        [0.888] [0.888]
    """

    data: AbstractLinearData
    width: int = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    @checked
    def __init__(self, data: AbstractLinearData, width: int, kind: str):
        self.data = data
        self.width = checked_count("ScaleInvariantNet: width", width)
        self.kind = kind
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")

    def predict(self, point: Layers, x: Float[Array, " d_x"]) -> Float[Array, " d_y"]:
        u, w = point["U"], point["W"]
        of_u, of_w = jnp.linalg.norm(u), jnp.linalg.norm(w)
        inner, outer = (of_u, of_w) if self.kind == "A" else (of_w, of_u)
        return u @ jnp.tanh(w @ x / inner) / outer

    def symmetries(self, point: Layers) -> tuple[ExponentialSymmetry, ...]:
        """The scaling of both layers, or for kind "B" the scalings of U and of W."""
        if self.kind == "A":
            return (scaling(point),)
        return scaling(point, lambda p: p["U"]), scaling(point, lambda p: p["W"])

    def squared_norms(self, point: Layers) -> dict[str, Scalar]:
        """The squared norms ‖U‖² and ‖W‖²."""
        return jax.tree.map(lambda leaf: jnp.sum(leaf**2), point)
