"""What test_distributed_gram runs with eight devices, in a process of its own."""

import json
import re

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from manifoldflow import linalg
from manifoldflow.linalg import _distributed
from mesh_programs import collectives, relative_gap


def problem():
    """A layer of tanh: 80 weights, 16 examples."""
    weights = {"in": jr.normal(jr.key(0), (16, 4)), "out": jr.normal(jr.key(1), (16,))}
    predict = lambda w, x: w["out"] @ jnp.tanh(w["in"] @ x)
    inputs = jr.normal(jr.key(2), (16, 4))
    return mf.LeastSquares(inputs, jnp.sin(inputs[:, 0]), predict=predict), weights


def projected(gram):
    """A projection and the derivative of its length, which differentiates all that is solved."""

    def fn(loss, weights):
        manifold = mf.ZeroLossManifold(loss, gram=gram)
        vector = jax.tree.map(jnp.cos, weights)

        def energy(weights):
            tangent = manifold.tangent_projection(weights, vector)
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(tangent)), tangent

        return jax.grad(energy, has_aux=True)(weights)

    return fn


def streamed(loss, weights):
    projector = linalg.tangent_projector(loss, weights, batch_size=8)
    tangent, certificate = projector.project(jax.tree.map(jnp.cos, weights))
    return tangent, jnp.where(certificate < 1e-14, 1.0, 0.0)


FUNCTIONS = {
    "distributed": projected(linalg.DenseGram(is_distributed=True)),
    "sketched": projected(linalg.IterativeGram(rtol=1e-12, preconditioner_rank=6)),
    "projector": streamed,
}


COUNTS = {"distributed": (2, 8), "sketched": (8,), "projector": (1, 8)}


def compiled(fn, *arguments):
    program = jax.jit(fn).lower(*arguments).compile()
    return program(*arguments), program.as_text()


def devices():
    """Relative differences from one device without a mesh, and the messages."""
    loss, weights = problem()
    report = {}
    for name, fn in FUNCTIONS.items():
        alone = projected(linalg.DenseGram()) if name == "distributed" else fn
        expected, _ = compiled(lambda w: alone(loss, w), weights)
        for count in COUNTS[name]:
            with mf.mesh(examples=count):
                shared = mf.shard_examples(loss)
                found, text = compiled(lambda w: fn(shared, w), weights)
            report[f"{name}, {count} devices"] = relative_gap(found, expected), collectives(text)
    return report


def solution(matrix, right):
    size = len(matrix)
    factor = _distributed.distributed_cholesky(
        matrix, jnp.full(size, 0.5, matrix.dtype), jnp.ones(size, matrix.dtype), block=4
    )
    return factor.solve(right), factor.has_failed


def matrix_of(size):
    """By NumPy: in JAX each size would be several more programs."""
    draw = np.random.default_rng(size).normal
    rows = draw(size=(size, size + 8))
    return rows @ rows.T, draw(size=size)


def factorisations():
    report = {}
    for size, count in (64, 1), (64, 2), (88, 4), (104, 8), (8, 8):
        matrix, right = matrix_of(size)
        expected = np.linalg.solve(matrix / 4 + np.eye(size), right)
        with mf.mesh(examples=count) if count != 4 else jax.set_mesh(two_axes()):
            found, has_failed = jax.jit(solution)(matrix, right)
            of_none, is_nan = jax.jit(solution)(-100 * matrix, right)
        assert not has_failed and is_nan and np.all(np.isnan(of_none)), (size, count)
        report[f"{size} on {count}"] = relative_gap(found, expected)
    return report


def two_axes():
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((2, 2), ("examples", "parameters"), axis_types=(auto, auto))


def program(size):
    """Instructions and messages for a matrix whose rows are cut, and its largest array."""
    spread = jax.sharding.NamedSharding(
        jax.sharding.get_mesh(), jax.sharding.PartitionSpec("examples")
    )
    matrix, right = matrix_of(size)
    text = jax.jit(solution).lower(jax.device_put(matrix, spread), right).compile().as_text()
    shapes = re.findall(r"f64\[([\d,]+)\]", text)
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
    return len(text.splitlines()), collectives(text), largest / size**2


def main():
    with mf.mesh(examples=8):
        programs = [program(size) for size in (256, 512)]
    print(
        json.dumps({"factorisations": factorisations(), "devices": devices(), "programs": programs})
    )


if __name__ == "__main__":
    main()
