"""Data of linear regressions with vector outputs: an endless stream, or a finite set."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_floats, is_traced
from manifoldflow._types import Key

Batch = tuple[Float[Array, "N d_x"], Float[Array, "N d_y"]]
Matrix = Float[Array, "_ _"]


class AbstractLinearData(eqx.Module):
    """Inputs x with outputs y, and the moments that determine the ends of linear networks."""

    target_map: eqx.AbstractVar[Matrix]
    """V, the best linear map from x to y."""

    @abc.abstractmethod
    def sample(self, key: Key, num_examples: int) -> Batch:
        """Independent draws of examples (x, y)."""

    @property
    @abc.abstractmethod
    def input_covariance(self) -> Matrix:
        """The covariance of the inputs, Σ_x = E[xxᵀ]."""

    @property
    @abc.abstractmethod
    def noise_covariance(self) -> Matrix:
        """The covariance of the noise, Σ_ε = E[εεᵀ] for ε = y − Vx."""

    @abc.abstractmethod
    def noise_moments(self, linear_map: Matrix) -> tuple[Matrix, Matrix]:
        """The moments E[‖r‖²xxᵀ] and E[‖x‖²rrᵀ] for the residuals r = Px − y of a linear map P."""


class LinearStream(AbstractLinearData):
    """A stream y = Vx + ε with independent normal x and ε of mean 0, new at every draw.

    Args:
        target_map: V, (d_y, d_x).
        input_covariance: Σ_x, (d_x, d_x), or its diagonal (d_x,).
        noise_covariance: Σ_ε, (d_y, d_y), or its diagonal (d_y,).

    Raises:
        ValueError: shapes that do not fit, a covariance that is not positive semidefinite.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> stream = mf.models.LinearStream(jnp.array([[2.0, -1.0]]), jnp.ones(2), jnp.zeros(1))
        >>> x, y = stream.sample(jr.key(0), 5)
        >>> print(y.shape, bool(jnp.allclose(y[:, 0], 2 * x[:, 0] - x[:, 1], atol=1e-5)))
        (5, 1) True
    """

    target_map: Matrix
    input_root: Matrix
    noise_root: Matrix

    @checked
    def __init__(self, target_map: Any, input_covariance: Any, noise_covariance: Any):
        self.target_map = checked_floats("LinearStream: target_map", target_map)
        if self.target_map.ndim != 2:
            raise ValueError(f"target_map must be (d_y, d_x); got {self.target_map.shape}.")
        outputs, inputs = self.target_map.shape
        self.input_root = _root("input_covariance", input_covariance, inputs)
        self.noise_root = _root("noise_covariance", noise_covariance, outputs)

    def sample(self, key: Key, num_examples: int) -> Batch:
        of_x, of_noise = jr.split(key)
        draw = lambda key, root: jr.normal(key, (num_examples, len(root)), root.dtype) @ root
        x = draw(of_x, self.input_root)
        return x, x @ self.target_map.T + draw(of_noise, self.noise_root)

    @property
    def input_covariance(self) -> Matrix:
        return self.input_root @ self.input_root

    @property
    def noise_covariance(self) -> Matrix:
        return self.noise_root @ self.noise_root

    def noise_moments(self, linear_map: Matrix) -> tuple[Matrix, Matrix]:
        """The moments (tr Σ_r)Σ_x + 2Σ_xDᵀDΣ_x and (tr Σ_x)Σ_r + 2DΣ_x²Dᵀ, with D = P − V."""
        gap, sigma = linear_map - self.target_map, self.input_covariance
        # Isserlis' theorem for normal x: E[‖Dx‖²xxᵀ] = tr(DΣDᵀ)Σ + 2ΣDᵀDΣ.
        across = gap @ sigma
        residual = across @ gap.T + self.noise_covariance
        of_inputs = jnp.trace(residual) * sigma + 2 * across.T @ across
        return of_inputs, jnp.trace(sigma) * residual + 2 * across @ across.T


class FiniteData(AbstractLinearData):
    """A finite set of N examples, drawn with replacement.

    Args:
        inputs: x, (N, d_x).
        targets: y, (N, d_y).

    Raises:
        ValueError: shapes that do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> data = mf.models.FiniteData(x, x @ jnp.array([[2.0], [-1.0]]))
        >>> print(data.target_map.round(3))
        [[ 2. -1.]]
    """

    inputs: Float[Array, "N d_x"]
    targets: Float[Array, "N d_y"]

    @checked
    def __init__(self, inputs: Any, targets: Any):
        self.inputs = checked_floats("FiniteData: inputs", inputs)
        self.targets = checked_floats("FiniteData: targets", targets)
        if self.inputs.ndim != 2 or self.targets.ndim != 2 or len(self.inputs) != len(self.targets):
            raise ValueError(
                f"The inputs must be (N, d_x) and the targets (N, d_y); got {self.inputs.shape} "
                f"and {self.targets.shape}."
            )

    def sample(self, key: Key, num_examples: int) -> Batch:
        # With replacement: then batches are independent examples, as the formulas for SGD assume.
        drawn = jr.randint(key, (num_examples,), 0, len(self.inputs))
        return self.inputs[drawn], self.targets[drawn]

    @property
    def target_map(self) -> Matrix:
        """The least-squares map, of least norm where there are several."""
        return jnp.linalg.lstsq(self.inputs, self.targets)[0].T

    @property
    def input_covariance(self) -> Matrix:
        return self.inputs.T @ self.inputs / len(self.inputs)

    @property
    def noise_covariance(self) -> Matrix:
        residuals = self._residuals(self.target_map)
        return residuals.T @ residuals / len(residuals)

    def noise_moments(self, linear_map: Matrix) -> tuple[Matrix, Matrix]:
        x, r = self.inputs, self._residuals(linear_map)
        weighted = lambda a, b: (a.T * jnp.sum(b**2, axis=1)) @ a / len(a)
        return weighted(x, r), weighted(r, x)

    def _residuals(self, linear_map: Matrix) -> Float[Array, "N d_y"]:
        return self.inputs @ linear_map.T - self.targets


def _root(name: str, covariance: Any, size: int) -> Matrix:
    """The symmetric root of a covariance, or of one that is given by its diagonal."""
    array = checked_floats(f"LinearStream: {name}", covariance)
    array = jnp.diag(array) if array.ndim == 1 else array
    if array.shape != (size, size):
        raise ValueError(
            f"{name} must be ({size}, {size}), or ({size},) for a diagonal; got {array.shape}."
        )
    if not is_traced(array):
        known = np.asarray(array)  # by NumPy: within jit JAX traces operations on constants as well
        floor = _precision.eps_of_dtype(array) ** 0.5 * np.max(np.abs(known))
        is_symmetric = np.max(np.abs(known - known.T)) <= floor
        if not is_symmetric or np.linalg.eigvalsh(known)[0] < -floor:
            raise ValueError(f"{name} must be symmetric, without negative eigenvalues.")
    # Not Cholesky: a covariance may be singular.
    values, vectors = jnp.linalg.eigh(array)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
