"""The change of a model's kernel between two points: its departure from the kernel regime."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked_but
from manifoldflow._types import Point, Scalar
from manifoldflow.losses import AbstractExampleLoss, AbstractResidualLoss


class KernelChange(NamedTuple):
    """The difference between the kernel K at a point and K′ at another, from `kernel_change`.

    Attributes:
        relative_change: ‖K′ − K‖_F/‖K‖_F; infinite where K = 0 ≠ K′.
        alignment: ⟨K, K′⟩/(‖K‖_F‖K′‖_F), from 0 to 1, independent of scales; 0 where one is 0.

    Examples:
        >>> from manifoldflow import diagnostics
        >>> change, alignment = diagnostics.KernelChange(0.5, 1.0)
        >>> print(change, alignment)
        0.5 1.0
    """

    relative_change: Scalar
    alignment: Scalar


@checked_but("loss")
def kernel_change(
    loss: AbstractResidualLoss | AbstractExampleLoss, point: Point, other: Point
) -> KernelChange:
    """The change of the neural tangent kernel K = JJᵀ on the data from one point to another.

    In the kernel regime (wide networks, large initial weights) K hardly changes while a model is
    trained. The model then behaves like its linearisation `losses.linearized(loss, point)`, whose K
    does not change at all. Along a run, for instance:

        observe={"kernel": lambda now: kernel_change(loss, start, now).relative_change}

    Two n×n matrices are formed, from structured Jacobians where n×D numbers would be many.

    Args:
        loss: over examples, for the kernel of its n outputs; or any with residuals.
        point: the point of K, such as the start of a run.
        other: the point of K′.

    Returns:
        A `KernelChange`.

    Raises:
        ValueError: a loss without residuals and examples.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> loss = mf.LeastSquares(jnp.eye(2), jnp.ones(2), predict=lambda w, x: (w @ x) ** 2)
        >>> found = mf.diagnostics.kernel_change(loss, jnp.ones(2), jnp.array([2.0, 2.0]))
        >>> print(found.relative_change.round(4), found.alignment.round(4))  # K grows fourfold
        3.0 1.0

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
