"""Sums over a space from random vectors of it, with their standard errors."""

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
    """A mean over independent samples.

    Attributes:
        value: the mean, unbiased.
        standard_error: of the mean, number by number.
    """

    value: PyTree[Any]
    standard_error: PyTree[Any]


@checked
def estimate(term: Callable[[Key], PyTree[Any]], key: Key, num_samples: int) -> Estimate:
    """The mean of term(key) over independent keys, one after the other.

    Args:
        term: key → PyTree of numbers.
        key: a key of `jax.random`.
        num_samples: at least two, for the standard error.
    """
    num_samples = checked_count("num_samples", num_samples)
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 for a standard error; got {num_samples}.")
    samples = jax.lax.map(term, jr.split(key, num_samples))
    error = lambda x: jnp.std(x, axis=0, ddof=1) / num_samples**0.5
    return Estimate(
        jax.tree.map(lambda x: jnp.mean(x, axis=0), samples), jax.tree.map(error, samples)
    )


@checked
def estimate_trace(
    operator: lx.AbstractLinearOperator, key: Key, *, num_samples: int = 64
) -> Estimate:
    """tr A from products with random vectors (Hutchinson): unbiased, with its standard error.

    The variance of one sample is 2‖A‖²_F for symmetric A.

    Args:
        operator: A, square, between PyTrees; never built.
        key: a key of `jax.random`.
        num_samples: products.
    """
    structure = operator.in_structure()

    def term(key: Key) -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
        probe = _tree.random_normal_like(key, zeros)
        return _tree.inner(probe, operator.mv(probe))

    return estimate(term, key, num_samples)
