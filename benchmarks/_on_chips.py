"""One drift compiled ahead of time for TPU chips that are not there; not a benchmark itself.

Run as a process of its own, with a problem as JSON: the environment is read when JAX is imported.
Nothing is allocated: loss and model are shapes.
"""

import json
import os
import sys
import time
from typing import Any

# Checks of values give NaN, since they would call back to Python; and libtpu would ask the
# network which machine this is.
os.environ |= {
    "EQX_ON_ERROR": "nan",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so others may compile meanwhile
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import manifoldflow as mf
from manifoldflow import linalg

GB = 1e9
# XLA's search for the fastest products in full precision takes most of the time to compile. At this
# effort it takes a third, for products that are 0.5 % slower by its own estimate.
EFFORT = -0.5
jax.config.update("jax_exec_time_optimization_effort", EFFORT)


def problem(width: int, num_examples: int, gram: str) -> Any:
    """The shapes of the label-noise limit of a tanh MLP from R³² with three hidden layers."""

    def make(key: Any) -> Any:
        model = eqx.nn.MLP(32, "scalar", width, 3, activation=jnp.tanh, key=key)
        inputs = jr.normal(key, (num_examples, 32))
        loss = mf.LeastSquares(inputs, jr.normal(key, (num_examples,)))
        manifold = mf.ZeroLossManifold(loss, gram=eval(f"linalg.{gram}"))
        return mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1)), model

    return eqx.filter_eval_shape(make, jr.key(0))


def mesh(topology: str, examples: int, parameters: int) -> Mesh:
    """With one axis if no parameters are shared; the first chips of the topology."""
    devices = topologies.get_topology_desc(topology, "tpu").devices[: examples * parameters]
    shape = (examples, parameters) if parameters > 1 else (examples,)
    names = ("examples", "parameters")[: len(shape)]
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(shape))


def planned(row: dict[str, Any], memory: int) -> dict[str, Any]:
    """The row with what `plan` says of it."""
    flow, model = problem(row["width"], row["n"], row["gram"])
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(model) if hasattr(leaf, "size"))
    here = mesh(row["topology"], row["examples"], row["parameters"])
    if row["parameters"] > 1:
        with jax.set_mesh(here):
            model = mf.shard_parameters(model)
    began, busy = time.perf_counter(), time.process_time()
    with jax.set_mesh(here), linalg.device_memory(memory):
        plan = mf.plan(flow, model)
    return row | {
        "D": num_parameters,
        "compile s": time.perf_counter() - began,
        "compile CPU s": time.process_time() - busy,
        "GB a chip": plan.total / GB,
        "temporary GB": plan.drift / GB,
        "replicated GB": plan.replicated / GB,
        "program GB": plan.program / GB,
        "chunk": plan.chunk_size or row["n"],
        "operations": plan.operations,
        "traffic": plan.traffic,
        "messages": {kind: [count, size] for kind, count, size in plan.messages},
        "printed": str(plan),
    }


if __name__ == "__main__":
    print(json.dumps(planned(*json.loads(sys.argv[1]))))
