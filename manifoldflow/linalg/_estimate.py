"""Estimates of sums over a space from random vectors of it, with their standard errors."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key


class Estimate(eqx.Module):
    """A mean over independent samples, with its standard error.

    Attributes:
        value: the mean, unbiased.
        standard_error: of the mean, number by number.

    Examples:
        >>> from manifoldflow import linalg
        >>> print(linalg.Estimate(1.5, 0.1).value)
        1.5
    """

    value: PyTree[Any]
    standard_error: PyTree[Any]


@checked
def estimate(term: Callable[[Key], PyTree[Any]], key: Key, num_samples: int) -> Estimate:
    """The mean of term(key) over independent keys, taken one after the other.

    Args:
        term: key → PyTree of numbers.
        key: a key of `jax.random`.
        num_samples: ≥ 2, for the standard error.

    Returns:
        An `Estimate`.

    Raises:
        ValueError: fewer than two samples.

    Examples:
        >>> import jax.random as jr
        >>> from manifoldflow import linalg
        >>> found = linalg.estimate(jr.normal, jr.key(0), 400)
        >>> print(bool(abs(found.value) < 0.25), f"{found.standard_error:.2f}")
        True 0.05
    """
    num_samples = checked_count("num_samples", num_samples)
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 for a standard error; got {num_samples}.")
    # One after the other: each sample may be a pass through a whole model.
    samples = jax.lax.map(term, jr.split(key, num_samples))
    error = lambda x: jnp.std(x, axis=0, ddof=1) / num_samples**0.5
    return Estimate(
        jax.tree.map(lambda x: jnp.mean(x, axis=0), samples), jax.tree.map(error, samples)
    )


@checked
def estimate_trace(
    operator: lx.AbstractLinearOperator, key: Key, *, num_samples: int = 64
) -> Estimate:
    """The trace of an operator from products with random vectors (Hutchinson), unbiased.

    The variance of one sample is 2‖A‖²_F for symmetric A.

    Args:
        operator: A, square, between PyTrees; never built.
        key: a key of `jax.random`.
        num_samples: the number of products, ≥ 2.

    Returns:
        An `Estimate`, with its standard error.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> import lineax as lx
        >>> from manifoldflow import linalg
        >>> operator = lx.DiagonalLinearOperator(jnp.array([1.0, 2.0, 3.0]))
        >>> found = linalg.estimate_trace(operator, jr.key(0), num_samples=400)
        >>> print(bool(abs(found.value - 6) < 5 * found.standard_error))
        True
    """
    structure = operator.in_structure()

    def term(key: Key) -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
        probe = _tree.random_normal_like(key, zeros)
        return _tree.inner(probe, operator.mv(probe))

    return estimate(term, key, num_samples)
