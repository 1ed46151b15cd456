"""Announcements on stderr of what takes long."""

import sys
import threading
import time


class Waiting:
    """Says on stderr what is being done, and in a terminal for how long so far."""

    def __init__(self, what: str):
        self._what = what
        self._is_over = threading.Event()
        # XLA compiles for long without coming back to Python. A daemon does not hold up the end.
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> "Waiting":
        if sys.stderr.isatty():
            self._thread.start()
        else:
            # A log file has no line that could be written over.
            print(f"{self._what} …", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def clear(self) -> None:
        """Make place for a line of the output."""
        if self._thread.is_alive():
            print(f"\r{' ' * (len(self._what) + 10)}\r", end="", file=sys.stderr, flush=True)

    def _show(self) -> None:
        began = time.perf_counter()
        while not self._is_over.wait(0.5):
            line = f"\r{self._what} … {time.perf_counter() - began:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)
        self.clear()
