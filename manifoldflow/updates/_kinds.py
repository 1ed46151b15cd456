"""Kinds of updates by how their limits are computed; `flows` has one path for each kind."""

import abc

import equinox as eqx
from jaxtyping import Array, Float

from manifoldflow._types import Scalar, Tangent
from manifoldflow.updates._base import AbstractUpdate, LocalHessian
from manifoldflow.updates._setting import Setting


class AbstractLimitedUpdate(AbstractUpdate):
    """An update whose limit is known for some noises, and is an ordinary differential equation.

    `needs` says for which noises; `LimitDiffusion` refuses others.

    Examples:
        >>> import manifoldflow as mf
        >>> update = mf.updates.SAM(radius=0.1)
        >>> isinstance(update, mf.updates.AbstractLimitedUpdate)
        True
        >>> update.needs
        'MinibatchNoise(1) on a zero-loss manifold with one output for each example'
    """

    @property
    @abc.abstractmethod
    def needs(self) -> str:
        """The noise and the loss for which the limit is known, for messages."""

    @abc.abstractmethod
    def fits(self, setting: Setting) -> bool:
        """True where the limit is known: by types and counts, never by values."""


class AbstractPotentialUpdate(AbstractLimitedUpdate):
    """An update with the limit Y' = −rate·P∇potential(∇²L).

    A subclass defines the potential, a function of the Hessian, and the rate.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> update = mf.updates.SAM(radius=0.1)
        >>> isinstance(update, mf.updates.AbstractPotentialUpdate)
        True
        >>> loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda w, x: w[0] * w[1] * x)
        >>> local = mf.ZeroLossManifold(loss).local(jnp.array([2.0, 0.5]))
        >>> print(update.potential(local))  # tr∇²L = w₀² + w₁²
        4.25
    """

    @abc.abstractmethod
    def potential(self, local: LocalHessian) -> Scalar:
        """The potential: a number from ∇²L at a point of the manifold."""

    @abc.abstractmethod
    def rate(self, setting: Setting) -> Scalar:
        """The factor of the potential's gradient, per unit of the clock."""


class AbstractRowsUpdate(AbstractLimitedUpdate):
    """An update that sees one example at a time and moves by ψᵢ(rᵢ + ε)·bᵢ, bᵢ from ∇rᵢ alone.

    With B the rows bᵢ, R = diag E ψᵢ'(ε)/N, C = diag E ψᵢ(ε)²/N and G = JBᵀ, its limit is

        Y' = −Π Σᵢ ∂bᵢ[(BᵀTGᵀR)_{·i}],   R G T + T GᵀR = C,   Π = 1 − BᵀG⁻¹J.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> update = mf.updates.SignSGD()
        >>> isinstance(update, mf.updates.AbstractRowsUpdate)
        True
        >>> print(update.row(jnp.array([3.0, -0.5])))
        [ 1. -1.]
    """

    # A class variable: `flows` picks a path by it before anything is traced.
    keeps_gradients: eqx.AbstractClassVar[bool]  # bᵢ = ∇rᵢ: then no n×D numbers are built

    @abc.abstractmethod
    def row(self, gradient: Tangent) -> Tangent:
        """The direction bᵢ of a step, from ∇rᵢ."""

    @abc.abstractmethod
    def response(
        self, lengths: Float[Array, " n"], setting: Setting
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The means E ψᵢ'(ε) and E ψᵢ(ε)² for gradients ∇rᵢ of these lengths."""


class AbstractPreconditionedUpdate(AbstractLimitedUpdate):
    """An update that divides by a function of the running means of squared gradients.

    A step is −η·s(v)·g for every coordinate, and v ← v + (1 − β₂)(g² − v).

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> update = mf.updates.Adam(eps=1.0)
        >>> isinstance(update, mf.updates.AbstractPreconditionedUpdate)
        True
        >>> print(update.preconditioner(jnp.array([1.0, 9.0])))  # 1/(√v + ε)
        [0.5  0.25]
    """

    @property
    @abc.abstractmethod
    def averaging_rate(self) -> Scalar | None:
        """The rate b of 1 − β₂ = bη, None for η² ≪ 1 − β₂ ≪ η."""

    @abc.abstractmethod
    def preconditioner(self, second_moments: Array) -> Array:
        """The factor s(v), number by number."""

    @property
    @abc.abstractmethod
    def failure(self) -> str:
        """The meaning of an s(v) that is not finite, and the remedy, for messages."""
