"""Tests run in float64; single precision is tested by giving float32 points and data."""

import os
import pathlib
import sys

# Batched LAPACK calls of jaxlib wait inside threads of XLA's pool for other threads of it. The
# library does without most of them; tests also call some themselves.
os.environ.setdefault("PJRT_NPROC", "8")
# XLA's older code generator compiles in little more than half of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

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
