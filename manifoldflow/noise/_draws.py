"""Random vectors of mean 0 and covariance I: normal numbers, signs, or one axis at a time."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._types import Key


def checked_distribution(name: str, value: Any, *known: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    *others, last = (repr(one) for one in known)
    raise ValueError(f"{name} must be {', '.join(others)} or {last}; got {value!r}.")


def drawn_like(key: Key, structure: PyTree[Any], distribution: str) -> PyTree[Array]:
    """Random arrays of these shapes. With "columns" one entry is √Ξ and all others are 0.

    Such arrays have the second moments of the others but not their mean: the factor they are
    multiplied by has to be free of its mean.
    """
    if distribution == "normal":
        return _tree.random_normal_like(key, structure)
    leaves, treedef = jax.tree.flatten(structure)
    if distribution == "rademacher":
        keys = jr.split(key, len(leaves))
        drawn = [jr.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
        return jax.tree.unflatten(treedef, drawn)
    zeros, unravel = ravel_pytree([jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves])
    # One column of Ξ at a time, times √Ξ: E ξξᵀ = (1/Ξ)·Ξ·1 = 1.
    picked = zeros.at[jr.randint(key, (), 0, len(zeros))].set(math.sqrt(len(zeros)))
    return jax.tree.unflatten(treedef, unravel(picked))
