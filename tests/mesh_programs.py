"""What test_mesh runs in processes of their own, as the number of devices is set at start.

devices: the hot functions of one problem on meshes of 1, 2, 4 and 8 devices.
tiles: Gram matrices in tiles, as those of many examples are made.
elsewhere: a loss of one mesh under another.
parameters: the same where parameters are spread as well, of a problem that is wide enough.
process i port: one of two processes that share the examples, and then the parameters too.
"""

import collections
import json
import re
import sys

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

import manifoldflow as mf
from manifoldflow import linalg
from manifoldflow._mesh import _cuts
from manifoldflow.linalg.jacobian import _layers, _tiles

NUM_EXAMPLES = 64
WIDE = 160  # for leaves and factors of more than 64 kB
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def problem(width=32):
    model = eqx.nn.MLP(4, "scalar", width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (NUM_EXAMPLES, 4))
    # Near what the model gives, so that gradient flow lands within a few steps.
    targets = jax.jit(jax.vmap(model))(inputs) + 0.01 * np.sin(inputs[:, 0])
    return mf.LeastSquares(inputs, targets), model


def chunked(loss, point):
    """The rows in chunks of three of every four devices, with some left over."""
    coordinates, remainder = loss.split(point)
    fn = lambda x, example: loss.example_residual(eqx.combine(x, remainder), example)
    return linalg.chunked_jacobian(fn, coordinates, loss.data, 27)


def drift(loss, point):
    noise = mf.LabelNoise(std=1.0, batch_size=1)
    return mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise).drift(point)


def in_rows(loss, _):
    """A model so small that its rows are explicit."""
    model = eqx.nn.MLP(4, "scalar", 8, 2, activation=jnp.tanh, key=jr.key(0))
    jacobian = loss.jacobian(model)
    assert isinstance(jacobian, linalg.DenseJacobian)
    return jacobian.distributed_gram(), jacobian.mv(loss.split(model)[0]), drift(loss, model)


FUNCTIONS = {
    "drift": drift,
    "project": lambda loss, p: mf.ZeroLossManifold(loss).project(p, throw=False),
    "limit_map": lambda loss, p: mf.limit_map(loss, p, throw=False),
    "stochastic walk": lambda loss, p: mf.walks.StochasticWalk(
        1.0, relative_step=0.01
    ).gradient_and_trace(loss, p, jr.key(3)),
    "in chunks": lambda loss, p: (
        chunked(loss, p).gram(),
        chunked(loss, p).mv(loss.split(p)[0]),
        chunked(loss, p).transpose_mv(jnp.arange(float(NUM_EXAMPLES))),
    ),
}


def collectives(text):
    return collections.Counter(re.findall(rf" ({KINDS})(?:-start)?\(", text))


def relative_gap(found, expected):
    # By NumPy: each operation on arrays of several devices would be a program of its own.
    found, expected = (map(np.asarray, jax.tree.leaves(tree)) for tree in (found, expected))
    pairs = zip(found, expected, strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def relative_gap_here(found, expected):
    """Of the parts that this process holds."""
    expected = np.asarray(expected)
    parts = [(np.asarray(part.data), expected[part.index]) for part in found.addressable_shards]
    return float(max(np.max(np.abs(a - b)) for a, b in parts) / np.max(np.abs(expected)))


def compiled(fn, loss, point):
    program = eqx.filter_jit(lambda *of: eqx.filter(fn(*of), eqx.is_array)).lower(loss, point)
    return program.compile()


def run(fn, loss, point):
    program = compiled(fn, loss, point)
    return program(loss, point), collectives(program.compiled.as_text())


def devices():
    """Drift on all sizes of mesh, the others on one; the control is XLA by itself."""
    loss, model = problem()
    report = {}
    for name, fn in FUNCTIONS.items():
        expected, _ = run(fn, loss, model)
        for count in (1, 2, 4, 8) if name == "drift" else (4,):
            with mf.mesh(examples=count):
                found, sent = run(fn, mf.shard_examples(loss), model)
            report[f"{name}, {count} devices"] = relative_gap(found, expected), sent
    spread = mf.shard_examples(loss, jax.make_mesh((8,), ("examples",)))
    control = compiled(FUNCTIONS["in chunks"], spread, model).compiled.as_text()
    report["control"] = 0, collectives(control)
    print(json.dumps(report))


def tiles():
    """In one message and layer by layer; with what one device makes, and a derivative."""
    _tiles._SMALLEST = _layers._LARGE = 1
    loss, model = problem()
    triangle = lambda loss, p: jnp.triu(loss.jacobian(p).gram_triangle())
    squares = lambda p, loss: jnp.sum(triangle(loss, p) ** 2)
    slope = lambda p, loss: ravel_pytree(eqx.filter_grad(squares)(p, loss))[0]
    both = lambda loss, p: (triangle(loss, p), slope(p, loss), drift(loss, p))
    expected, _ = run(both, loss, model)
    report = {}
    for count, most in ((2, _cuts._ONE_MESSAGE), (8, _cuts._ONE_MESSAGE), (4, 0)):
        _cuts._ONE_MESSAGE = most
        with mf.mesh(examples=count):
            spread = mf.shard_examples(loss)
            found, _ = run(both, spread, model)
            text = compiled(triangle, spread, model).compiled.as_text()
            product = lambda a, b: a @ b.T
            own = jax.jit(lambda x: _tiles.tiles(product, x))(loss.data[0]).addressable_shards[0]
        rows = text.count(f"f64[{NUM_EXAMPLES // count},{NUM_EXAMPLES}]")
        gap = relative_gap(found, expected)
        report[f"{count} devices"] = gap, collectives(text), own.data.shape, rows
    print(json.dumps(report))


PARTS = {
    "drift": [(2, 1), (4, 2), (1, 4)],
    "limit_map": [(2, 2)],
    "in chunks": [(4, 2)],
    "in rows": [(4, 2)],
    "gram": [(4, 2)],
}


def parameters():
    """With the largest part of any leaf that one device has, of what a leaf has in all."""
    loss, model = problem(WIDE)
    every = FUNCTIONS | {
        "in rows": in_rows,
        "in chunks": lambda loss, p: (
            *FUNCTIONS["in chunks"](loss, p),
            chunked(loss, p).distributed_gram(),
        ),
        "gram": lambda loss, p: loss.jacobian(p).distributed_gram(),
    }
    report = {}
    assert list(PARTS)[-1] == "gram", "which is compared once more below"
    for name, meshes in PARTS.items():
        expected, _ = run(every[name], loss, model)
        for shape in meshes:
            with mf.mesh(examples=shape[0], parameters=shape[1]):
                spread = mf.shard_examples(loss), mf.shard_parameters(model)
                found, sent = run(every[name], *spread)
            report[f"{name} on {shape}"] = relative_gap(found, expected), sent, largest_part(found)
    _cuts._ONE_MESSAGE = 0  # as if the factors were large
    with mf.mesh(examples=4, parameters=2):
        found, sent = run(every[name], mf.shard_examples(loss), mf.shard_parameters(model))
    report["gram, layer by layer"] = relative_gap(found, expected), sent, largest_part(found)
    print(json.dumps(report))


def elsewhere():
    """What is said of a loss that was spread on one mesh and is used under another."""
    loss, point = mf.LeastSquares(jnp.eye(4), jnp.ones(4), predict=jnp.dot), jnp.ones(4)
    with mf.mesh(examples=2):
        loss = mf.shard_examples(loss)
    report = {}
    with mf.mesh(examples=4):
        for name in ("drift", "project", "limit_map"):
            try:
                report[name] = f"nothing: {FUNCTIONS[name](loss, point)}"
            except ValueError as error:
                report[name] = str(error)
    print(json.dumps(report))


def largest_part(tree):
    """The largest share of a leaf that one device holds; small leaves do not count."""
    large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= NUM_EXAMPLES**2]
    parts = [leaf.addressable_shards[0].data.size / leaf.size for leaf in large]
    return max(parts)


def process(index, port):
    """Each process brings all examples; every device keeps its share of them."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=30
    )
    loss, model = problem()
    expected, _ = run(FUNCTIONS["drift"], loss, model)
    with mf.mesh():
        spread = mf.shard_examples(loss)
        found, _ = run(FUNCTIONS["drift"], spread, model)
        num_devices = len(spread.targets.sharding.device_set)
    report = {"devices": num_devices, "gap": relative_gap(found, expected)}
    loss, model = problem(WIDE)
    expected, _ = run(FUNCTIONS["drift"], loss, model)
    with mf.mesh(examples=2, parameters=2):
        spread = mf.shard_examples(loss), mf.shard_parameters(model)
        found, _ = run(FUNCTIONS["drift"], *spread)
    report["part"] = largest_part(found)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    report["gap with parameters"] = max(relative_gap_here(*pair) for pair in pairs)
    jax.distributed.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] in ("devices", "tiles", "parameters", "elsewhere"):
        globals()[sys.argv[1]]()
    else:
        process(int(sys.argv[2]), int(sys.argv[3]))
