"""What test_mesh runs in processes of their own, as the number of devices is set at start.

devices: the hot functions of one problem on meshes of 1, 2, 4 and 8 devices.
process i port: one of two processes that share the examples.
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

import manifoldflow as mf
from manifoldflow import linalg

NUM_EXAMPLES = 64
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def problem():
    model = eqx.nn.MLP(4, "scalar", 32, 4, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (NUM_EXAMPLES, 4))
    return mf.LeastSquares(inputs, jnp.sin(inputs[:, 0])), model


def chunked(loss, point):
    """The rows in chunks of three of every four devices, with some left over."""
    coordinates, remainder = loss.split(point)
    fn = lambda x, example: loss.example_residual(eqx.combine(x, remainder), example)
    return linalg.chunked_jacobian(fn, coordinates, loss.data, 27)


def drift(loss, point):
    noise = mf.LabelNoise(std=1.0, batch_size=1)
    return mf.LimitDiffusion(mf.ZeroLossManifold(loss), noise).drift(point)


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
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def run(fn, loss, point):
    program = eqx.filter_jit(lambda *of: eqx.filter(fn(*of), eqx.is_array)).lower(loss, point)
    program = program.compile()
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
    report["control"] = 0, run(FUNCTIONS["in chunks"], spread, model)[1]
    print(json.dumps(report))


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
    jax.distributed.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        devices()
    else:
        process(int(sys.argv[2]), int(sys.argv[3]))
