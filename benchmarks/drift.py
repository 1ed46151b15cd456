"""How much cheaper is the exact drift of the label-noise limit than by plain JAX?

Costs are ratios to one full-batch value_and_grad of the loss, measured next to each other
in one run: ∇tr(JᵀJ), the Gram matrix J Jᵀ, a tangent projection, and the whole drift
−(c/4) P∇tr∇²L, structured (manifoldflow) and by the n×D Jacobian (vmap of grad).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import _harness
import manifoldflow as mf


def problem(width: int, num_examples: int) -> tuple:
    model = eqx.nn.MLP(32, 1, width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 32))
    loss = mf.LeastSquares(inputs, jr.normal(jr.key(2), (num_examples, 1)))
    return loss, model


def dense_rows(loss: mf.LeastSquares, model: eqx.nn.MLP) -> jax.Array:
    """The n×D Jacobian, as anyone would write it."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def output(vector: jax.Array, x: jax.Array) -> jax.Array:
        return eqx.combine(unravel(vector), static)(x)[0]

    return jax.vmap(jax.grad(output), (None, 0))(flat, loss.inputs)


def dense_gradient(loss: mf.LeastSquares, model: eqx.nn.MLP) -> eqx.nn.MLP:
    return eqx.filter_grad(lambda m: loss.scale * jnp.sum(dense_rows(loss, m) ** 2))(model)


def dense_projection(loss: mf.LeastSquares, model: eqx.nn.MLP, vector: eqx.nn.MLP) -> jax.Array:
    rows = dense_rows(loss, model)
    flat, _ = jax.flatten_util.ravel_pytree(eqx.filter(vector, eqx.is_inexact_array))
    factor = jax.scipy.linalg.cho_factor((rows @ rows.T).T, lower=True)
    for _ in range(2):
        flat = flat - rows.T @ jax.scipy.linalg.cho_solve(factor, rows @ flat)
    return flat


def tangency(loss: mf.LeastSquares, model: eqx.nn.MLP, vector: eqx.nn.MLP) -> float:
    jacobian = loss.jacobian(model)
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(vector)))
    scale = jnp.sqrt(jnp.sum(jacobian.row_norms_squared()))
    return float(jnp.linalg.norm(jacobian.mv(vector)) / (scale * norm))


def measure(width: int, num_examples: int, repeats: int) -> list[dict]:
    loss, model = problem(width, num_examples)
    manifold = mf.ZeroLossManifold(loss)
    flow = mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1))
    size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    vector = loss.gradient(model)
    unit = _harness.Compiled(lambda l, m: eqx.filter_value_and_grad(l)(m), loss, model)
    rows = []
    for name, structured, dense in (
        (
            "∇tr(JᵀJ)",
            (lambda l, m: eqx.filter_grad(l.trace_gauss_newton)(m), loss, model),
            (dense_gradient, loss, model),
        ),
        (
            "Gram matrix",
            (lambda l, m: l.jacobian(m).gram(), loss, model),
            (lambda l, m: (lambda j: j @ j.T)(dense_rows(l, m)), loss, model),
        ),
        (
            "projection",
            (lambda m, p, v: m.tangent_projection(p, v), manifold, model, vector),
            (dense_projection, loss, model, vector),
        ),
        (
            "whole drift",
            (lambda f, m: f.drift(m), flow, model),
            (lambda l, m: dense_projection(l, m, dense_gradient(l, m)), loss, model),
        ),
    ):
        row = {"D": size, "n": num_examples, "what": name}
        for kind, (fn, *arguments) in (("structured", structured), ("dense", dense)):
            compiled = _harness.Compiled(fn, *arguments)
            unit_seconds = unit.seconds(repeats)
            row[f"{kind} (units)"] = compiled.seconds(repeats) / unit_seconds
            row[f"{kind} MB"] = compiled.temporary_mb
            row[f"{kind} compile s"] = compiled.compile_seconds
        rows.append(row)
        print(_harness.table([row]), flush=True)
    error = tangency(loss, model, flow.drift(model))
    print(f"float32 tangency ‖JPv‖/(‖J‖‖Pv‖) = {error:.1e}")
    return rows


def main() -> None:
    arguments = _harness.options(__doc__)
    sizes = [(24, 16)] if arguments.smoke else [(432, 64), (432, 1024)]
    rows = [row for size in sizes for row in measure(*size, arguments.repeats)]
    question = __doc__.splitlines()[0]
    _harness.write("drift", question, rows, arguments)


if __name__ == "__main__":
    main()
