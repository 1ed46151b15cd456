"""A manifold at one point, up to second order: its normal space, and its curvature there.

With f the constraint, P the tangent projection and J† the pseudo-inverse of ∂f:

    II(u, w) = −J†D²f[u, w],

and for the limit map Φ of gradient flow, contracted with a symmetric Σ [LiWangArora2022,
Lemma 4.5],

    ∂²Φ[Σ] = − H†∂²(∇L)[PΣP] − 2P∂²(∇L)[H†Σ⊥∥] − P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)],   Σ⊥∥ = P⊥ΣP.

The first part is the trace of II against PΣP: it is the same for all manifolds. The formula of
the other two depends on the loss: one class for each kind of loss.
"""

import abc
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _tree, linalg
from manifoldflow._types import Constraint, Coordinates, Point, Scalar, Tangent
from manifoldflow.losses import AbstractLoss
from manifoldflow.manifolds._normal_space import AbstractNormalSpace


@runtime_checkable
class Minimised(Protocol):
    """All that a local geometry needs of a manifold."""

    @property
    def loss(self) -> AbstractLoss: ...

    def constraint(self, point: Point) -> Constraint: ...

    def codimension(self, point: Point) -> int: ...


class AbstractLocalGeometry(eqx.Module):
    """The geometry of a manifold at one point, as `manifold.local(point)` gives it.

    Curvature, flows and limits are made of its methods.

    Attributes:
        manifold: the manifold.
        coordinates: the coordinates of the point.
        remainder: its other leaves.
        space: the normal space there, factorised once.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda x: x @ x - 4)  # of radius 2
        >>> local = circle.local(jnp.array([2.0, 0.0]))
        >>> isinstance(local, mf.manifolds.AbstractLocalGeometry)
        True
        >>> print(local.mean_curvature() + 0.0)  # −n/R
        [-0.5  0. ]
    """

    manifold: eqx.AbstractVar[Minimised]
    coordinates: eqx.AbstractVar[Coordinates]
    remainder: eqx.AbstractVar[Point]
    space: eqx.AbstractVar[AbstractNormalSpace]

    @abc.abstractmethod
    def hessian_trace(self) -> Scalar:
        """The trace tr∇²L, as it is where the loss is minimal."""

    @abc.abstractmethod
    def log_determinant(self) -> Scalar:
        """The number ln|∇²L|₊ up to a constant, |·|₊ the product of non-zero eigenvalues."""

    @abc.abstractmethod
    def hessian_eigenvalues(self) -> Float[Array, " n"]:
        """The eigenvalues of ∇²L on the normal space, ascending."""

    @abc.abstractmethod
    def prepared(self) -> "AbstractLocalGeometry":
        """The same geometry with the matrices that the second and the third part of ∂²Φ share."""

    @abc.abstractmethod
    def mixed_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        """The second part of ∂²Φ[Σ], −2P∂²(∇L)[H†Σ⊥∥]."""

    @abc.abstractmethod
    def normal_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        """The third part of ∂²Φ[Σ], −P∂²(∇L)[𝓛_H⁻¹(P⊥ΣP⊥)]."""

    def tangent_part(self, sigma: linalg.AbstractSigma) -> Tangent:
        """The first part of ∂²Φ[Σ], −J†D²f[PΣP]: the trace of II against PΣP.

        It takes one second directional derivative of the constraint per column of a factor, and D
        of them for a covariance.
        """
        if isinstance(sigma, linalg.NormalFactor):
            return _tree.zeros_like(self.coordinates)
        tangent = self.operator(self.space.tangent, is_symmetric=True)
        left: lx.AbstractLinearOperator = lx.IdentityLinearOperator(tangent.out_structure())
        right = tangent @ sigma.operator
        if isinstance(sigma, linalg.Factor):
            left = right
        else:
            right = right @ tangent
        total = linalg.second_derivative_sum(self.constraint, self.coordinates, left, right)
        return _tree.scale(-1, self.space.pseudo_inverse(total))

    def mean_curvature(self) -> Tangent:
        """The mean curvature vector tr II, by D second directional derivatives of f."""
        identity = lx.IdentityLinearOperator(_tree.structure_of(self.coordinates))
        return self.tangent_part(linalg.Factor(identity))

    def constraint(self, x: Coordinates) -> Constraint:
        """The value of f at other coordinates."""
        return self.manifold.constraint(_tree.join(x, self.remainder))

    def second_derivative(self, u: Tangent, w: Tangent) -> Constraint:
        """The second derivative D²f[u, w]."""

        def along(x: Coordinates) -> Constraint:
            return jax.jvp(self.constraint, (x,), (u,))[1]

        return jax.jvp(along, (self.coordinates,), (w,))[1]

    def form(self, u: Tangent, w: Tangent) -> Tangent:
        """The second fundamental form II(u, w) = −J†D²f[u, w], for tangent u and w."""
        lifted = self.space.pseudo_inverse(self.second_derivative(u, w))
        return _tree.scale(-1, lifted)

    def turn(self, multipliers: Constraint, vector: Tangent) -> Tangent:
        """The product ∇²(λ·f) v."""

        def gradient(x: Coordinates) -> Tangent:
            return jax.vjp(self.constraint, x)[1](multipliers)[0]

        return jax.jvp(gradient, (self.coordinates,), (vector,))[1]

    def operator(self, fn, *, is_symmetric: bool = False) -> lx.AbstractLinearOperator:
        """The operator of a linear function of tangents."""
        tags = lx.symmetric_tag if is_symmetric else ()
        return lx.FunctionLinearOperator(fn, _tree.structure_of(self.coordinates), tags)
