"""Python's garbage collector, kept from looking where there is no garbage."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """A context in which the collector works some seventy times more rarely.

    Tracing a program, and defining classes, make hundreds of thousands of objects of which nearly
    all stay: looking for garbage among them is a tenth of the time of a first call.
    """
    first, *others = gc.get_threshold()
    # 0 says that the user has switched the collector off.
    gc.set_threshold(first and max(first, 50_000), *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
