"""Linear networks: their product is found by descent, their factors by the noise of SGD."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import theory
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import LeastSquares
from manifoldflow.manifolds import ZeroLossManifold
from manifoldflow.models._linear_data import AbstractLinearData, Matrix
from manifoldflow.noise import OnlineBatch

Weights = tuple[Matrix, ...]
"""(W_1, …, W_D), from the inputs to the outputs."""


class AbstractLinearNetwork(eqx.Module):
    """A linear network f = W_D … W_1 x on data of linear regressions, with ℓ = ‖f − y‖²."""

    data: eqx.AbstractVar[AbstractLinearData]
    widths: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def weights(self, point: Any) -> Weights:
        """The weights (W_1, …, W_D) of a point."""

    @abc.abstractmethod
    def point(self, weights: Sequence[Any]) -> Any:
        """The point with these weights."""

    def predict(self, point: Any, x: Float[Array, " d_x"]) -> Float[Array, " d_y"]:
        """The output f(x)."""
        for weight in self.weights(point):
            x = weight @ x
        return x

    def example_loss(self, point: Any, example: Any) -> Scalar:
        """The loss ‖f(x) − y‖² of an example, for `symmetry` and `OnlineBatch`."""
        x, y = example
        return jnp.sum((self.predict(point, x) - y) ** 2)

    def noise(self, batch_size: int) -> OnlineBatch:
        """The gradients of SGD: batches of examples drawn anew at every step."""
        return OnlineBatch(self.data.sample, self.example_loss, batch_size)

    @property
    def loss(self) -> LeastSquares:
        """The mean E‖f − y‖² less the part that no linear map can fit: ‖(W_D … W_1 − V)Σ_x^{1/2}‖².

        Least squares on d_x inputs, the columns of the root, so that descent on it is exact.
        """
        values, vectors = jnp.linalg.eigh(self.data.input_covariance)
        # The rows of Σ_x^{1/2} as d_x examples: their squared loss is the expectation over all x.
        inputs = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
        targets = inputs @ self.data.target_map.T
        # L = (scale/2)·Σ r², and E‖f − y‖² has no ½.
        return LeastSquares(inputs, targets, predict=self.predict, scale=2.0)

    @property
    def manifold(self) -> ZeroLossManifold:
        """The factorisations of V; smooth where every width is at least min(d_x, d_y)."""
        return ZeroLossManifold(self.loss)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes (d_x, widths, d_y)."""
        outputs, inputs = self.data.target_map.shape
        return inputs, *self.widths, outputs

    def variances(self, scheme: str) -> tuple[float, ...]:
        """The variances of the entries of W_i: "kaiming" 1/inputs, "xavier" 2/(inputs + outputs).

        References:
            [Ziyin2024, section 5.2], which has 1/(inputs + outputs) for Xavier's.
        """
        pairs = list(zip(self.sizes, self.sizes[1:]))
        if scheme == "kaiming":
            return tuple(1 / inputs for inputs, _ in pairs)
        if scheme == "xavier":
            return tuple(2 / (inputs + outputs) for inputs, outputs in pairs)
        raise ValueError(f'scheme must be "kaiming" or "xavier"; got {scheme!r}.')

    def initial(self, key: Key, variances: Any = "kaiming") -> Any:
        """Independent normal weights.

        Args:
            key: a key of `jax.random`.
            variances: of the entries of each W_i, D numbers; or the name of a scheme.
        """
        given = self.variances(variances) if isinstance(variances, str) else variances
        spread, pairs = jnp.sqrt(jnp.asarray(given, float)), list(zip(self.sizes, self.sizes[1:]))
        if spread.shape != (len(pairs),):
            raise ValueError(f"variances needs {len(pairs)} numbers; got shape {spread.shape}.")
        # One key per layer: layers of one shape would else begin as equals.
        keys = jr.split(key, len(pairs))
        drawn = [jr.normal(k, (outputs, inputs)) for k, (inputs, outputs) in zip(keys, pairs)]
        return self.point([scale * weight for scale, weight in zip(spread, drawn)])

    def product(self, point: Any) -> Matrix:
        """The product W_D … W_1."""
        found, *others = self.weights(point)
        for weight in others:
            found = weight @ found
        return found

    def charges(self, point: Any) -> tuple[Matrix, ...]:
        """The charges W_{i+1}ᵀW_{i+1} − W_iW_iᵀ of hidden layers, conserved by gradient flow."""
        weights = self.weights(point)
        return tuple(after.T @ after - w @ w.T for w, after in zip(weights, weights[1:]))

    def layer_gains(self, point: Any) -> Float[Array, " D"]:
        """The factors by which the layers multiply the second moment of their inputs.

        For the last layer: of what the noise sends back through it, tr(W_DᵀΣ_εW_D)/trΣ_ε. All of
        them are c² in the noise equilibrium, where those between the ends are ‖W_i‖²_F/rank V
        for layers without parts that neither inputs nor outputs reach [Ziyin2024, eq. (19)].
        """
        *layers, last = self.weights(point)
        moments = [self.data.input_covariance]
        for weight in layers:
            moments.append(weight @ moments[-1] @ weight.T)
        traces = jnp.stack([jnp.trace(moment) for moment in moments])
        noise = self.data.noise_covariance
        back = jnp.sum((noise @ last) * last) / jnp.trace(noise)
        return jnp.append(traces[1:] / traces[:-1], back)

    def sharpness(self, point: Any) -> Scalar:
        """The sharpness tr∇²E‖f − y‖², at any point."""
        weights, moment = self.weights(point), self.data.input_covariance
        back = [jnp.asarray(self.sizes[-1], moment.dtype)]
        tail = jnp.eye(self.sizes[-1], dtype=moment.dtype)
        for weight in weights[:0:-1]:
            tail = tail @ weight
            back.append(jnp.sum(tail**2))
        total = jnp.zeros((), moment.dtype)
        # tr∇² is Σ_i 2‖W_D…W_{i+1}‖²·tr(moment of the inputs of layer i): one pass each way.
        for weight, squares in zip(weights, back[::-1]):
            total += 2 * squares * jnp.trace(moment)
            moment = weight @ moment @ weight.T
        return total

    def initial_sharpness(self, variances: Any = "kaiming") -> float:
        """The mean of `sharpness` over the starts of `initial`."""
        given = self.variances(variances) if isinstance(variances, str) else tuple(variances)
        trace = float(jnp.trace(self.data.input_covariance))
        return theory.deep_linear_initial_sharpness(self.sizes, given, trace)

    def equilibrium(self, key: Key) -> Any:
        """The noise equilibrium at a minimum, for noise that is independent of the inputs.

        For examples whose errors depend on the inputs: `deep_linear_equilibrium_of_examples`.
        """
        data = self.data
        covariances = data.input_covariance, data.noise_covariance
        weights = theory.deep_linear_noise_equilibrium(
            data.target_map, *covariances, widths=self.widths, key=key
        )
        return self.point([jnp.asarray(weight) for weight in weights])


class DeepLinear(AbstractLinearNetwork):
    """A deep linear network f = W_D … W_1 x on points (W_1, …, W_D), with ℓ = ‖f − y‖², y = Vx + ε.

    Gradient flow conserves W_{i+1}ᵀW_{i+1} − W_iW_iᵀ. SGD without weight decay forgets its start
    and ends at `equilibrium`: all layers between the first and the last are rescaled isometries of
    one norm, the two at the ends differ by the covariances of inputs and noise. Between the ends, a
    layer wider than the rank of V keeps the additional part as it was at the start: no gradient
    reaches it. So norms may still differ there, `layer_gains` do not.

    Args:
        data: a `LinearStream` or `FiniteData`.
        widths: of the hidden layers, one at least.

    Raises:
        ValueError: no hidden layer, or a width below 1.

    References:
        [Ziyin2024, section 5.3 and Theorem 5.4].

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> stream = mf.models.LinearStream(jnp.array([[2.0, -1.0]]), jnp.ones(2), jnp.ones(1))
        >>> network = mf.models.DeepLinear(stream, widths=[3])
        >>> balanced = network.equilibrium(jr.key(0))
        >>> print(network.product(balanced).round(3))
        [[ 2. -1.]]
    """

    data: AbstractLinearData
    widths: tuple[int, ...] = eqx.field(static=True)

    @checked
    def __init__(self, data: AbstractLinearData, widths: Sequence[int]):
        self.data = data
        self.widths = tuple(checked_count("DeepLinear: widths", width) for width in widths)
        if not self.widths:
            raise ValueError("DeepLinear needs the width of at least one hidden layer.")

    def weights(self, point: Weights) -> Weights:
        return tuple(point)

    def point(self, weights: Sequence[Any]) -> Weights:
        return tuple(weights)


class MatrixFactorization(AbstractLinearNetwork):
    """A matrix factorisation f = UWx on points {"U": (d_y, d), "W": (d, d_x)}, with ℓ = ‖f − y‖².

    The data are y = Vx + ε. SGD ends where WΓ_WWᵀ = UᵀΓ_UU, gradient descent at a place that
    depends on its start. On some data the former is sharper than balanced factors, on others
    flatter.

    Args:
        data: a `LinearStream` or `FiniteData`.
        width: d ≥ 1.

    Raises:
        ValueError: a width below 1.

    References:
        [Ziyin2024, section 5.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> stream = mf.models.LinearStream(jnp.array([[2.0, -1.0]]), jnp.ones(2), jnp.ones(1))
        >>> model = mf.models.MatrixFactorization(stream, width=1)
        >>> point = {"U": jnp.array([[1.0]]), "W": jnp.array([[2.0, -1.0]])}
        >>> print(model.product(point), model.loss(point).round(3))
        [[ 2. -1.]] 0.0
    """

    data: AbstractLinearData
    widths: tuple[int, ...] = eqx.field(static=True)

    @checked
    def __init__(self, data: AbstractLinearData, width: int):
        self.data = data
        self.widths = (checked_count("MatrixFactorization: width", width),)

    def weights(self, point: dict[str, Matrix]) -> Weights:
        return point["W"], point["U"]

    def point(self, weights: Sequence[Any]) -> dict[str, Matrix]:
        return {"W": weights[0], "U": weights[1]}

    def noise_matrices(
        self, point: dict[str, Matrix], noise_scale: Any = 0.5, weight_decay: Any = 0.0
    ) -> tuple[Matrix, Matrix]:
        """The matrices Γ_W = 2σ²E[‖r‖²xxᵀ] + γI and Γ_U = 2σ²E[‖x‖²rrᵀ] + γI at this point."""
        moments = self.data.noise_moments(self.product(point))
        of_inputs, of_outputs = (
            2 * noise_scale * m + weight_decay * jnp.eye(len(m), dtype=m.dtype) for m in moments
        )
        return of_inputs, of_outputs

    def sides(
        self, point: dict[str, Matrix], noise_scale: Any = 0.5, weight_decay: Any = 0.0
    ) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
        """The matrices WΓ_WWᵀ and UᵀΓ_UU, equal in the noise equilibrium."""
        of_inputs, of_outputs = self.noise_matrices(point, noise_scale, weight_decay)
        w, u = point["W"], point["U"]
        return w @ of_inputs @ w.T, u.T @ of_outputs @ u

    def decayed_equilibrium(
        self, key: Key, *, noise_scale: Any, weight_decay: Any
    ) -> dict[str, Matrix]:
        """The balanced factors of V under γ(‖U‖² + ‖W‖²), to lowest order in γ: UW stays V."""
        moments = self.data.noise_moments(self.data.target_map)
        matrices = (
            2 * noise_scale * np.asarray(m) + weight_decay * np.eye(len(m)) for m in moments
        )
        weights = theory.two_layer_noise_equilibrium(
            self.data.target_map, *matrices, width=self.widths[0], key=key
        )
        return self.point([jnp.asarray(weight) for weight in weights])
