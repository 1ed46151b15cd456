"""The potential between the ℓ₁ and the ℓ₂ norm that gradient flow minimises."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import finite

# From where on arcsinh(x/2) is log x to rounding.
_LARGE = 1e9


@checked_concrete
def kernel_rich_potential(
    weights: Num[ArrayLike, "*batch d"], *, scale: Num[ArrayLike, "..."]
) -> Float[np.ndarray, "*batch"]:
    """The potential Q_α(θ) = Σⱼ αⱼ²·q(θⱼ/αⱼ²) that gradient flow on ⟨w₊² − w₋², x⟩ minimises.

    It is called the hyperbolic entropy: q(z) = 2 − √(4 + z²) + z·arcsinh(z/2), so that ∂Q_α/∂θⱼ =
    arcsinh(θⱼ/(2αⱼ²)). Among all θ with Xθ = y gradient flow from w₊ = w₋ = α ends at the minimum
    of Q_α; `kernel_rich_interpolant` finds it for one α. Under label noise the point minimises Q_α
    at every time, with αⱼ² = |uⱼvⱼ| from `overparametrized_linear_charges`.

    Kernel regime: 4α²Q_α → ‖θ‖₂² as α → ∞. Rich regime: Q_α/ln(1/α²) → ‖θ‖₁ as α → 0, with an error
    that falls only like 1/ln(1/α).

    Args:
        weights: θ, shape (d,), or (…, d) for several points.
        scale: α > 0, a number or shape (d,).

    Returns:
        Q in float64, shape () or (…).

    Raises:
        ValueError: a wrong shape, or a value out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> weights = np.array([1.0, -2.0])
        >>> large = theory.kernel_rich_potential(weights, scale=100.0)
        >>> print(round(4 * 100.0**2 * float(large), 3))  # ‖θ‖₂²
        5.0
        >>> small = theory.kernel_rich_potential(weights, scale=1e-100)
        >>> print(round(float(small) / 460.5, 1))  # ‖θ‖₁
        3.0

    References:
        [Woodworth2020, Theorem 1; Ma2022, Theorem 9.18]. [Ma2022, (9.99)] prints a sum over the n
        examples in place of the d features, and (9.104) another factor 1/α².
    """
    theta, alpha = finite("weights", weights), finite("scale", scale)
    if theta.ndim == 0 or alpha.shape not in ((), theta.shape[-1:]):
        raise ValueError(
            f"weights and scale: got shapes {theta.shape} and {alpha.shape}, expected (..., d), "
            "and () or (d,)."
        )
    if not np.all(alpha > 0.0):
        raise ValueError(f"scale: got {np.min(alpha)}, expected numbers > 0.")
    size = np.abs(theta)
    # Divided twice, since α² may underflow. Q = |θ|·(arcsinh(z/2) − z/(2 + √(4 + z²))) does not
    # cancel for small z, as the definition does.
    with np.errstate(over="ignore", under="ignore"):
        z = size / alpha / alpha
        logarithm = np.log(np.where(size > 0.0, size, 1.0)) - 2.0 * np.log(alpha)
        slope = np.where(z > _LARGE, logarithm, np.arcsinh(np.minimum(z, _LARGE) / 2.0))
        small, large = np.minimum(z, 1.0), np.maximum(z, 1.0)
        near = small / (2.0 + np.hypot(2.0, small))
        share = np.where(z < 1.0, near, 1.0 / (2.0 / large + np.hypot(2.0 / large, 1.0)))
        return finite("potential", np.sum(size * (slope - share), axis=-1))
