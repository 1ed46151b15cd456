"""Batched factorisations do not wait for each other: jaxlib's own do, for ever, on few cores."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from checks import close
from manifoldflow import linalg

PROGRAM = """
import jax, jax.numpy as jnp, manifoldflow as mf
inputs, targets, _ = mf.models.sparse_regression(jax.random.key(0), 40, 100, 5)
model = mf.models.OverparametrizedLinear(inputs, targets)
land = lambda scale: mf.limit_map(model.loss, model.initial(scale), throw=False)["u"]
print(bool(jnp.isfinite(jax.vmap(land)(jnp.logspace(-2, 1.5, 13))).all()))

def several(key):
    root = jax.random.normal(key, (60, 50))
    inverses = [mf.linalg.pseudo_inverse(root @ root.T + k * jnp.eye(60), 50) for k in range(8)]
    return sum(jnp.trace(inverse) for inverse in inverses)

keys = jax.random.split(jax.random.key(0), 16)
print(bool(jnp.isfinite(jax.jit(jax.vmap(several))(keys)).all()))

def sketched(key):
    rows = jax.random.normal(key, (60, 80))
    jacobians = [mf.linalg.dense_jacobian(jnp.dot, jnp.zeros(80), k * rows) for k in range(1, 9)]
    solver = mf.linalg.IterativeGram(preconditioner_rank=50)
    return sum(jnp.sum(solver(jacobian).sketch.vectors) for jacobian in jacobians)

print(bool(jnp.isfinite(jax.jit(jax.vmap(sketched))(keys)).all()))
"""


def test_many_at_once_on_two_threads():
    """Five of five runs of the first half, four of five of the second, hung in XLA's pool."""
    environment = {**os.environ, "PJRT_NPROC": "2", "JAX_ENABLE_X64": "1"}
    # What the tests set to compile faster may hide it.
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert run.stdout.split() == ["True"] * 3, run.stderr[-2000:]


def test_one_by_one_is_what_vmap_gives():
    matrices = jr.normal(jr.key(0), (3, 4, 4))
    matrices = matrices @ matrices.mT + jnp.eye(4)
    vectors = jr.normal(jr.key(1), (3, 4))
    solve = linalg.one_by_one(jnp.linalg.solve)
    for axes in ((0, 0), (0, None), (None, 0)):
        arguments = [x if axis == 0 else x[0] for x, axis in zip((matrices, vectors), axes)]
        expected = jax.vmap(jnp.linalg.solve, in_axes=axes)(*arguments)
        close(f"axes {axes}", jax.jit(jax.vmap(solve, in_axes=axes))(*arguments), expected, 1e-12)
    twice = jax.vmap(jax.vmap(solve))(matrices[None], vectors[None])
    close("nested", twice[0], jax.vmap(jnp.linalg.solve)(matrices, vectors), 1e-12)


def test_derivatives_of_eigenvalues_and_vectors():
    """Those of jax.numpy.linalg.eigh, to second order and under vmap."""
    matrices = jr.normal(jr.key(2), (2, 4, 4))
    weights = jr.normal(jr.key(3), (4, 5))

    def of(eigh):
        def number(matrix):
            values, vectors = eigh(matrix @ matrix.T)
            return jnp.sum(weights[:, 0] * values) + jnp.sum((weights[:, 1:] * vectors) ** 2)

        first = jax.vmap(jax.grad(number))(matrices)
        return first, jax.vmap(jax.hessian(number))(matrices)

    found, expected = jax.jit(lambda: (of(linalg.eigh), of(jnp.linalg.eigh)))()
    close("gradient", found[0], expected[0], 1e-11)
    close("Hessian", found[1], expected[1], 1e-9)


def test_positive_solver():
    """Values and derivatives of jax.numpy.linalg.solve, to second order and under vmap."""
    roots, vectors = jr.normal(jr.key(4), (3, 4, 4)), jr.normal(jr.key(5), (3, 4))
    matrix = lambda root: root @ root.T + jnp.eye(4)
    ours = lambda root, v: linalg.positive_solver(matrix(root))(v)
    theirs = lambda root, v: jnp.linalg.solve(matrix(root), v)
    close(
        "values", jax.jit(jax.vmap(ours))(roots, vectors), jax.vmap(theirs)(roots, vectors), 1e-12
    )
    for which in (0, 1):
        height = lambda fn: lambda root, v: jnp.sum(jnp.sin(fn(root, v)))
        first = [jax.grad(height(fn), which)(roots[0], vectors[0]) for fn in (ours, theirs)]
        close(f"gradient in argument {which}", *first, 1e-12)
        second = [
            jax.jacfwd(jax.grad(height(fn), which))(roots[0], vectors[0]) for fn in (ours, theirs)
        ]
        close(f"second derivative in argument {which}", *second, 1e-11)
    for bad in (-jnp.eye(2), jnp.full((2, 2), jnp.nan)):
        assert jnp.isnan(linalg.positive_solver(bad)(jnp.ones(2))).all(), bad
    with pytest.raises(ValueError, match="matrix"):
        linalg.positive_solver(jnp.ones((2, 3)))
