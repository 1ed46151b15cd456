"""The memory that the algorithms of this package may take by themselves."""

import jax

_GIB = 2**30


def memory_budget() -> int:
    """The bytes for any one of: a Gram matrix with its factor, the factors of a Jacobian.

    It is an eighth of the memory of the default device where the device tells it (GPUs and TPUs
    do), else 2 GiB.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 16 * _GIB)
    return int(limit) // 8
