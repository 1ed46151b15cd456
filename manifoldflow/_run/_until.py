"""Conditions that end a run before its time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._boundary import checked_fields
from manifoldflow._errors import checked_nonnegative
from manifoldflow._types import Flag, Point, Scalar, Tangent


def _tolerance(value: Any) -> Scalar:
    return jnp.asarray(checked_nonnegative("Stationary: tolerance", value), float)


class Stationary(eqx.Module):
    """A condition for `until` of `solve` and `simulate`: the drift's norm is at most `tolerance`.

    The drift of SGD is −∇L of all examples, without noise: one more gradient at every step.

    Args:
        tolerance: a length ≥ 0, in coordinates per unit of time.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> flow = mf.GradientFlow(mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2))
        >>> start, until = jnp.array([1.0]), mf.Stationary(0.01)
        >>> walk = mf.solve(flow, start, end_time=100.0, until=until)
        >>> print(walk.result == mf.RESULTS.stopped_early, walk.times[-1] < 10)
        True True
    """

    tolerance: Scalar = eqx.field(converter=_tolerance)

    def __check_init__(self):
        checked_fields(self)


Until = Callable[[Point], Any] | Stationary
"""What ends a run early: a predicate of the point, or where nothing drifts any more."""


def stops_at(until: Until, point: Point, drift_fn: Callable[[Point], Tangent]) -> Flag:
    """True where a run is to end at a point.

    Raises:
        ValueError: a predicate that gives no single truth value.
    """
    if isinstance(until, Stationary):
        return _tree.norm(drift_fn(point)) <= until.tolerance
    found = jnp.asarray(until(point))
    if found.shape != ():
        raise ValueError(
            f"`until` must return one truth value; got an array of shape {found.shape}. Join its "
            "entries by jnp.all or jnp.any."
        )
    if found.dtype != bool:
        raise ValueError(
            f"`until` must return a truth value; got a number of type {found.dtype}. Compare it, "
            "e.g. loss(point) < 1e-3."
        )
    return found
