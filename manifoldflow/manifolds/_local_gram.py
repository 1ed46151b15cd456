"""The local geometry where the constraint is the residual of the loss: ∂²Φ in n dimensions.

With J the Jacobian of the residuals, K = J Jᵀ, A = J†ᵀΣJ† (n×n) and KT + TK = A the parts are

    −J†q, qᵢ = ⟨∇²rᵢ, PΣP⟩;    −2P Σᵢ ∇²rᵢ (PΣJ†)ᵢ;    −2P Σᵢ ∇²rᵢ (JᵀTK)ᵢ,

whatever the scale of L and its third derivatives in r: under P they drop out.
"""

import dataclasses

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.losses import AbstractResidualLoss
from manifoldflow.manifolds._local import AbstractLocalGeometry, Minimised
from manifoldflow.manifolds._normal_space import GramNormalSpace


class GramGeometry(AbstractLocalGeometry):
    """The geometry at a point of the zero set of a loss's residuals, by their n×n Gram matrix.

    `manifold.local(point)` gives it for `LevelSet`, `ZeroLossManifold` and `OutputManifold`.

    Attributes:
        manifold: the manifold.
        loss: the loss with these residuals.
        coordinates: the coordinates of the point.
        remainder: its other leaves.
        space: the normal space there.
        gram: K = JJᵀ, (n, n), or None until `prepared`.
        inverse: its rank-aware inverse, or None.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> local = mf.LevelSet(lambda x: x @ x - 4).local(jnp.array([2.0, 0.0]))
        >>> type(local).__name__
        'GramGeometry'
        >>> print(local.hessian_trace(), local.hessian_eigenvalues())
        16.0 [16.]
    """

    manifold: Minimised
    loss: AbstractResidualLoss
    coordinates: Coordinates
    remainder: Point
    space: GramNormalSpace
    # K, and its rank-aware inverse: where J loses rank, the inverse of K + μI would blow up the
    # rounding errors along a combination of residuals that has no slope, but still has curvature.
    gram: Float[Array, "n n"] | None = None
    inverse: Float[Array, "n n"] | None = None

    def prepared(self) -> "GramGeometry":
        gram = self._gram
        return dataclasses.replace(self, gram=gram, inverse=linalg.pseudo_inverse(gram))

    def hessian_trace(self) -> Scalar:
        # Of the rows themselves: the diagonal of K would have derivatives of all of K.
        return self._scale * jnp.sum(self.space.jacobian.row_norms_squared())

    def log_determinant(self) -> Scalar:
        return linalg.log_pseudo_determinant(self._gram)

    def hessian_eigenvalues(self) -> Float[Array, " n"]:
        return self._scale * linalg.eigh(self._gram)[0]

    def mixed_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        """The second part −2P Σᵢ ∇²rᵢ (PΣJ†)ᵢ, independent of the loss."""
        if isinstance(sigma, linalg.NormalFactor):
            return _tree.zeros_like(self.coordinates)
        tangent = self.operator(self.space.tangent, is_symmetric=True)
        multiplier = self._multiplier()
        # One Hessian-vector product per column of a factor F; from Σ itself, one per residual.
        tangents = tangent @ sigma.operator
        if isinstance(sigma, linalg.Factor):
            multipliers = multiplier @ sigma.operator
        else:
            multipliers = lx.IdentityLinearOperator(multiplier.out_structure())
            tangents = tangents @ multiplier.T
        turned = linalg.hessian_product_sum(
            self.constraint, self.coordinates, multipliers, tangents
        )
        return _tree.scale(-2, self.space.tangent(turned))

    def normal_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        """The third part −2P Σᵢ ∇²rᵢ (JᵀTK)ᵢ with KT + TK = J†ᵀΣJ†."""
        gram = self._gram
        solution = linalg.lyapunov_solve(gram, self._normal_covariance(sigma))
        # T and K do not commute: column i is (JᵀTK)ᵢ, not (JᵀKT)ᵢ.
        coefficients = _precision.matmul(solution, gram)
        turned = linalg.contract_hessians(self._jacobian, self.coordinates, coefficients)
        return _tree.scale(-2, self.space.tangent(turned))

    def _normal_covariance(self, sigma: linalg.AbstractSigma) -> Float[Array, "n n"]:
        """The matrix J†ᵀΣJ†. Its rows and columns outside the range of K do not count."""
        if isinstance(sigma, linalg.Covariance):
            multiplier = self._multiplier()
            return linalg.columns(multiplier @ sigma.operator @ multiplier.T)
        is_small = isinstance(sigma, linalg.NormalFactor)
        small = sigma.operator if is_small else self._multiplier() @ sigma.operator
        root = linalg.columns(small)
        return _precision.matmul(root, root.T)

    def _multiplier(self) -> lx.AbstractLinearOperator:
        """The operator J†ᵀ = K†J, refined once: it gives the multipliers of a normal part."""
        inverse = linalg.pseudo_inverse(self._gram) if self.inverse is None else self.inverse

        def multipliers(vector: Tangent) -> Float[Array, " n"]:
            found = _precision.matmul(inverse, self.space.mv(vector))
            left = _tree.subtract(vector, self.space.jacobian.transpose_mv(found))
            return found + _precision.matmul(inverse, self.space.mv(left))

        return self.operator(multipliers)

    @property
    def _gram(self) -> Float[Array, "n n"]:
        return self.space.jacobian.gram() if self.gram is None else self.gram

    @property
    def _scale(self) -> Scalar:
        return self.loss.scale.astype(_tree.dtype_of(self.coordinates))

    def _jacobian(self, x: Coordinates) -> linalg.AbstractJacobian:
        return self.loss.jacobian(_tree.join(x, self.remainder))
