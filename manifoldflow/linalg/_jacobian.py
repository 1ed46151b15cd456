"""The Jacobian of a model over its examples: dense or structured, as pays."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._types import Coordinates, Example
from manifoldflow.linalg._dense import dense_jacobian
from manifoldflow.linalg._operator import AbstractJacobian
from manifoldflow.linalg._structured import structured_jacobian

# Up to this many numbers explicit rows are simpler to compile, and half a megabyte is no
# memory to save; the threshold itself is a judgement, not a measurement.
_SMALL = 2**16


def jacobian(
    fn: Callable[[Coordinates, Example], Array],
    coordinates: Coordinates,
    data: PyTree[Array],
) -> AbstractJacobian:
    """Jacobian of all outputs of `fn` on all examples, in the order of the examples.

    Explicit rows where n·D is at most 65,536 or there is a single example; else
    `structured_jacobian`, which never builds n×D numbers for the layers it knows.

    Args:
        fn: maps coordinates and one example to an array of k numbers.
        coordinates: where to differentiate.
        data: PyTree with a leading axis of N examples.

    Returns:
        An operator with n = N·k rows; row i·k + c is ∇ of output c on example i.
    """
    num_examples = jax.tree.leaves(data)[0].shape[0]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    num_rows = num_examples * jax.eval_shape(fn, coordinates, one).size
    if num_examples == 1 or num_rows * _tree.size(coordinates) <= _SMALL:
        return dense_jacobian(fn, coordinates, data)
    return structured_jacobian(fn, coordinates, data)
