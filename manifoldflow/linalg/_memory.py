"""The memory that the algorithms of this package may take by themselves."""

from contextlib import AbstractContextManager

import jax

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count

_GIB = 2**30
# Part of the key under which compiled programs are kept: within another one they are made anew.
_said = jax.make_user_context(None)


@checked
def device_memory(num_bytes: int) -> AbstractContextManager[None]:
    """A context in which every device is taken to have this memory, whatever it says itself.

    An eighth of it is for the factors of a Jacobian: where those of all examples take more, the
    Jacobian goes in chunks of examples, which are smaller the less memory there is. Another
    eighth is for a Gram matrix with its factor (`linalg.AutoGram`). Without this context a device
    is asked; CPUs do not tell, and are taken to have 16 GiB.

    Args:
        num_bytes: the memory of one device, positive.

    Returns:
        A context manager.

    Raises:
        ValueError: no positive whole number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> from manifoldflow import linalg
        >>> predict = lambda w, x: jnp.sum(jnp.sinh(w @ x))
        >>> loss = mf.LeastSquares(jnp.ones((200, 20)), jnp.ones(200), predict=predict)
        >>> with linalg.device_memory(2**17):
        ...     print(type(loss.jacobian(jnp.ones((30, 20)))).__name__)
        ChunkedJacobian
    """
    return _said(checked_count("device_memory: num_bytes", num_bytes))


def memory_budget() -> int:
    """The bytes for any one of: a Gram matrix with its factor, the factors of a Jacobian.

    It is an eighth of what `device_memory` says, else of the memory of the default device where
    the device tells it (GPUs and TPUs do), else 2 GiB.
    """
    return (_said.value or _own_memory()) // 8


def _own_memory() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 16 * _GIB))


def dense_fits(num_rows: int, itemsize: int, memory: int | None = None) -> bool:
    """True where a Gram matrix, its factor and one temporary fit: 3n² numbers."""
    return 3 * num_rows**2 * itemsize <= (memory_budget() if memory is None else memory)
