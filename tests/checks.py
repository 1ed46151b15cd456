"""Comparisons that print value and bound, slopes, finite differences."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree


def at_most(what: str, value: Any, bound: float) -> None:
    """value ≤ bound; NaN fails."""
    value = float(value)
    assert value <= bound, f"{what}: {value:.4e} is above the bound {bound:.4e}"


def at_least(what: str, value: Any, bound: float) -> None:
    value = float(value)
    assert value >= bound, f"{what}: {value:.4e} is below the bound {bound:.4e}"


def equal(what: str, value: Any, expected: Any) -> None:
    assert value == expected, f"{what}: got {value!r}, expected {expected!r}"


def flat(tree: Any) -> jax.Array:
    """All leaves as one vector."""
    return ravel_pytree(tree)[0]


def norm(tree: Any) -> float:
    return float(jnp.linalg.norm(flat(tree)))


def distance(value: Any, expected: Any) -> float:
    """‖value − expected‖/max(‖expected‖, tiny) for PyTrees of one size; inf if sizes differ."""
    a, b = _numbers(value), _numbers(expected)
    if a.shape != b.shape:
        return np.inf
    return float(np.linalg.norm(a - b) / np.maximum(np.linalg.norm(b), 1e-300))


def _numbers(tree: Any) -> np.ndarray:
    """`flat` by NumPy: in JAX each new shape would be several more programs."""
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    double = [leaf.astype(np.result_type(leaf, np.float64)) for leaf in leaves]
    return np.concatenate([np.zeros(0), *double])


def close(
    what: str, value: Any, expected: Any, bound: float, *, scale: float | None = None
) -> None:
    """Relative distance at most `bound`; with `scale` the distance is divided by it instead."""
    relative = distance(value, expected)
    if scale is not None:
        relative = float(np.linalg.norm(_numbers(value) - _numbers(expected))) / scale
    at_most(what, relative, bound)


def slope(steps: Any, errors: Any) -> float:
    """The order of errors in steps: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(np.asarray(steps)), np.log(np.asarray(errors)), 1)[0])


def in_window(what: str, value: float, low: float, high: float) -> None:
    assert low <= value <= high, f"{what}: {value:.3f} is outside the window [{low}, {high}]"


def central_difference(fn: Callable[[float], Any], step: float) -> jax.Array:
    """d/dt fn(t) at 0 as one vector, to fourth order in `step`."""
    f = lambda t: flat(fn(t))
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


@contextlib.contextmanager
def refused(error: type[Exception], *words: str, wrong_type: bool = False) -> Iterator[None]:
    """The block raises `error`, and its message has all these words.

    A `wrong_type` may be refused by a type checker instead, where the tests run under one.
    """
    with pytest.raises((error, jaxtyping.TypeCheckError) if wrong_type else error) as caught:
        yield
    if isinstance(caught.value, jaxtyping.TypeCheckError):
        return
    message = re.sub(r"\s+", " ", str(caught.value))
    missing = [word for word in words if word not in message]
    assert not missing, f"the message lacks {missing}: {message[:800]}"
