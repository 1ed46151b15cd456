"""The Jacobian of a model over its examples: dense, structured or in chunks, as pays."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from manifoldflow import _mesh, _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Coordinates, Example
from manifoldflow.linalg._memory import memory_budget
from manifoldflow.linalg.jacobian._chunked import chunked_jacobian
from manifoldflow.linalg.jacobian._dense import dense_jacobian
from manifoldflow.linalg.jacobian._operator import AbstractJacobian
from manifoldflow.linalg.jacobian._structured import structured_jacobian

# Up to this many numbers explicit rows are simpler to compile, and half a megabyte is no
# memory to save; the threshold itself is a judgement, not a measurement. Convolutions are
# excepted: one kernel gradient for each example is 15 times slower than patches on CPUs.
_SMALL = 2**16


@checked
def jacobian(
    fn: Callable[[Coordinates, Example], Array],
    coordinates: Coordinates,
    data: PyTree[Array],
    *,
    memory: int | None = None,
) -> AbstractJacobian:
    """The Jacobian of all outputs of `fn` on all examples, in the order of the examples.

    Explicit rows are kept where n·D is at most 65,536 and nothing is convolved, or where there is a
    single example. Otherwise it is a `structured_jacobian`, which never builds n×D numbers for the
    layers that it knows. It is formed in chunks of examples where its factors, or the rows of
    leaves that it does not know, would take more than `memory`.

    Args:
        fn: maps coordinates and one example to an array of k numbers.
        coordinates: of the point.
        data: PyTree with a leading axis of N examples.
        memory: bytes that may be kept; None for an eighth of the device's memory, or 2 GiB where
            the device does not tell.

    Returns:
        An operator with n = N·k rows; row i·k + c is ∇ of output c on example i.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> square = lambda w, x: (w @ x) ** 2
        >>> jacobian = linalg.jacobian(
        ...     square, jnp.array([1.0, 2.0]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
        ... )
        >>> print(jacobian.mv(jnp.array([1.0, 0.0])), jacobian.transpose_mv(jnp.array([0.0, 1.0])))
        [30.  0.] [0. 4.]
    """
    memory = memory_budget() if memory is None else checked_count("jacobian: memory", memory)
    num_examples = jax.tree.leaves(data)[0].shape[0]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    program, output = jax.make_jaxpr(fn, return_shape=True)(coordinates, one)
    num_rows = num_examples * output.size
    is_small = num_rows * _tree.size(coordinates) <= _SMALL
    # Printed, a program shows the operations of its inner programs as well.
    if num_examples == 1 or (is_small and "conv_general_dilated" not in str(program)):
        return dense_jacobian(fn, coordinates, data)
    itemsize = _tree.dtype_of(coordinates).itemsize
    if num_rows * _tree.size(coordinates) * itemsize <= memory:
        return structured_jacobian(fn, coordinates, data)
    # By shapes alone: nothing is computed to learn that it would not fit.
    kept = jax.eval_shape(lambda *at: structured_jacobian(fn, *at).blocks, coordinates, data)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    num_bytes = max(1, _mesh.share_of(kept))
    if num_bytes <= memory:
        return structured_jacobian(fn, coordinates, data)
    # Two chunks at a time, with what reverse mode keeps of each.
    chunk_size = max(1, num_examples * memory // (8 * num_bytes))
    return chunked_jacobian(fn, coordinates, data, chunk_size)
