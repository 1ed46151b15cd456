"""The same numbers by plain JAX, as well as it can be written; not a benchmark itself.

Rows of the Jacobian come from `vmap` of reverse mode and stay apart leaf by leaf: one long
vector of all parameters would cost more than the products with it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


def outputs(model: Any, x: Any) -> jax.Array:
    return jnp.ravel(model(x))


def rows(model: Any, inputs: Any) -> Any:
    """J, as a PyTree of (n·k, *leaf.shape)."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def of_one(x: Any) -> Any:
        one = lambda p: outputs(eqx.combine(p, static), x)
        if jax.eval_shape(one, params).size == 1:
            return jax.tree.map(lambda g: g[None], jax.grad(lambda p: one(p)[0])(params))
        return jax.jacrev(one)(params)

    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:]), jax.vmap(of_one)(inputs))


def rows_in_chunks(model: Any, inputs: Any, chunk: int) -> Any:
    """The same, with the activations of some examples at a time."""
    pieces = jax.lax.map(lambda xs: rows(model, xs), _chunks(inputs, chunk))
    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:]), pieces)


def squared_norm(tree: Any) -> jax.Array:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def trace_gradient(model: Any, inputs: Any, scale: float) -> Any:
    """∇ scale·‖J‖², by reverse mode over all rows."""
    return eqx.filter_grad(lambda m: scale * squared_norm(rows(m, inputs)))(model)


def trace_gradient_in_chunks(model: Any, inputs: Any, scale: float, chunk: int) -> Any:
    """The same in a scan, with the gradient inside: the memory of one chunk of rows."""

    def add(total: Any, xs: Any) -> Any:
        return jax.tree.map(jnp.add, total, trace_gradient(model, xs, scale)), None

    zeros = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    return jax.lax.scan(add, zeros, _chunks(inputs, chunk))[0]


def gram(leaf_rows: Any) -> jax.Array:
    """J Jᵀ."""
    matrices = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(leaf_rows)]
    return sum(matrix @ matrix.T for matrix in matrices)


def mv(leaf_rows: Any, vector: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(leaf_rows), jax.tree.leaves(vector), strict=True)
    return sum(r.reshape(r.shape[0], -1) @ v.reshape(-1) for r, v in pairs)


def transpose_mv(leaf_rows: Any, weights: jax.Array) -> Any:
    return jax.tree.map(lambda r: jnp.tensordot(weights, r, axes=1), leaf_rows)


def projection(leaf_rows: Any, vector: Any, passes: int = 3) -> Any:
    """v − Jᵀ(J Jᵀ)⁻¹J v by Cholesky, repeated for float32's sake, as often as structured."""
    # The transpose keeps LAPACK's layout away from the products, several times slower in it.
    factor = jax.scipy.linalg.cho_factor(gram(leaf_rows).T, lower=True)
    for _ in range(passes):
        weights = jax.scipy.linalg.cho_solve(factor, mv(leaf_rows, vector))
        vector = jax.tree.map(jnp.subtract, vector, transpose_mv(leaf_rows, weights))
    return vector


def drift(model: Any, inputs: Any, scale: float, chunk: int | None = None) -> Any:
    """P∇ scale·‖J‖² with explicit rows: what −4/c times the drift is, up to the sign."""
    if chunk is None:
        gradient, leaf_rows = trace_gradient(model, inputs, scale), rows(model, inputs)
    else:
        gradient = trace_gradient_in_chunks(model, inputs, scale, chunk)
        leaf_rows = rows_in_chunks(model, inputs, chunk)
    return projection(leaf_rows, gradient)


def drift_without_rows(
    model: Any, inputs: Any, scale: float, chunk: int, tolerance: float, max_steps: int = 2000
) -> Any:
    """P∇ scale·‖J‖² with the memory of one chunk: conjugate gradients on jvp and vjp."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    everything = lambda p: jax.vmap(lambda x: outputs(eqx.combine(p, static), x))(inputs).ravel()
    _, forward = jax.linearize(everything, params)
    backward = lambda w: jax.linear_transpose(forward, params)(w)[0]
    vector = trace_gradient_in_chunks(model, inputs, scale, chunk)
    for _ in range(3):
        product = lambda w: forward(backward(w))
        weights, _ = jax.scipy.sparse.linalg.cg(
            product, forward(vector), tol=tolerance, maxiter=max_steps
        )
        vector = jax.tree.map(jnp.subtract, vector, backward(weights))
    return vector


def relative_error(value: Any, expected: Any) -> float:
    """‖value − expected‖/‖expected‖ over PyTrees of real arrays, whatever their precision."""
    import numpy as np

    pairs = list(zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True))
    pairs = [(np.asarray(v, np.float64), np.asarray(e, np.float64)) for v, e in pairs]
    distance = sum(float(np.sum((v - e) ** 2)) for v, e in pairs)
    return (distance / sum(float(np.sum(e**2)) for _, e in pairs)) ** 0.5


def _chunks(inputs: Any, chunk: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs)
