"""Regressions with the mean squared loss; linear regression is the first."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, theory
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_floats
from manifoldflow._types import Key, Scalar
from manifoldflow.losses import LeastSquares
from manifoldflow.manifolds import ZeroLossManifold


class AbstractRegression(eqx.Module):
    """A model of n targets by n inputs of d features, with a squared loss."""

    loss: eqx.AbstractVar[LeastSquares]

    @property
    def manifold(self) -> ZeroLossManifold:
        """The points that fit all targets."""
        return ZeroLossManifold(self.loss)

    @property
    def inputs(self) -> Float[Array, "n d"]:
        return self.loss.inputs

    @property
    def targets(self) -> Float[Array, " n"]:
        return self.loss.targets


def mean_squares(
    inputs: Any, targets: Any, predict: Callable[..., Any], *, divisor: int = 1
) -> LeastSquares:
    """The loss (1/(2·divisor·n))Σ(f_i − y_i)² for inputs (n, d) and targets (n,)."""
    inputs, targets = checked_floats("inputs", inputs), checked_floats("targets", targets)
    if inputs.ndim != 2 or targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"The inputs must be (n, d) and the targets (n,); got shapes {inputs.shape} and "
            f"{targets.shape}."
        )
    return LeastSquares(inputs, targets, predict=predict, scale=1 / (divisor * len(targets)))


class LinearRegression(AbstractRegression):
    """Linear regression f_i = ⟨β, x_i⟩ on points (d,), with L = (1/2n)Σ(f_i − y_i)².

    With more features than examples the perfect fits are an affine space. Gradient descent and
    gradient flow never leave β⁰ + span{x_i}, so they end at the fit that is nearest to their start:
    X⁺y + (I − X⁺X)β⁰, the fit of least norm from 0. Label noise does not move it: ∇²L is constant.

    Args:
        inputs: x, (n, d).
        targets: y, (n,).

    References:
        [Ma2022, section 9.1].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> model = mf.models.LinearRegression(jnp.array([[1.0, 1.0]]), jnp.array([2.0]))
        >>> print(
        ...     model.limit().round(3), model.limit(jnp.array([2.0, 1.0])).round(3)
        ... )  # nearest fits
        [1. 1.] [1.5 0.5]
    """

    loss: LeastSquares

    @checked
    def __init__(self, inputs: Any, targets: Any):
        self.loss = mean_squares(inputs, targets, _Linear())

    def initial(self) -> Float[Array, " d"]:
        """The start β = 0."""
        return jnp.zeros(self.inputs.shape[1], self.inputs.dtype)

    def random(self, key: Key, scale: Any = 1.0) -> Float[Array, " d"]:
        """Independent normal coordinates with this standard deviation."""
        return scale * jr.normal(key, self.inputs.shape[1:], self.inputs.dtype)

    def limit(self, start: Any = None) -> Float[np.ndarray, " d"]:
        """The end of gradient flow and gradient descent from `start` (0 if not given)."""
        return theory.min_norm_interpolant(self.inputs, self.targets, start)

    @property
    def decay_rates(self) -> Float[Array, " modes"]:
        """The largest min(n, d) eigenvalues λ of ∇²L = XᵀX/n, the largest first.

        The distance to the limit falls like e^{−λt} along gradient flow and like (1 − ηλ)^k in
        gradient descent, which converges for η < 2/λ₁.
        """
        return jnp.linalg.svdvals(self.inputs) ** 2 / len(self.inputs)

    def flow(self, start: Any, time: Any) -> Float[np.ndarray, " d"]:
        """Gradient flow from `start` at this time, in closed form."""
        return self._decayed(start, np.exp(-np.asarray(self.decay_rates) * time))

    def descent(self, start: Any, learning_rate: Any, num_steps: int) -> np.ndarray:
        """Gradient descent from `start` after this many steps, in closed form."""
        factors = 1 - np.asarray(learning_rate * self.decay_rates)
        return self._decayed(start, factors**num_steps)

    def _decayed(self, start: Any, factors: np.ndarray) -> Float[np.ndarray, " d"]:
        # Along each singular vector of X descent is a scalar recursion: (1 − ηλ)^k, or e^{−λt}.
        modes = np.linalg.svd(np.asarray(self.inputs), full_matrices=False)[2]
        limit = self.limit(start)
        return limit + (factors * (modes @ (np.asarray(start) - limit))) @ modes


class _Linear(eqx.Module):
    def __call__(self, point: Float[Array, " d"], x: Float[Array, " d"]) -> Scalar:
        return _precision.vdot(x, point)
