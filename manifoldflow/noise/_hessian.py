"""Noise with a covariance like the Hessian, for any loss: SGD then has a limit without noise."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._boundary import checked_but
from manifoldflow._errors import checked_count, checked_nonnegative
from manifoldflow._types import Key, Point, Scalar, Tangent
from manifoldflow.losses import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss
from manifoldflow.noise._base import AbstractShortNoise
from manifoldflow.noise._short_limit import hessian_trace, ShortLimit


class HessianNoise(AbstractShortNoise):
    """Gaussian noise of the covariance Σ = c·∇²L, for any loss that is three times differentiable.

    On the minimisers of L it is normal to them, and SGD has a limit that is an ordinary
    differential equation, also where the weights of the Hessian change from point to point:

        Y' = −(c/4) P∇tr ∇²L(Y).

    A covariance has no negative eigenvalues, and away from the minimisers a Hessian may: there
    Σ is c times its positive part. At a distance r from the minimisers this leaves a noise of
    the order c·r along them, which costs SGD an error of the order √η. With `rank` only as many
    directions have noise as the normal space has, and the error is of the order η. Both take
    the dense D×D Hessian and its eigenvectors at each step of SGD, for models with up to a few
    thousand coordinates; the limit itself takes neither.

    Args:
        multiple: c ≥ 0.
        rank: the number of the largest eigenvalues that count, or the share of the largest above
            which they do, as for `MinimizerManifold`; None for all that are positive.
        gauss_newton: take the Gauss-Newton matrix of a loss with residuals or examples in place
            of the Hessian: never D×D numbers, smooth, without negative eigenvalues, and equal to
            ∇²L where residuals vanish. The limit is then the equation above on
            `ZeroLossManifold` only. It leaves out a weight decay.

    Raises:
        ValueError: a negative multiple, a rank that is none; both `rank` and `gauss_newton`; when
            used, a loss without a Gauss-Newton matrix.

    References:
        [LiWangArora2022, Corollary 5.2].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: (x[0] ** 2 + 3 * x[1] ** 2) / 2)
        >>> noise = mf.HessianNoise(multiple=2.0)
        >>> print(noise.covariance(loss, jnp.ones(2)).as_matrix().round(3) + 0.0)
        [[2. 0.]
         [0. 6.]]
    """

    multiple: Scalar
    rank: int | float | None = eqx.field(static=True)
    gauss_newton: bool = eqx.field(static=True)

    @checked_but("rank")
    def __init__(
        self,
        multiple: Any = 1.0,
        *,
        rank: int | float | None = None,
        gauss_newton: bool = False,
    ):
        name = "HessianNoise: multiple"
        self.multiple = checked_nonnegative(name, multiple, "It is the c of Σ = c·∇²L.")
        is_share = isinstance(rank, float) and 0 < rank < 1
        name = "HessianNoise: rank"
        self.rank = rank if rank is None or is_share else checked_count(name, rank)
        self.gauss_newton = bool(gauss_newton)
        if self.gauss_newton and rank is not None:
            raise ValueError(
                f"HessianNoise takes rank={rank!r} or gauss_newton=True, not both: a Gauss-Newton "
                "matrix has the rank of its residuals. Leave rank out."
            )

    def gradient(self, loss: AbstractLoss, point: Point, key: Key) -> Tangent:
        factor = self.factor(loss, point)
        drawn = _tree.random_normal_like(key, factor.in_structure())
        return _tree.add(loss.gradient(point), factor.mv(drawn))

    def factor(self, loss: AbstractLoss, point: Point) -> lx.AbstractLinearOperator:
        """The symmetric root of the Hessian, on D numbers, or a root on a number per residual."""
        self._check(loss)
        coordinates, _ = loss.split(point)
        size = jnp.sqrt(self.multiple).astype(_tree.dtype_of(coordinates))
        if isinstance(loss, AbstractResidualLoss | AbstractExampleLoss) and self.gauss_newton:
            return size * loss.gauss_newton_root(point).T
        flat, unravel = _tree.ravel(coordinates)
        # A root of the positive part: a covariance has no negative eigenvalues, a Hessian may.
        root = size * linalg.square_root(_hessian(loss, point), self._rank_of(flat.size))

        def mv(vector: Float[Array, " D"]) -> Tangent:
            return unravel(_precision.matmul(root, vector))

        return lx.FunctionLinearOperator(mv, _tree.structure_of(flat))

    def short_limit(self, loss: AbstractLoss) -> ShortLimit:
        """The short form −(c/4) P∇tr ∇²L, from 𝓛_H⁻¹(cH) = (c/2)P⊥ and P∂²(∇L)[P] = 0."""
        self._check(loss)
        return ShortLimit(
            hessian_trace, self.multiple / 4, is_ode=True, at_zero_loss=self.gauss_newton
        )

    def _rank_of(self, size: int) -> int | float | None:
        if isinstance(self.rank, int) and self.rank > size:
            raise ValueError(f"HessianNoise: rank {self.rank} exceeds the {size} coordinates.")
        return self.rank

    def _check(self, loss: AbstractLoss) -> None:
        if self.gauss_newton and not isinstance(loss, AbstractResidualLoss | AbstractExampleLoss):
            raise ValueError(
                "HessianNoise(gauss_newton=True) needs a loss with residuals or examples, such as "
                f"LeastSquares; got {type(loss).__name__}. Leave gauss_newton out: the Hessian of "
                "any loss will do."
            )


def _hessian(loss: AbstractLoss, point: Point) -> Float[Array, "D D"]:
    coordinates, remainder = loss.split(point)
    flat, unravel = _tree.ravel(coordinates)
    return jax.hessian(lambda x: loss(_tree.join(unravel(x), remainder)))(flat)
