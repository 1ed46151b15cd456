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

KINDS = {"dense": linalg.jacobian, "structured": linalg.structured_jacobian}
NUM_TERMS = 5


class Problem:
    """A tanh network with 8 outputs over its data, and its Hessians (8, D, D)."""

    def __init__(self):
        self.inputs, _ = zoo.data()
        self.params = zoo.network_point(jr.key(5))
        self.flat, self.unravel = ravel_pytree(self.params)
        self.hessians = np.asarray(jax.hessian(lambda x: self.outputs(self.unravel(x)))(self.flat))
        self.rows = np.asarray(jax.jacobian(lambda x: self.outputs(self.unravel(x)))(self.flat))

    def outputs(self, params):
        return jax.vmap(lambda x: zoo.network(params, x))(self.inputs).reshape(-1)

    def jacobian_fn(self, kind):
        return lambda params: KINDS[kind](zoo.network, params, self.inputs)

    def operator_to_tangents(self, matrix):
        """The operator with these columns (D, r), through the network's own PyTree."""
        leaves = jax.vmap(self.unravel, in_axes=1, out_axes=-1)(jnp.asarray(matrix))
        return lx.PyTreeLinearOperator(leaves, jax.eval_shape(lambda: self.params))


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.parametrize("kind", KINDS)
def test_contract_hessians(problem, kind):
    coefficients = jr.normal(jr.key(1), (8, 8))
    found = linalg.contract_hessians(problem.jacobian_fn(kind), problem.params, coefficients)
    tangents = np.asarray(coefficients).T @ problem.rows
    expected = np.einsum("iab,ib->a", problem.hessians, tangents)
    close("Σ ∇²fᵢ(JᵀC)ᵢ", found, expected, 1e-10)
    transposed = linalg.contract_hessians(problem.jacobian_fn(kind), problem.params, coefficients.T)
    at_least("C and Cᵀ differ", np.linalg.norm(ravel_pytree(transposed)[0] - expected), 1e-2)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian_product_sum(problem, chunk_size):
    b, v = jr.normal(jr.key(2), (8, NUM_TERMS)), jr.normal(jr.key(3), (36, NUM_TERMS))
    found = linalg.hessian_product_sum(
        problem.outputs,
        problem.params,
        lx.MatrixLinearOperator(b),
        problem.operator_to_tangents(v),
        chunk_size=chunk_size,
    )
    expected = np.einsum("iab,ir,br->a", problem.hessians, b, v)
    close(f"Σ ∇²(bᵣ·f)vᵣ, chunks of {chunk_size}", found, expected, 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_derivative_sum(problem, chunk_size):
    u, v = jr.normal(jr.key(4), (2, problem.flat.size, NUM_TERMS))
    left, right = problem.operator_to_tangents(u), problem.operator_to_tangents(v)
    for partner, matrix in ((right, v), (left, u)):
        found = linalg.second_derivative_sum(
            problem.outputs, problem.params, left, partner, chunk_size=chunk_size
        )
        expected = np.einsum("iab,ar,br->i", problem.hessians, u, matrix)
        close(f"Σ D²f[uᵣ, vᵣ], chunks of {chunk_size}", found, expected, 1e-10)


def test_columns(problem):
    matrix = jr.normal(jr.key(6), (8, problem.flat.size))
    flatten = lx.FunctionLinearOperator(
        lambda v: ravel_pytree(v)[0], jax.eval_shape(lambda: problem.params)
    )
    left = lx.MatrixLinearOperator(matrix) @ flatten
    close("of a composition", linalg.columns(left), matrix, 1e-14)
    close("in chunks", linalg.columns(left, chunk_size=7), matrix, 1e-14)


def test_derivatives_of_the_sums(problem):
    """Reverse mode over each sum, by differences: the coefficients are constants."""
    coefficients = jr.normal(jr.key(7), (8, 8))
    b, v = jr.normal(jr.key(8), (8, 3)), jr.normal(jr.key(9), (problem.flat.size, 3))
    operators = lx.MatrixLinearOperator(b), problem.operator_to_tangents(v)
    sums = {
        "contract": lambda p: linalg.contract_hessians(
            problem.jacobian_fn("dense"), p, coefficients
        ),
        "products": lambda p: linalg.hessian_product_sum(
            problem.outputs, p, *operators, chunk_size=1
        ),
    }
    direction = jr.normal(jr.key(10), problem.flat.shape)
    for name, fn in sums.items():
        height = jax.jit(lambda x, fn=fn: jnp.sum(jnp.sin(ravel_pytree(fn(problem.unravel(x)))[0])))
        step = 1e-5
        finite = height(problem.flat + step * direction) - height(problem.flat - step * direction)
        close(name, jax.grad(height)(problem.flat) @ direction, finite / (2 * step), 1e-7)


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
    model = eqx.nn.MLP(20, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    inputs = jr.normal(jr.key(1), (num_examples, 20))
    size = ravel_pytree(params)[0].size
    at_least("n·D is what to avoid", num_examples * size, 2**20)

    def outputs(p):
        return jax.vmap(eqx.combine(p, static))(inputs)[:, 0]

    def jacobian_fn(p):
        return linalg.jacobian(lambda p, x: eqx.combine(p, static)(x), p, inputs)

    assert isinstance(jacobian_fn(params), linalg.StructuredJacobian)
    rows = jacobian_fn(params).T
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
    total = linalg.sum_terms(lambda i: {"i": i, "ones": jnp.ones(2)}, count, chunk_size)
    close(f"{count} in chunks of {chunk_size}", total["i"], count * (count - 1) // 2, 0, scale=1.0)
    close("ones", total["ones"], jnp.full(2, count), 0)
