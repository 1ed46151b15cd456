"""Mean, standard error and quantiles over the members of an ensemble that did not fail."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from manifoldflow._boundary import checked_but
from manifoldflow._errors import numbers, real_numbers, shapes_of
from manifoldflow._jit import jit_part


class Statistics(eqx.Module):
    """Mean, deviation, standard error and quantiles over the members of an ensemble.

    Attributes:
        mean: over the members that did not fail; NaN if all failed.
        standard_deviation: with n − 1; infinite for fewer than two members.
        standard_error: standard_deviation/√n, of the mean.
        quantiles: with a leading axis of `levels`.
        levels: the levels of the quantiles, in [0, 1].
        count: n, the number of members that went into these numbers.
        num_failed: the members left out, for NaN or infinity anywhere in their values. Those
            that are left are no fair sample if the members that failed had something in
            common, as SGD that diverged has.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.statistics(jnp.array([1.0, 3.0, jnp.nan]))
        >>> print(found.mean, found.standard_error, found.count, found.num_failed)
        2.0 1.0 2 1
    """

    mean: PyTree[Array]
    standard_deviation: PyTree[Array]
    standard_error: PyTree[Array]
    quantiles: PyTree[Array]
    levels: Float[Array, " levels"]
    count: Int[Array, ""]
    num_failed: Int[Array, ""]


@checked_but("levels")
def statistics(
    values: PyTree[Any], axis: int = 0, *, levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> Statistics:
    """Mean, standard error and quantiles over the members of an ensemble.

    A member with NaN or infinity anywhere, in any of the arrays, is left out of all of them
    and counted in `num_failed`.

    Args:
        values: a PyTree of real arrays with an axis of members each.
        axis: of the members.
        levels: of the quantiles, in [0, 1]; between members they are interpolated linearly.

    Returns:
        The `Statistics`, each number of the structure of `values` without the axis of members.

    Raises:
        ValueError: arrays without a common axis of members, complex numbers, levels out of
            range.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> found = mf.ensembles.statistics(jnp.arange(5.0), levels=(0.5, 1.0))
        >>> print(found.mean, found.standard_deviation.round(3), found.quantiles)
        2.0 1.581 [2. 4.]
    """
    arrays = jax.tree.map(lambda leaf: jnp.asarray(numbers("values", leaf)), values)
    asked = np.asarray(real_numbers("levels", levels))
    num_members = _num_members(arrays, axis)
    if not all(0 <= level <= 1 for level in asked.reshape(-1)) or asked.ndim != 1:
        raise ValueError(f"levels must be a sequence of numbers in [0, 1]; got {levels}.")
    arrays = jax.tree.map(lambda leaf: _members_first(leaf, axis), arrays)
    return _statistics(arrays, jnp.asarray(levels, float), num_members)


@jit_part
def _statistics(
    arrays: PyTree[Array], levels: Float[Array, " levels"], num_members: int
) -> Statistics:
    is_fine = _finite_members(arrays)
    count = jnp.sum(is_fine)
    mean = jax.tree.map(lambda leaf: _mean(leaf, is_fine), arrays)
    deviation = jax.tree.map(lambda leaf, mid: _deviation(leaf, mid, is_fine), arrays, mean)
    return Statistics(
        mean=mean,
        standard_deviation=deviation,
        standard_error=jax.tree.map(
            lambda leaf: leaf / jnp.sqrt(jnp.maximum(count, 1).astype(leaf.dtype)), deviation
        ),
        quantiles=jax.tree.map(lambda leaf: _quantiles(leaf, is_fine, levels), arrays),
        levels=levels,
        count=count,
        num_failed=num_members - count,
    )


def _num_members(arrays: PyTree[Array], axis: int) -> int:
    leaves = jax.tree.leaves(arrays)
    lengths = {leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else 0 for leaf in leaves}
    is_real = all(
        jnp.issubdtype(leaf.dtype, jnp.floating)
        or jnp.issubdtype(leaf.dtype, jnp.integer)
        or leaf.dtype == bool
        for leaf in leaves
    )
    if len(lengths) != 1 or 0 in lengths or not is_real:
        raise ValueError(
            f"values must be real arrays with a common, non-empty axis {axis} of members; got "
            f"{shapes_of(arrays)}."
        )
    return lengths.pop()


def _members_first(leaf: Array, axis: int) -> Array:
    leaf = jnp.moveaxis(leaf, axis, 0)
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(float)


def _finite_members(arrays: PyTree[Array]) -> Bool[Array, " members"]:
    fine = [
        jnp.all(jnp.isfinite(leaf.reshape(len(leaf), -1)), axis=1)
        for leaf in jax.tree.leaves(arrays)
    ]
    return jnp.all(jnp.stack(fine), axis=0)


def _kept(leaf: Array, is_fine: Array, otherwise: float) -> Array:
    """The leaf with another number at failed members, before any arithmetic meets NaN."""
    return jnp.where(is_fine.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, otherwise)


def _mean(leaf: Array, is_fine: Array) -> Array:
    return jnp.sum(_kept(leaf, is_fine, 0.0), axis=0) / jnp.sum(is_fine).astype(leaf.dtype)


def _deviation(leaf: Array, mean: Array, is_fine: Array) -> Array:
    # Around the mean, as E x² − (E x)² would cancel.
    squares = jnp.sum(_kept(leaf - mean, is_fine, 0.0) ** 2, axis=0)
    count = jnp.sum(is_fine).astype(leaf.dtype)
    return jnp.where(count > 1, jnp.sqrt(squares / jnp.maximum(count - 1, 1)), jnp.inf)


def _quantiles(leaf: Array, is_fine: Array, levels: Any) -> Array:
    # Failed members sort behind all others, and `last` never reaches them.
    ordered = jnp.sort(_kept(leaf, is_fine, math.inf), axis=0)
    last = jnp.maximum(jnp.sum(is_fine) - 1, 0)
    places = jnp.asarray(levels, leaf.dtype) * last
    below = jnp.clip(jnp.floor(places).astype(int), 0, last)
    above = jnp.minimum(below + 1, last)
    share = (places - below).astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
    found = ordered[below] + share * (ordered[above] - ordered[below])
    return jnp.where(jnp.any(is_fine), found, jnp.nan)
