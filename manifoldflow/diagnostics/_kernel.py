"""How far a model has left its kernel regime: its Gram matrix at two points."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_but
from manifoldflow._types import Point, Scalar
from manifoldflow.losses import AbstractExampleLoss, AbstractResidualLoss


class KernelChange(NamedTuple):
    """Of the kernel K at a point and K' at another.

    Attributes:
        relative_change: ‖K' − K‖_F/‖K‖_F; infinite where K = 0 ≠ K'.
        alignment: ⟨K, K'⟩/(‖K‖_F‖K'‖_F), from 0 to 1, which no scale changes; 0 where one is 0.
    """

    relative_change: Scalar
    alignment: Scalar


@checked_but("loss")
def kernel_change(
    loss: AbstractResidualLoss | AbstractExampleLoss, point: Point, other: Point
) -> KernelChange:
    """How much the neural tangent kernel K = JJᵀ on the data differs at another point.

    In the kernel regime (wide networks, large initial weights) K hardly changes while a model is
    trained, which then behaves like its linearisation `losses.linearized(loss, point)`, whose K
    does not change at all. Along a run, for instance:

        observe={"kernel": lambda now: kernel_change(loss, start, now).relative_change}

    Two n×n matrices are formed, from structured Jacobians where n×D numbers would be many.

    Args:
        loss: over examples, of whose n outputs it is the kernel, or any with residuals.
        point: where K is taken, as the start of a run.
        other: where K' is taken.

    References:
        [LiWangArora2022, section 6.3].
    """
    if not isinstance(loss, AbstractResidualLoss | AbstractExampleLoss):
        raise ValueError(
            "kernel_change needs a loss with residuals, or over examples; got "
            f"{type(loss).__name__}. Use LeastSquares or PerExampleLoss."
        )
    (kernel, size), (moved, moved_size) = map(
        _tree.in_own_units, (_kernel(loss, point), _kernel(loss, other))
    )
    norm, moved_norm = _tree.norm(kernel), _tree.norm(moved)
    gap = _tree.norm(moved * (moved_size / size) - kernel)
    is_zero, product = norm == 0, norm * moved_norm
    change = _tree.where(is_zero & (gap > 0), jnp.inf, gap / _tree.where(is_zero, 1, norm))
    alignment = _precision.vdot(kernel, moved) / _tree.where(product == 0, 1, product)
    return KernelChange(change, alignment)


def _kernel(loss: AbstractResidualLoss | AbstractExampleLoss, point: Point) -> Array:
    is_of_outputs = isinstance(loss, AbstractExampleLoss)
    return (loss.output_jacobian(point) if is_of_outputs else loss.jacobian(point)).gram()
