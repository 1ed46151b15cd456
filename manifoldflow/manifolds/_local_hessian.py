"""The local geometry where a loss is only known to be minimal: ∂²Φ by D×D matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.manifolds._local import AbstractLocalGeometry, Minimised
from manifoldflow.manifolds._normal_space import AbstractNormalSpace, HessianNormalSpace


class HessianGeometry(AbstractLocalGeometry):
    """The geometry at a point of the minimisers of any loss, by its dense D×D Hessian.

    `manifold.local(point)` gives it for `MinimizerManifold`.

    Attributes:
        manifold: the manifold.
        coordinates: the coordinates of the point.
        remainder: its other leaves.
        space: the normal space there.
        matrix: ∇²L, (D, D), or None until `prepared`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.FunctionLoss(lambda x: (x @ x - 4) ** 2 / 2)
        >>> local = mf.MinimizerManifold(loss, rank=1).local(jnp.array([2.0, 0.0]))
        >>> type(local).__name__
        'HessianGeometry'
        >>> print(local.hessian_trace(), local.hessian_eigenvalues())
        16.0 [ 0. 16.]
    """

    manifold: Minimised
    coordinates: Coordinates
    remainder: Point
    space: AbstractNormalSpace
    matrix: Float[Array, "D D"] | None = None  # ∇²L, where it is made already

    def prepared(self) -> "HessianGeometry":
        return dataclasses.replace(self, matrix=self.hessian)

    def hessian_trace(self) -> Scalar:
        return jnp.trace(self.hessian)

    def log_determinant(self) -> Scalar:
        return linalg.log_pseudo_determinant(self.hessian, self.rank_rule)

    def hessian_eigenvalues(self) -> Float[Array, " n"]:
        values, _, inside = linalg.range_spectrum(self.hessian, self.rank_rule)
        return jnp.sort(_tree.where(inside, values, 0))

    def mixed_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        # The contraction is symmetric in its two slots, so M needs no symmetrising here.
        inverse = linalg.pseudo_inverse(self.hessian, self.rank_rule)
        across = _precision.matmul(
            _precision.matmul(inverse, self._covariance(sigma)), self._tangent
        )
        return self._unravel(-2 * _precision.matmul(self._tangent, self._third(across)))

    def normal_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        solution = linalg.lyapunov_solve(self.hessian, self._covariance(sigma), self.rank_rule)
        return self._unravel(-_precision.matmul(self._tangent, self._third(solution)))

    @property
    def hessian(self) -> Float[Array, "D D"]:
        """The Hessian ∇²L in raveled coordinates."""
        if self.matrix is not None:
            return self.matrix
        if isinstance(self.space, HessianNormalSpace):
            return self.space.hessian
        return jax.hessian(self._loss)(_tree.ravel(self.coordinates)[0])

    @property
    def rank_rule(self) -> int | float:
        """The number of eigenvalues that count, or the part of the largest above which they do."""
        if isinstance(self.space, HessianNormalSpace):
            return self.space.rank_rule
        return self.manifold.codimension(_tree.join(self.coordinates, self.remainder))

    @property
    def _tangent(self) -> Float[Array, "D D"]:
        normal = linalg.range_projection(self.hessian, self.rank_rule)
        return jnp.eye(len(normal), dtype=normal.dtype) - normal

    def _covariance(self, sigma: linalg.AbstractSigma) -> Float[Array, "D D"]:
        assert not isinstance(sigma, linalg.NormalFactor), "this manifold has no residuals"
        ravel = self.operator(lambda vector: _tree.ravel(vector)[0])
        matrix = linalg.columns(ravel @ sigma.operator)
        return _precision.matmul(matrix, matrix.T) if isinstance(sigma, linalg.Factor) else matrix

    def _loss(self, x: Float[Array, " D"]) -> Scalar:
        unravel = _tree.ravel(self.coordinates)[1]
        return self.manifold.loss(_tree.join(unravel(x), self.remainder))

    def _third(self, matrix: Float[Array, "D D"]) -> Float[Array, " D"]:
        """The contraction ∂²(∇L)[M] = Σⱼ D²(∇L)[eⱼ, Meⱼ]."""
        flat = _tree.ravel(self.coordinates)[0]
        identity = lx.IdentityLinearOperator(_tree.structure_of(flat))
        return linalg.second_derivative_sum(
            jax.grad(self._loss), flat, identity, lx.MatrixLinearOperator(matrix)
        )

    def _unravel(self, vector: Float[Array, " D"]) -> Tangent:
        return _tree.ravel(self.coordinates)[1](vector)
