"""Kinds of updates by how their limits are computed; `flows` has one path for each kind."""

import abc

import equinox as eqx
from jaxtyping import Array, Float

from manifoldflow._types import Scalar, Tangent
from manifoldflow.updates._base import AbstractUpdate, LocalHessian
from manifoldflow.updates._setting import Setting


class AbstractLimitedUpdate(AbstractUpdate):
    """An update whose limit is known for some noises, and is an ordinary differential equation."""

    @property
    @abc.abstractmethod
    def needs(self) -> str:
        """Which noise and loss, for messages."""

    @abc.abstractmethod
    def fits(self, setting: Setting) -> bool:
        """Whether the limit is known there: by types and counts, never by values."""


class AbstractPotentialUpdate(AbstractLimitedUpdate):
    """An update with the limit Y' = −rate·P∇potential(∇²L)."""

    @abc.abstractmethod
    def potential(self, local: LocalHessian) -> Scalar:
        """A number from ∇²L at a point of the manifold."""

    @abc.abstractmethod
    def rate(self, setting: Setting) -> Scalar:
        """Its factor, per unit of the clock."""


class AbstractRowsUpdate(AbstractLimitedUpdate):
    """An update that sees one example at a time and moves by ψᵢ(rᵢ + ε)·bᵢ, bᵢ from ∇rᵢ alone.

    With B the rows bᵢ, R = diag E ψᵢ'(ε)/N, C = diag E ψᵢ(ε)²/N and G = JBᵀ, its limit is

        Y' = −Π Σᵢ ∂bᵢ[(BᵀTGᵀR)_{·i}],   R G T + T GᵀR = C,   Π = 1 − BᵀG⁻¹J.
    """

    keeps_gradients: eqx.AbstractClassVar[bool]  # bᵢ = ∇rᵢ: then no n×D numbers are built

    @abc.abstractmethod
    def row(self, gradient: Tangent) -> Tangent:
        """bᵢ from ∇rᵢ."""

    @abc.abstractmethod
    def response(
        self, lengths: Float[Array, " n"], setting: Setting
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """E ψᵢ'(ε) and E ψᵢ(ε)² for gradients ∇rᵢ of these lengths."""


class AbstractPreconditionedUpdate(AbstractLimitedUpdate):
    """An update that divides by a function of the running means of squared gradients.

    A step is −η·s(v)·g for every coordinate, and v ← v + (1 − β₂)(g² − v).
    """

    @property
    @abc.abstractmethod
    def averaging_rate(self) -> Scalar | None:
        """b of 1 − β₂ = bη, None for η² ≪ 1 − β₂ ≪ η."""

    @abc.abstractmethod
    def preconditioner(self, second_moments: Array) -> Array:
        """s(v), number by number."""

    @property
    @abc.abstractmethod
    def failure(self) -> str:
        """What it means that s(v) is not finite, and what to do."""
