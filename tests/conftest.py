"""Tests run in float64; single precision is tested by giving float32 points and data."""

import os
import pathlib
import sys

# Threads of XLA's pool can wait for work that only threads of the same pool would do; with
# one for each of two cores a test was once seen to wait for ever.
os.environ.setdefault("PJRT_NPROC", "8")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
# Tests compile much and compute little: a third of the time goes without optimisation.
jax.config.update("jax_disable_most_optimizations", True)

# So that all tests can import `checks` and `zoo`, however pytest imports the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Each holds memory maps, of which a process may have some 65,000: XLA crashes beyond."""
    yield
    jax.clear_caches()
