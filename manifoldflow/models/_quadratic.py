"""Linear models with squared parameters, in which label noise finds sparse solutions."""

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
from manifoldflow.models._regression import AbstractRegression, mean_squares

Pair = dict[str, Float[Array, " d"]]


class OverparametrizedLinear(AbstractRegression):
    """The model f_i = ⟨z_i, u² − v²⟩ on points {"u": (d,), "v": (d,)}, L = (1/2n)Σ(f_i − y_i)².

    Gradient flow keeps uⱼvⱼ: from u = v = α1 it picks the interpolant that minimises Q_α
    (`theory.kernel_rich_potential`), between the least ℓ₁ norm (α → 0) and the least ℓ₂ norm
    (α → ∞). Label noise makes them decay, like a
    start that shrinks, and ends at the interpolant of least weighted ℓ₁ norm, which recovers a
    κ-sparse truth from O(κ ln d) examples. The zero-loss set is a manifold where z has full
    rank and no coordinate is 0.

    Args:
        inputs: z, (n, d).
        targets: y, (n,).

    References:
        [LiWangArora2022, section 6; Woodworth2020; Ma2022, section 9.3].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> inputs = jnp.array([[1.0, 0.0, 0.8], [0.0, 1.0, 0.8]])
        >>> model = mf.models.OverparametrizedLinear(inputs, jnp.array([0.8, 0.8]))
        >>> print(model.limit().round(3) + 0.0)  # label noise ends at the sparse fit
        [0. 0. 1.]
        >>> print(model.weights(model.initial(scale=0.1)))
        [0. 0. 0.]
    """

    loss: LeastSquares

    @checked
    def __init__(self, inputs: Any, targets: Any):
        self.loss = mean_squares(inputs, targets, _Difference())

    def initial(self, scale: Any = 1.0) -> Pair:
        """The start u = v = scale, which prefers no sign."""
        u = jnp.full(self.inputs.shape[1], scale, self.inputs.dtype)
        return {"u": u, "v": u}

    def random(self, key: Key, scale: Any = 1.0) -> Pair:
        """Independent u and v, normal with this standard deviation."""
        # Two keys: with one, u = v, the start that has no weights.
        keys, size = jr.split(key), self.inputs.shape[1]
        u, v = (scale * jr.normal(k, (size,), self.inputs.dtype) for k in keys)
        return {"u": u, "v": v}

    def weights(self, point: Pair) -> Float[Array, " d"]:
        """The weights w = u² − v²."""
        return point["u"] ** 2 - point["v"] ** 2

    def charges(self, point: Pair) -> Float[Array, " d"]:
        """The charges uⱼvⱼ, conserved by gradient flow.

        Label noise of Σ = cH shrinks them by e^{−c sⱼ t}.
        """
        return point["u"] * point["v"]

    @checked
    def lift(self, weights: Float[Array, " d"], charges: Float[Array, " d"]) -> Pair:
        """The point with u² − v² = w and uⱼvⱼ = qⱼ: the inverse of `weights` and `charges`.

            uⱼ² = (√(wⱼ² + 4qⱼ²) + wⱼ)/2,   vⱼ² = (√(wⱼ² + 4qⱼ²) − wⱼ)/2,

        to rounding also where one of them is tiny beside the other. Of the signs that are open
        u ≥ 0 is taken, and v has the sign of q. Where q is 0 the point is on the boundary of the
        manifold: u or v is 0.

        Args:
            weights: w, (d,), such as `flow` gives.
            charges: q, (d,), such as `theory.overparametrized_linear_charges` gives.
        """
        square = weights**2 / 4 + charges**2
        # The inner `where` keeps the infinite slope of √0 out of the derivative: 0·∞ is NaN.
        half = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        larger = half + jnp.abs(weights) / 2
        is_there = larger > 0
        larger = jnp.where(is_there, jnp.sqrt(jnp.where(is_there, larger, 1)), 0)
        # From uv = q, not from the difference of roots, which cancels where w ≫ q.
        smaller = charges / jnp.where(is_there, larger, 1)
        is_positive = weights >= 0
        u = jnp.where(is_positive, larger, jnp.abs(smaller))
        v = jnp.where(is_positive, smaller, jnp.where(charges < 0, -larger, larger))
        return {"u": u, "v": v}

    @property
    def decay_rates(self) -> Float[Array, " d"]:
        """The rates sⱼ = (4/n)Σᵢ z²ᵢⱼ; tr∇²L = Σⱼ sⱼ(u²ⱼ + v²ⱼ) on the manifold."""
        return 4 * jnp.mean(self.inputs**2, axis=0)

    def landing(self, scale: float) -> Float[np.ndarray, " d"]:
        """The weights at which gradient flow from `initial(scale)` lands: argmin Q_scale."""
        return theory.kernel_rich_interpolant(self.inputs, self.targets, scale=scale)

    def limit(self) -> Float[np.ndarray, " d"]:
        """The weights at which label noise ends: the weighted-ℓ₁ interpolant."""
        return theory.weighted_l1_interpolant(self.inputs, self.targets)

    def flow(self, point: Pair, time: Any, noise_constant: float = 1.0) -> np.ndarray:
        """The weights along the label-noise flow from a landing of gradient flow, closed form."""
        u, v = point["u"], point["v"]
        return theory.overparametrized_linear_flow(
            self.inputs, self.targets, u, v, time=time, noise_constant=noise_constant
        )

    def limit_rates(self, noise_constant: float = 1.0) -> dict[str, Float[np.ndarray, " d"]]:
        """The rates at which |uⱼ| and |vⱼ| decay at late times of the label-noise flow.

        0 for what stays. The weights go to `limit()` at twice the slowest of the rates of
        coordinates where both decay, or of the others, c·sⱼ, if that is slower.
        """
        u, v = theory.overparametrized_linear_rates(
            self.inputs, self.targets, noise_constant=noise_constant
        )
        return {"u": u, "v": v}


class QuadraticallyParametrized(AbstractRegression):
    """The model f_i = ⟨β ⊙ β, x_i⟩ on points (d,), with L = (1/4n)Σ(f_i − y_i)².

    From β = α1 with a small α, gradient descent that stops in time recovers a sparse truth;
    on the manifold the limit of gradient flow minimises Σ β²ⱼ(ln(β²ⱼ/α²) − 1).

    Args:
        inputs: x, (n, d).
        targets: y, (n,).

    References:
        [Ma2022, section 9.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> model = mf.models.QuadraticallyParametrized(jnp.array([[1.0, 1.0]]), jnp.array([2.0]))
        >>> point = model.initial(scale=1.0)
        >>> print(model.weights(point), model.loss(point))
        [1. 1.] 0.0
    """

    loss: LeastSquares

    @checked
    def __init__(self, inputs: Any, targets: Any):
        self.loss = mean_squares(inputs, targets, _Square(), divisor=2)

    def initial(self, scale: Any) -> Float[Array, " d"]:
        """The start β = scale·1."""
        return jnp.full(self.inputs.shape[1], scale, self.inputs.dtype)

    def weights(self, point: Float[Array, " d"]) -> Float[Array, " d"]:
        """The weights β ⊙ β."""
        return point**2

    def recovery_window(self, scale: float, learning_rate: float) -> tuple[float, float]:
        """The steps of gradient descent between which a {0, 1}-sparse truth is recovered.

        log(d/α)/η and 1/(η√(dα)), up to constants; `theory.recovery_stages` has bounds with
        constants, for these inputs.

        References:
            [Ma2022, Theorem 9.4].
        """
        size = self.inputs.shape[1]
        return float(np.log(size / scale) / learning_rate), float(
            1 / (learning_rate * np.sqrt(size * scale))
        )


class _Difference(eqx.Module):
    def __call__(self, point: Pair, x: Float[Array, " d"]) -> Scalar:
        return jnp.vdot(x, point["u"] ** 2 - point["v"] ** 2)


class _Square(eqx.Module):
    def __call__(self, point: Float[Array, " d"], x: Float[Array, " d"]) -> Scalar:
        return jnp.vdot(x, point**2)


@checked
def sparse_regression(
    key: Key,
    num_examples: int,
    num_features: int,
    sparsity: int,
    *,
    design: str = "boolean",
) -> tuple[Float[Array, "n d"], Float[Array, " n"], Float[Array, " d"]]:
    """Noiseless linear data of a sparse truth.

    Args:
        key: a key of `jax.random`.
        num_examples: n.
        num_features: d.
        sparsity: κ ≤ d, entries of the truth that are not 0: the first ones, ±1.
        design: "boolean" (±1) or "gaussian" inputs, independent.

    Returns:
        Inputs (n, d), targets (n,) and the truth (d,).

    Raises:
        ValueError: another design, or more entries than features.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import manifoldflow as mf
        >>> x, y, truth = mf.models.sparse_regression(jr.key(0), 6, 10, sparsity=2)
        >>> print(x.shape, jnp.abs(truth).sum(), bool(jnp.allclose(y, x @ truth)))
        (6, 10) 2.0 True
    """
    n, d = checked_count("num_examples", num_examples), checked_count("num_features", num_features)
    if not 0 <= sparsity <= d:
        raise ValueError(f"sparsity must be between 0 and num_features={d}; got {sparsity}.")
    draws = {"boolean": jr.rademacher, "gaussian": jr.normal}
    if design not in draws:
        raise ValueError(f'design must be "boolean" or "gaussian"; got {design!r}.')
    of_inputs, of_truth = jr.split(key)
    inputs = draws[design](of_inputs, (n, d), jnp.result_type(float))
    signs = jr.rademacher(of_truth, (d,), jnp.result_type(float))
    truth = jnp.where(jnp.arange(d) < sparsity, signs, 0.0)
    return inputs, inputs @ truth, truth
