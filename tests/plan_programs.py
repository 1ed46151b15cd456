"""What test_plan runs in processes of their own, as the number of devices is set at start.

devices: plans on meshes of 1, 2, 4 and 8 devices beside what is there.
process i port: one of two processes that bring all examples, or their share of them.
"""

import collections
import json
import re
import sys

import equinox as eqx
import jax
import jax.export

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import manifoldflow as mf

NUM_EXAMPLES, WIDTH, ITEM = 64, 48, 8
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def loss_and_model(key):
    model = eqx.nn.MLP(4, "scalar", WIDTH, 2, activation=jnp.tanh, key=key)
    inputs = jr.normal(key, (NUM_EXAMPLES, 4))
    return mf.LeastSquares(inputs, jnp.sin(inputs[:, 0])), model


def flow_of(loss):
    return mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0, batch_size=1))


def on_all(model, mesh):
    """The model, copied to every device."""
    arrays, static = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), static)


def on_the_first(tree):
    """Bytes that are really there on the first device."""
    first = jax.devices()[0]
    arrays = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
    shards = [shard for array in arrays for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def by_shapes():
    """The plan of a loss and a model that were never made."""

    def make(key):
        loss, model = loss_and_model(key)
        return flow_of(loss), model

    return mf.plan(*eqx.filter_eval_shape(make, jr.key(0)))


def for_cuda(loss, model):
    """The drift lowered for NVIDIA GPUs, of which there is none."""
    arrays, static = eqx.partition((loss, model), eqx.is_array)

    def drift(arrays):
        loss, model = eqx.combine(arrays, static)
        return eqx.filter(flow_of(loss).drift(model), eqx.is_array)

    found = jax.export.export(jax.jit(drift), platforms=("cuda",))(arrays)
    module = found.mlir_module()
    return {
        "platforms": found.platforms,
        "devices": found.nr_devices,
        "constraints": len(re.findall(r"sharding_constraint|@Sharding", module)),
    }


def devices():
    loss, model = loss_and_model(jr.key(0))
    report, exported = {}, None
    for count in (1, 2, 4, 8):
        with mf.mesh(examples=count) as mesh:
            spread, whole = mf.shard_examples(loss), on_all(model, mesh)
            plan = mf.plan(flow_of(spread), model)
            program = eqx.filter_jit(lambda flow, point: flow.drift(point))
            compiled = program.lower(flow_of(spread), whole).compile().compiled
            if count == 4:
                assert by_shapes() == plan, "a plan of shapes differs from that of the arrays"
                exported = for_cuda(spread, whole)
        memory = compiled.memory_analysis()
        sent = re.findall(rf" ({KINDS})(?:-start)?\(", compiled.as_text())
        report[count] = {
            "plan": plan.total,
            "compiler": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes,
            "arguments": plan.arguments,
            "there": on_the_first((flow_of(spread), whole)),
            "cut": plan.cut,
            "planned messages": {kind: number for kind, number, _ in plan.messages},
            "messages": collections.Counter(sent),
            "gathered": sum(m.bytes for m in plan.messages if m.kind == "all-gather"),
            "summed": sum(m.bytes for m in plan.messages if m.kind == "all-reduce"),
            "operations": plan.operations,
            "printed": str(plan),
        }
    print(json.dumps({"plans": report, "exported": exported}))


def process(index, port):
    """Made within the mesh, or put together from shares, the examples are cut up all the same."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=30
    )
    inputs = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 4))
    targets, model = inputs[:, 0], jnp.ones((3, 4))
    predict = lambda w, x: jnp.sum(jnp.tanh(w @ x))
    expected = float(mf.LeastSquares(inputs, targets, predict=predict)(model))
    report, mine = {}, slice(index * NUM_EXAMPLES // 2, (index + 1) * NUM_EXAMPLES // 2)
    with mf.mesh() as mesh:
        where = NamedSharding(mesh, PartitionSpec("examples"))
        share = lambda whole: jax.make_array_from_process_local_data(where, whole[mine])
        for name, brought in {"whole": jnp.asarray, "shares": share}.items():
            loss = mf.LeastSquares(brought(inputs), brought(targets), predict=predict)
            loss = mf.shard_examples(loss)
            parts = [
                leaf.addressable_shards[0].data.shape[0] for leaf in (loss.inputs, loss.targets)
            ]
            report[name] = {"parts": parts, "gap": abs(float(loss(model)) - expected)}
        spoilt = np.where(np.arange(NUM_EXAMPLES) == NUM_EXAMPLES - 1, np.nan, targets)
        try:
            mf.LeastSquares(share(inputs), share(spoilt), predict=predict)
        except ValueError as error:
            report["refused"] = str(error)
    jax.distributed.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        devices()
    else:
        process(int(sys.argv[2]), int(sys.argv[3]))
