"""The potential between the l1 and the l2 norm that gradient flow minimises."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import finite

# From where on arcsinh(x/2) is log x to rounding.
_LARGE = 1e9


@checked
def kernel_rich_potential(
    weights: Num[ArrayLike, "*batch d"], *, scale: Num[ArrayLike, "..."]
) -> Float[np.ndarray, "*batch"]:
    """``Q_alpha(theta) = sum_j alpha_j^2 q(theta_j/alpha_j^2)``, the hyperbolic entropy.

    ``q(z) = 2 - sqrt(4 + z^2) + z arcsinh(z/2)``, so that its gradient is ``arcsinh(theta_j/(2
    alpha_j^2))``. Among all theta with ``X theta = y`` gradient flow on ``<w_+^2 - w_-^2, x>`` from
    ``w_+ = w_- = alpha`` ends at the least: `kernel_rich_interpolant` for one alpha. Under label
    noise the point is at every time the least for ``alpha_j^2 = |u_j v_j|``, see
    `overparametrized_linear_charges`.

    ``4 alpha^2 Q_alpha -> |theta|_2^2`` as alpha -> infinity (the kernel regime), ``Q_alpha/log
    (1/alpha^2) -> |theta|_1`` as alpha -> 0 (the rich regime), there only like 1/log.

    Args:
        weights: theta, shape (d,), or (..., d) for several.
        scale: alpha > 0, a number or shape (d,).

    Returns:
        Q in float64, of shape () or (...); the sum is over the d features.

    Raises:
        ValueError: a wrong shape or a value out of range.

    References:
        [Woodworth2020, Theorem 1; Ma2022, Theorem 9.18]. Printed in (9.99) is a sum over the n
        examples, and in (9.104) another factor ``1/alpha^2``.
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
    # Divided twice, since alpha^2 may underflow; Q = |theta| (arcsinh(z/2) - z/(2 + sqrt(4 + z^2)))
    # does not cancel for small z.
    with np.errstate(over="ignore", under="ignore"):
        z = size / alpha / alpha
        logarithm = np.log(np.where(size > 0.0, size, 1.0)) - 2.0 * np.log(alpha)
        slope = np.where(z > _LARGE, logarithm, np.arcsinh(np.minimum(z, _LARGE) / 2.0))
        small, large = np.minimum(z, 1.0), np.maximum(z, 1.0)
        near = small / (2.0 + np.hypot(2.0, small))
        share = np.where(z < 1.0, near, 1.0 / (2.0 / large + np.hypot(2.0 / large, 1.0)))
        return finite("potential", np.sum(size * (slope - share), axis=-1))
