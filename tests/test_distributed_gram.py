"""Gram matrices over several devices: the same numbers, and no device with n² of them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from checks import at_most, equal, refused
from manifoldflow import linalg
from manifoldflow.linalg import _distributed
from processes import finished, start


@pytest.fixture(scope="module")
def report():
    found, _ = finished(start("distributed_programs.py", num_devices=8))
    return found


def test_the_solution_is_that_of_one_device(report):
    for name, gap in report["factorisations"].items():
        at_most(f"{name} devices: relative difference from LAPACK", gap, 1e-12)


def test_geometry_is_that_of_one_device(report):
    for name, (gap, sent) in report["devices"].items():
        at_most(f"{name}: relative difference from one device", gap, 1e-10)
        assert set(sent) <= {"all-gather", "all-reduce"}, f"{name}: messages {sent}"
        at_most(f"{name}: messages {sent}", sum(sent.values()), 50)


def test_the_program_does_not_grow_and_no_device_holds_the_matrix(report):
    (small, sent, _), (large, sent_by_large, largest) = report["programs"]
    at_most("lines of the program for twice the rows, in those for once", large / small, 1.02)
    equal("messages: two of the factorisation, two of the solves", sent, {"all-reduce": 4})
    equal("messages for twice the rows", sent_by_large, sent)
    at_most("largest array, in shares of n²", largest, 1 / 8 + 0.01)


@pytest.mark.parametrize(("size", "dtype"), [(300, jnp.float64), (128, jnp.float32)])
def test_in_blocks_by_one_device(size, dtype):
    """What large matrices are factorised by on TPUs."""
    rows = jr.normal(jr.key(0), (size, size + 8), dtype)
    matrix, right = rows @ rows.T, jr.normal(jr.key(1), (size,), dtype)
    eps = float(jnp.finfo(dtype).eps)
    factor = jax.jit(_distributed._cholesky_alone)(matrix)
    block = _distributed._Layout.of(size, ()).block
    expected = np.linalg.cholesky(np.asarray(matrix, float))
    for first in range(0, size, block):  # kept inverted
        part = slice(first, min(first + block, size))
        expected[part, part] = np.linalg.inv(expected[part, part])
    at_most("L", np.max(np.abs(factor - expected)) / np.max(expected), 100 * eps)
    at_most("entries above the diagonal", np.max(np.abs(np.triu(factor, 1))), 0)
    found = jax.jit(_distributed._solve_alone)(factor, right)
    back = np.asarray(matrix, float) @ np.asarray(found, float) - right
    at_most("A x − b", np.max(np.abs(back)) / np.linalg.norm(right), 1000 * size * eps)
    assert np.all(np.isnan(jax.jit(_distributed._cholesky_alone)(-matrix)))


def test_bad_input():
    jacobian = linalg.DenseJacobian(jnp.eye(4))
    with refused(ValueError, "DenseGram: is_distributed", "mesh in force", "got 1"):
        linalg.DenseGram(is_distributed=True)(jacobian)
