"""Problems that are too large are refused before anything is computed."""

import os

MAX_RESIDUALS = 5000
# n×n arrays that a walk has at once at its peak, measured with n from 500 to 2,000.
GRAM_COPIES = 12


def check_sizes(
    num_residuals: int, num_coordinates: int, itemsize: int, *, fewer: str, wider: str
) -> None:
    """Whether there is a manifold of perfect fits, and whether a walk on it can be afforded.

    Args:
        num_residuals: n, examples × outputs.
        num_coordinates: D, weights that move.
        itemsize: bytes of a number.
        fewer: what makes n smaller.
        wider: what makes D larger.

    Raises:
        ValueError: says which size is too large, and what to ask for instead.
    """
    if num_residuals >= num_coordinates:
        raise ValueError(
            f"{num_residuals} residuals (examples × outputs) must be fewer than the "
            f"{num_coordinates} parameters, or there is no manifold of perfect fits. Use fewer "
            f"examples or a wider model: {fewer} or {wider}."
        )
    if num_residuals > MAX_RESIDUALS:
        raise ValueError(
            f"{num_residuals} residuals (examples × outputs) are too many: a walk factorises some "
            f"thousand matrices of that size. At most {MAX_RESIDUALS} are taken here: {fewer}; "
            "for larger ones call the library with manifoldflow.linalg.IterativeGram."
        )
    needed = itemsize * (GRAM_COPIES * num_residuals**2 + 30 * num_coordinates)
    memory = memory_of_this_machine()
    if memory is not None and needed > 0.8 * memory:
        raise ValueError(
            f"{num_residuals} residuals and {num_coordinates} parameters take about "
            f"{needed / 1e9:.2g} GB; this machine has {memory / 1e9:.2g} GB. Use fewer examples "
            f"({fewer}) or --float32."
        )


def memory_of_this_machine() -> int | None:
    """Bytes, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
