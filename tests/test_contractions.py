"""Sums of second derivatives against dense Hessians, and what they keep in memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import zoo
from checks import at_least, at_most, close, refused
from manifoldflow import linalg
from structured_models import drawn, normal

KINDS = {"dense": linalg.jacobian, "structured": linalg.structured_jacobian}
NUM_TERMS = 5


class Problem:
    """A tanh network with 8 outputs over its data, and its Hessians (8, D, D)."""

    def __init__(self):
        self.inputs, _ = zoo.data()
        self.params = zoo.network_point(jr.key(5))
        self.flat, self.unravel = ravel_pytree(self.params)
        outputs = lambda x: self.outputs(self.unravel(x))
        both = jax.jit(lambda x: (jax.hessian(outputs)(x), jax.jacrev(outputs)(x)))
        self.hessians, self.rows = map(np.asarray, both(self.flat))

    def outputs(self, params):
        return jax.vmap(lambda x: zoo.network(params, x))(self.inputs).reshape(-1)

    def jacobian_fn(self, kind):
        return lambda params: KINDS[kind](zoo.network, params, self.inputs)

    def operator_to_tangents(self, matrix):
        """The operator with these columns (D, r), through the network's own PyTree."""
        leaves = jax.jit(jax.vmap(self.unravel, in_axes=1, out_axes=-1))(jnp.asarray(matrix))
        return lx.PyTreeLinearOperator(leaves, jax.eval_shape(lambda: self.params))


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.parametrize("kind", KINDS)
def test_contract_hessians(problem, kind):
    coefficients = normal(1, 8, 8)
    rows_fn = problem.jacobian_fn(kind)
    contract = jax.jit(
        lambda c: ravel_pytree(linalg.contract_hessians(rows_fn, problem.params, c))[0]
    )
    found = contract(coefficients)
    tangents = np.asarray(coefficients).T @ problem.rows
    expected = np.einsum("iab,ib->a", problem.hessians, tangents)
    close("Σ ∇²fᵢ(JᵀC)ᵢ", found, expected, 1e-10)
    transposed = np.asarray(contract(coefficients.T))
    at_least("C and Cᵀ differ", np.linalg.norm(transposed - expected), 1e-2)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian_product_sum(problem, chunk_size):
    b, v = normal(2, 8, NUM_TERMS), normal(3, 36, NUM_TERMS)

    @jax.jit
    def product_sum(b, v):
        factors = lx.MatrixLinearOperator(b), problem.operator_to_tangents(v)
        return linalg.hessian_product_sum(
            problem.outputs, problem.params, *factors, chunk_size=chunk_size
        )

    found = product_sum(b, v)
    expected = np.einsum("iab,ir,br->a", problem.hessians, b, v)
    close(f"Σ ∇²(bᵣ·f)vᵣ, chunks of {chunk_size}", found, expected, 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_derivative_sum(problem, chunk_size):
    u, v = np.asarray(normal(4, 2, problem.flat.size, NUM_TERMS))

    @jax.jit
    def sums(u, v):
        left, right = problem.operator_to_tangents(u), problem.operator_to_tangents(v)
        # That a partner is the very same operator is seen, and saves half of the columns.
        return tuple(
            linalg.second_derivative_sum(
                problem.outputs, problem.params, left, partner, chunk_size=chunk_size
            )
            for partner in (right, left)
        )

    for found, matrix in zip(sums(u, v), (v, u), strict=True):
        expected = np.einsum("iab,ar,br->i", problem.hessians, u, matrix)
        close(f"Σ D²f[uᵣ, vᵣ], chunks of {chunk_size}", found, expected, 1e-10)


def test_columns(problem):
    matrix = normal(6, 8, problem.flat.size)

    @jax.jit
    def columns(matrix):
        flatten = lx.FunctionLinearOperator(
            lambda v: ravel_pytree(v)[0], jax.eval_shape(lambda: problem.params)
        )
        left = lx.MatrixLinearOperator(matrix) @ flatten
        return linalg.columns(left), linalg.columns(left, chunk_size=7)

    whole, in_chunks = columns(matrix)
    close("of a composition", whole, matrix, 1e-14)
    close("in chunks", in_chunks, matrix, 1e-14)


def test_derivatives_of_the_sums(problem):
    """Reverse mode over each sum, by differences: the coefficients are constants."""
    coefficients = normal(7, 8, 8)
    b, v = normal(8, 8, 3), normal(9, problem.flat.size, 3)
    operators = lx.MatrixLinearOperator(b), problem.operator_to_tangents(v)
    sums = {
        "contract": lambda p: linalg.contract_hessians(
            problem.jacobian_fn("dense"), p, coefficients
        ),
        "products": lambda p: linalg.hessian_product_sum(
            problem.outputs, p, *operators, chunk_size=1
        ),
    }
    direction = normal(10, problem.flat.size)
    for name, fn in sums.items():
        height = lambda x, fn=fn: jnp.sum(jnp.sin(ravel_pytree(fn(problem.unravel(x)))[0]))
        both, step = jax.jit(jax.value_and_grad(height)), 1e-5
        (above, _), (below, _) = (both(problem.flat + t * direction) for t in (step, -step))
        found = np.asarray(both(problem.flat)[1]) @ direction
        close(name, found, (above - below) / (2 * step), 1e-7)


def test_different_numbers_of_columns_are_refused(problem):
    one, two = (
        problem.operator_to_tangents(jnp.ones((36, 1))),
        problem.operator_to_tangents(jnp.ones((36, 2))),
    )
    with refused(ValueError, "same number of columns", "1 and 2"):
        linalg.second_derivative_sum(problem.outputs, problem.params, one, two)


# --- memory --------------------------------------------------------------------------------


def test_no_array_has_a_tangent_for_each_output():
    num_examples, width = 40, 256
    model = drawn(eqx.nn.MLP, 20, 1, width, 2, activation=jnp.tanh)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    inputs = normal(1, num_examples, 20)
    size = ravel_pytree(params)[0].size
    at_least("n·D is what to avoid", num_examples * size, 2**20)

    def outputs(p):
        return jax.vmap(eqx.combine(p, static))(inputs)[:, 0]

    def jacobian_fn(p):
        return linalg.jacobian(lambda p, x: eqx.combine(p, static)(x), p, inputs)

    jacobian = jax.jit(jacobian_fn)(params)
    assert isinstance(jacobian, linalg.StructuredJacobian)
    rows = jacobian.T
    identity = lx.IdentityLinearOperator(rows.in_structure())
    sums = {
        "contract_hessians": lambda p: linalg.contract_hessians(
            jacobian_fn, p, jnp.eye(num_examples)
        ),
        "hessian_product_sum": lambda p: linalg.hessian_product_sum(outputs, p, identity, rows),
        "second_derivative_sum": lambda p: linalg.second_derivative_sum(outputs, p, rows, rows),
    }
    for name, fn in sums.items():
        largest = max(zoo.array_sizes(jax.make_jaxpr(fn)(params)))
        at_most(f"largest array in {name}, in units of n·D", largest / (num_examples * size), 0.25)


@pytest.mark.parametrize(("count", "chunk_size"), [(1, 4), (4, 4), (7, 2), (8, 2)])
def test_sum_terms(count, chunk_size):
    term = lambda i: {"i": i, "ones": jnp.ones(2)}
    total = jax.jit(lambda: linalg.sum_terms(term, count, chunk_size))()
    close(f"{count} in chunks of {chunk_size}", total["i"], count * (count - 1) // 2, 0, scale=1.0)
    close("ones", total["ones"], jnp.full(2, count), 0)
