"""Iterative Gram solves: iterations as many as the theory of their preconditioner allows."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from checks import at_most, equal
from manifoldflow import linalg

SIZE, DAMPING, RTOL = 120, 1e-4, 1e-8


def jacobian_of(decay, key=0, dtype=jnp.float64):
    """Rows of length one; the eigenvalues of K fall as exp(−decay·i)."""
    left, right = (jr.normal(k, (SIZE, 150), dtype) for k in jr.split(jr.key(key)))
    left, right = jnp.linalg.qr(left.T)[0].T[:, :SIZE], jnp.linalg.qr(right.T)[0].T
    rows = left * jnp.exp(-decay / 2 * jnp.arange(SIZE)) @ right
    return linalg.DenseJacobian(rows / jnp.linalg.norm(rows, axis=1, keepdims=True))


def prepared(jacobian, rank, **options):
    gram = linalg.IterativeGram(RTOL, preconditioner_rank=rank, **options)(jacobian)
    return gram.damped(jnp.asarray(DAMPING))


@pytest.fixture(scope="module")
def jacobian():
    return jacobian_of(0.8)


def test_iterations_are_as_few_as_the_effective_dimension_says(jacobian):
    """[FrangellaTroppUdell2023]: a sketch of rank 2⌈1.5 d⌉ + 1 leaves a condition below 28.

    d = Σ λ/(λ + μ) is the effective dimension of K for the shift μ. Conjugate gradients then
    shrink the error in the norm of the matrix by 2((√28 − 1)/(√28 + 1))ᵗ, and the residual by √κ
    times that at most.
    """
    right = jr.normal(jr.key(1), (SIZE,))
    eigenvalues = np.maximum(np.linalg.eigvalsh(jacobian.gram()), 0)
    dimension = np.sum(eigenvalues / (eigenvalues + DAMPING))
    rank = 2 * math.ceil(1.5 * dimension) + 1
    assert rank < SIZE, f"the effective dimension {dimension:.1f} is too large to say anything"
    sketched = prepared(jacobian, rank)
    assert sketched.sketch is not None
    matrix = np.asarray(jacobian.gram()) + DAMPING * np.eye(SIZE)
    inverse = np.asarray(jax.vmap(sketched.precondition, out_axes=1)(jnp.eye(SIZE)))
    spectrum = np.sort(np.linalg.eigvals(inverse @ matrix).real)
    at_most("condition that is left", spectrum[-1] / spectrum[0], 28)

    solution, num_steps = sketched.solve_with_info(right)
    rate = (math.sqrt(28) - 1) / (math.sqrt(28) + 1)
    bound = math.log(2 * math.sqrt(np.linalg.cond(matrix)) / RTOL) / -math.log(rate)
    at_most("iterations", int(num_steps), bound)
    plain, num_plain = prepared(jacobian, 0).solve_with_info(right)
    at_most("iterations, in those without a sketch", int(num_steps) / int(num_plain), 0.25)
    expected = np.linalg.solve(matrix, right)
    for name, found in ("sketched", solution), ("plain", plain):
        at_most(name, np.linalg.norm(found - expected) / np.linalg.norm(expected), 1e-4)


def test_a_larger_sketch_needs_fewer_iterations(jacobian):
    right = jr.normal(jr.key(1), (SIZE,))
    steps = [int(prepared(jacobian, rank).solve_with_info(right)[1]) for rank in (0, 15, 30, 60)]
    equal("fewer with each", sorted(set(steps), reverse=True), steps)


def test_one_key_one_sketch(jacobian):
    one, same, other = (prepared(jacobian, 20, key=jr.key(k)).sketch.values for k in (1, 1, 2))
    assert jnp.array_equal(one, same), "the same key gave another sketch"
    assert not jnp.array_equal(one, other), "another key gave the same sketch"


def test_derivatives_and_batches(jacobian):
    """Those of the equation: they need no more digits of the iteration than it has."""
    right = jr.normal(jr.key(1), (SIZE,))

    def energy(scale, right):
        moved = linalg.DenseJacobian(jacobian.leaf_rows * (1 + scale * jnp.arange(SIZE)[:, None]))
        return jnp.sum(prepared(moved, 60, max_steps=60).solve(right) * right)

    def exact(scale, right):
        rows = jacobian.leaf_rows * (1 + scale * jnp.arange(SIZE)[:, None])
        matrix = rows @ rows.T
        damped = matrix + DAMPING * jax.lax.stop_gradient(jnp.diag(jnp.diag(matrix)))
        return right @ jnp.linalg.solve(damped, right)

    rights = jnp.stack([right, right[::-1]])
    found = jax.jit(jax.vmap(jax.value_and_grad(energy), (None, 0)))(1e-3, rights)
    expected = jax.vmap(jax.value_and_grad(exact), (None, 0))(1e-3, rights)
    for name, one, other in zip(("values", "derivatives"), found, expected):
        at_most(name, jnp.max(jnp.abs(one / other - 1)), 1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20])
def test_single_precision_at_any_size(size):
    """Squares of such numbers are zero or infinite in float32."""
    jacobian = jacobian_of(0.05, dtype=jnp.float32)
    right = jr.normal(jr.key(1), (SIZE,), jnp.float32)
    solve = (
        linalg.IterativeGram(1e-5, preconditioner_rank=60)(jacobian).damped(jnp.asarray(1e-2)).solve
    )
    found, expected = solve(size * right) / size, solve(right)
    gap = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
    at_most("relative difference", gap, 1e-3)


def test_rows_of_several_chunks():
    """A Jacobian in chunks holds a function, whose program is no array."""
    fn = lambda w, x: jnp.tanh(w * x)
    data = jr.normal(jr.key(0), (6, 8))
    in_chunks = linalg.chunked_jacobian(fn, jnp.ones(8), data, 2)
    whole = linalg.dense_jacobian(fn, jnp.ones(8), data)
    gram = linalg.IterativeGram(1e-12, preconditioner_rank=8)
    found, expected = (gram(j).solve(j.mv(jnp.arange(8.0))) for j in (in_chunks, whole))
    at_most("relative difference", jnp.max(jnp.abs(found - expected)), 1e-6)
