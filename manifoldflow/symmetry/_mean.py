"""The positive definite P at which tr(PR) + tr(P⁻¹T) is least: the geometric mean P = R⁻¹ # T.

At that P both terms have one matrix, PRP = T. On the orbit of a product UW they are the effects of
noise and decay on its two sides.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision, linalg

Matrix = Float[Array, "d d"]


class Turn(NamedTuple):
    """Q = P^½ and its inverse."""

    matrix: Matrix
    inverse: Matrix


def balancing(right: Matrix, left: Matrix) -> Turn:
    """The symmetric positive definite Q with QRQ = Q⁻¹TQ⁻¹, and its inverse.

    With R = FFᵀ, T = EEᵀ and the singular values EᵀF = VSWᵀ it is P = EVS⁻¹VᵀEᵀ. Directions in
    which R or T vanish have no such Q: there they are given eps^¾ of their mean, so that Q goes
    towards zero or infinity by eps^(3/16) at once, and by more when it is called again.

    Args:
        right: R, positive semidefinite.
        left: T, positive semidefinite.

    Returns:
        Q and Q⁻¹, inverses to rounding. Where R = T = 0 both are I.
    """
    # Above rounding of the moments, eps, and so small that what has noise does not feel it.
    ridge = _precision.eps_of_dtype(right) ** 0.75
    means = jnp.trace(right) / len(right), jnp.trace(left) / len(left)
    total = means[0] + means[1]
    # One side alone may have no noise at all.
    floor = [ridge * jnp.maximum(mean, ridge * total) for mean in means]
    floor = [jnp.where(total > 0, one, 1) for one in floor]
    f, e = (
        _cholesky(matrix + one * jnp.eye(len(matrix), dtype=matrix.dtype))
        for matrix, one in zip((right, left), floor)
    )
    # By factors and one SVD: R⁻¹ # T from square roots of R would square its condition.
    v, s, _ = _svd(_precision.matmul(e.T, f))
    rows = _precision.matmul((v * jax.lax.rsqrt(s)).T, e.T)
    _, stretch, axes = _svd(rows)
    turned = lambda values: _precision.matmul(axes.T * values, axes)
    return Turn(turned(stretch), turned(1 / stretch))


def rotation_to_symmetric(matrix: Matrix) -> Matrix:
    """The orthogonal O that makes O·matrix symmetric and positive semidefinite."""
    u, _, v = _svd(matrix)
    return _precision.matmul(v.T, u.T)


@linalg.one_by_one
def _cholesky(matrix: Array) -> Array:
    return jnp.linalg.cholesky(matrix)


@linalg.one_by_one
def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    u, s, v = jnp.linalg.svd(matrix)
    return u, s, v
