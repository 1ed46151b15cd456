"""Steps along the polar factor of every matrix of the gradient."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._clock import LimitClock
from manifoldflow._types import Coordinates, Tangent
from manifoldflow.updates._base import sgd_of
from manifoldflow.updates._kinds import AbstractRowsUpdate
from manifoldflow.updates._response import NEEDS, sign_response
from manifoldflow.updates._setting import Setting


class Muon(AbstractRowsUpdate):
    """Muon without momentum: θ ← θ − η·polar(g), with g the gradient of one example.

    polar(UΣVᵀ) = UVᵀ for every matrix among the leaves, exactly and not by a few Newton-Schulz
    steps; it is g/‖g‖ for a gradient of rank one, and for leaves that are no matrices. Singular
    values below eps^¼ times the largest count as zero. With bᵢ = polar(∇rᵢ), B of these rows
    and G = JBᵀ, the limit on the clock Ση² does not depend on the noise:

        Y' = −(1/N) Π Σᵢ ∂bᵢ[(BᵀTGᵀ)_{·i}],   GT + TGᵀ = 1,   Π = 1 − BᵀG⁻¹J.

    It needs Re spec G > 0, and n×D numbers; the drift is NaN elsewhere.

    References:
        The formula of `IterationLimit`, in n dimensions.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> gradient = jnp.array([[3.0, 0.0], [0.0, -2.0]])
        >>> print(mf.updates.Muon().row(gradient).round(3) + 0.0)
        [[ 1.  0.]
         [ 0. -1.]]
    """

    keeps_gradients: ClassVar[bool] = False

    @property
    def clock(self) -> LimitClock:
        return LimitClock()

    def transform(self, learning_rate: Any) -> optax.GradientTransformation:
        return sgd_of(self.row, learning_rate)

    def slow_drift(self, coordinates: Coordinates) -> None:
        return None

    @property
    def needs(self) -> str:
        return NEEDS

    def fits(self, setting: Setting) -> bool:
        return setting.label_std is not None

    def row(self, gradient: Tangent) -> Tangent:
        return jax.tree.map(_polar, gradient)

    def response(
        self, lengths: Float[Array, " n"], setting: Setting
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        return sign_response(lengths, setting)


def _polar(matrix: Array) -> Array:
    """A(AᵀA)^{−½} on the range of A; A/‖A‖ where A is no matrix. 0 for 0."""
    if matrix.ndim != 2 or min(matrix.shape) == 1:
        size = _tree.norm(matrix)
        return matrix * jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    # The smaller of AᵀA and AAᵀ is the one to factorise.
    if matrix.shape[0] < matrix.shape[1]:
        return _polar(matrix.T).T
    return _precision.matmul(matrix, _inverse_root(_precision.matmul(matrix.T, matrix)))


@jax.custom_jvp
def _inverse_root(square: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The matrix (AᵀA)^{−½} on the range, with the derivative at constant rank."""
    vectors, inverse, _ = _spectrum(square)
    return _precision.matmul(vectors * inverse, vectors.T)


def _spectrum(square: Array) -> tuple[Array, Array, Array]:
    """Eigenvectors, and for each of them λ^{−½} and a mark if it counts."""
    # AᵀA has the squares of the singular values: √eps of them is eps^¼ of those of A.
    cutoff = _precision.eps_of_dtype(square) ** 0.5
    values, vectors, inside = linalg.range_spectrum(square, cutoff)
    inside = inside & (values > 0)
    roots = jnp.sqrt(_tree.where(inside, values, 1))
    return vectors, _tree.where(inside, 1 / roots, 0), inside


@_inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    vectors, inverse, inside = _spectrum(primals[0])
    # (λⱼ^{−½} − λₖ^{−½})/(λⱼ − λₖ), which for λₖ outside of the range is λⱼ^{−3/2}.
    left, right = inverse[:, None], inverse[None, :]
    both = inside[:, None] & inside[None, :]
    sums = _tree.where(both, left + right, 1)
    within = -((left * right) ** 2) / sums
    across = left**3 + right**3
    quotients = _tree.where(both, within, across)
    turned = _precision.matmul(_precision.matmul(vectors.T, tangents[0]), vectors)
    change = _precision.matmul(_precision.matmul(vectors, quotients * turned), vectors.T)
    return _inverse_root(*primals), change
