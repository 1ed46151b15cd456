"""A loss plus its own flatness, which SGD with label noise lowers at a finite learning rate."""

from typing import Any

import equinox as eqx

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Point, Scalar
from manifoldflow.losses._base import AbstractExampleLoss, AbstractLoss, AbstractResidualLoss

KINDS = "gauss-newton", "hessian"


class RegularizedLoss(AbstractLoss):
    """The loss L + λ tr G, with G the Gauss-Newton matrix of L, or its Hessian ∇²L.

    SGD of learning rate η with label noise of covariance Σ = cH (`LabelNoise.hessian_multiple`)
    settles about the stationary points of this loss for λ = ηc/4. To first order in η, the mean
    residuals of the squared loss are the residuals there, Jᵀr = −2λ Σᵢ∇²fᵢ∇fᵢ, and not 0. On the
    model ⟨β ⊙ β, x⟩ that is the Lasso with the weights 4λ Σᵢx²ᵢⱼ.

    This holds for the Gauss-Newton matrix. With the Hessian the residuals are lower by another
    λ tr∇²fᵢ, an effect of the same order; the two agree where all tr∇²fᵢ vanish. On the zero-loss
    manifold both traces have the same gradient along it.

    It is a loss like any other, for `simulate`, `GradientFlow` and `minimize`. It has two
    derivatives less than L. On `LeastSquares` it costs a few gradients of L; the trace of the
    Hessian costs D of them.

    Args:
        loss: L.
        strength: λ ≥ 0.
        kind: "gauss-newton" or "hessian", the matrix whose trace is added. By default it is the
            first for losses of examples or residuals, which have one, and the second for others.

    Raises:
        ValueError: a negative strength, another kind, or the Gauss-Newton matrix of a loss that
            has none.

    References:
        [Blanc2020; Damian2021; Ma2022, section 9.5].

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: x @ w**2)
        >>> flat = mf.RegularizedLoss(loss, 0.01)
        >>> print(f"{loss(jnp.ones(2)):.2f} {flat.trace(jnp.ones(2)):.2f} {flat(jnp.ones(2)):.2f}")
        0.00 4.00 0.04
    """

    loss: AbstractLoss
    strength: Scalar
    kind: str = eqx.field(static=True)

    @checked
    def __init__(self, loss: AbstractLoss, strength: Any, *, kind: str | None = None):
        has_gauss_newton = isinstance(loss, AbstractResidualLoss | AbstractExampleLoss)
        self.loss = loss
        self.strength = checked_nonnegative(
            "RegularizedLoss: strength", strength, "Label noise has ηc/4."
        )
        self.kind = KINDS[0 if has_gauss_newton else 1] if kind is None else kind
        if self.kind not in KINDS:
            raise ValueError(f"RegularizedLoss: kind must be one of {KINDS}; got {kind!r}.")
        if self.kind == KINDS[0] and not has_gauss_newton:
            raise ValueError(
                f"RegularizedLoss: a {type(loss).__name__} has no Gauss-Newton matrix; give "
                'kind="hessian".'
            )

    @property
    def trainable(self) -> _tree.Static | None:
        """The leaves of a point that may move: those of L."""
        return self.loss.trainable

    def __call__(self, point: Point) -> Scalar:
        value, trace = self.loss(point), self.trace(point)
        # Without the cast a λ in float64 would promote a loss in float32.
        return value + self.strength.astype(value.dtype) * trace

    def trace(self, point: Point) -> Scalar:
        """The trace tr G, without λ."""
        if self.kind == KINDS[1]:
            return self.loss.trace_hessian(point)
        # A loss of examples or of residuals, as was checked.
        return self.loss.trace_gauss_newton(point)  # pyright: ignore[reportAttributeAccessIssue]
