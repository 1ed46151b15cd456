"""Refusals of problems that are too large, before anything is computed."""

import os
from collections.abc import Callable

MAX_RESIDUALS = 5000
MANY_RESIDUALS = 1500
# n×n arrays that a walk has at once: 19 to 23 were measured between n = 500, 1,000 and 2,000.
GRAM_COPIES = 25


def check_sizes(
    num_residuals: int,
    num_coordinates: int,
    itemsize: int,
    *,
    fewer: Callable[[int], str],
    wider: str,
) -> None:
    """Refuses a problem without a manifold of perfect fits, or too large for a walk on it.

    Args:
        num_residuals: n, examples × outputs.
        num_coordinates: D, weights that move.
        itemsize: bytes of a number.
        fewer: the option for at most that number of residuals.
        wider: the option for more than n coordinates.

    Raises:
        ValueError: says which size is too large, and what to ask for instead.
    """
    if num_residuals > MAX_RESIDUALS:
        raise ValueError(
            f"{num_residuals} residuals (examples × outputs) are too many: a walk factorises some "
            f"thousand matrices of that size. At most {MAX_RESIDUALS} are taken here, as with "
            f"{fewer(MAX_RESIDUALS)}."
        )
    if num_residuals >= num_coordinates:
        raise ValueError(
            f"{num_residuals} residuals (examples × outputs) must be fewer than the "
            f"{num_coordinates} parameters, or there is no manifold of perfect fits. Use fewer "
            f"examples or a wider model: {fewer(num_coordinates - 1)} or {wider}."
        )
    needed = itemsize * (GRAM_COPIES * num_residuals**2 + 30 * num_coordinates)
    memory = memory_of_this_machine()
    if memory is not None and needed > 0.8 * memory:
        most = int((0.8 * memory / itemsize / GRAM_COPIES) ** 0.5)
        raise ValueError(
            f"{num_residuals} residuals and {num_coordinates} parameters take about "
            f"{needed / 1e9:.2g} GB; this machine has {memory / 1e9:.2g} GB. Use --float32 or "
            f"{fewer(most)}."
        )
    if num_residuals > MANY_RESIDUALS:
        print(
            f"{num_residuals} residuals: a walk factorises some thousand matrices of that size, "
            f"which may take hours; {fewer(MANY_RESIDUALS)} is quicker"
        )


def memory_of_this_machine() -> int | None:
    """The memory in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
