"""Scaling rules: batch sizes, learning rates and averages that have one limit."""

import abc
from typing import Any, NamedTuple

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_positive, described, is_traced
from manifoldflow._types import Scalar
from manifoldflow.updates._base import AbstractUpdate


class ScalingRule(NamedTuple):
    """The factors of hyperparameters for batches of κB in place of B, with the same epochs.

    Each attribute is a factor, None where the update has no such number.

    Attributes:
        update: the update for the larger batch.
        batch_size: κ.
        learning_rate: of η.
        weight_decay: of λ, where a step subtracts ηλθ.
        averaging: of 1 − β₂.
        eps: of ε.
        local_steps: of the number H of steps between averages.

    Examples:
        >>> import manifoldflow as mf
        >>> rule = mf.updates.scaling_rule(mf.updates.SGD(), 4.0)
        >>> print(rule)
        B → 4·B: η → 4·η
        >>> print(rule.learning_rate)
        4.0
    """

    update: AbstractUpdate
    batch_size: Scalar
    learning_rate: Scalar
    weight_decay: Scalar | None = None
    averaging: Scalar | None = None
    eps: Scalar | None = None
    local_steps: Scalar | None = None

    def __str__(self) -> str:
        names = {
            "B": self.batch_size, "η": self.learning_rate, "λ": self.weight_decay,
            "(1 − β₂)": self.averaging, "ε": self.eps, "H": self.local_steps,
        }  # fmt: skip
        parts = [f"{name} → {_shown(v)}{name}" for name, v in names.items() if v is not None]
        return f"{parts[0]}: {', '.join(parts[1:])}"


class AbstractScalableUpdate(AbstractUpdate):
    """An update whose hyperparameters have a known rule for larger batches.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> update = mf.updates.SGD(momentum=0.9)
        >>> isinstance(update, mf.updates.AbstractScalableUpdate)
        True
        >>> print(update.scaling(jnp.array(2.0)))
        B → 2·B: η → 2·η
    """

    @abc.abstractmethod
    def scaling(self, batch_factor: Scalar) -> ScalingRule:
        """The rule for a factor κ > 0 of the batch size."""


@checked
def scaling_rule(update: AbstractUpdate, batch_factor: Any) -> ScalingRule:
    """The hyperparameters that have the same limit per epoch with κ times the batch.

    The limits are those of noise whose covariance is inverse to the batch size:

        SGD:        η → κη,  λ the same;
        LocalSGD:   η → κη,  H → H/κ steps between averages;
        Adam:       η → √κ·η,  1 − β₂ → κ(1 − β₂),  λ → √κ·λ,  ε → ε/√κ,  any β₁.

    Args:
        update: the update for the smaller batch.
        batch_factor: κ > 0, of the batch of each worker.

    Returns:
        A value to print, with the update for the larger batch.

    Raises:
        ValueError: an update whose limit is known for one batch size only.

    Examples:
        >>> import manifoldflow as mf
        >>> print(mf.updates.scaling_rule(mf.updates.Adam(), 4.0))
        B → 4·B: η → 2·η, λ → 2·λ, (1 − β₂) → 4·(1 − β₂), ε → 0.5·ε
    """
    factor = checked_positive("scaling_rule: batch_factor", batch_factor)
    if not isinstance(update, AbstractScalableUpdate):
        raise ValueError(
            "scaling_rule needs an update with a limit for batches of any size, updates.SGD, "
            f"updates.Adam or updates.LocalSGD; got {described(update)}."
        )
    return update.scaling(factor)


def _shown(factor: Scalar) -> str:
    """A factor in front of its symbol; nothing for 1."""
    if is_traced(factor):
        return "…·"
    return "" if factor == 1 else f"{float(factor):.4g}·"
