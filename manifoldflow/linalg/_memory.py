"""How much memory the algorithms here may take by themselves."""

import jax

_GIB = 2**30


def memory_budget() -> int:
    """Bytes for any one of: a Gram matrix with its factor, the factors of a Jacobian.

    An eighth of the memory of the default device where it says how much it has (GPUs and
    TPUs do), else 2 GiB.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 16 * _GIB)
    return int(limit) // 8


def dense_fits(num_rows: int, itemsize: int, memory: int | None = None) -> bool:
    """Whether a Gram matrix, its factor and one temporary do: 3n² numbers of so many bytes."""
    return 3 * num_rows**2 * itemsize <= (memory_budget() if memory is None else memory)
