"""What do the compilers of accelerators make of the hot functions, beside `value_and_grad`?

Compiled ahead of time for TPUs that are not there (`pip install "jax[tpu]"`; no TPU is needed),
one chip and four with a share of the examples each: the time to compile, the HLO instructions
before optimisation, also in units of `value_and_grad`, the machine code, the temporary memory,
the operations of one pass (a loop counts once) and what chips tell each other. Checks of values
give NaN, since they would call back to Python. With `--smoke`, or without libtpu, some of the
functions are lowered for TPUs and NVIDIA GPUs and not compiled.
"""

import collections
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ |= {"EQX_ON_ERROR": "nan", "JAX_PLATFORMS": "cpu"}
# Else libtpu asks the network which machine this is.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import _harness
import manifoldflow as mf

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
MB = 2**20
NOISE = mf.LabelNoise(std=1.0, batch_size=1)

Program = Callable[[mf.LeastSquares, mf.ZeroLossManifold, Any], Any]


def flow(manifold: mf.ZeroLossManifold) -> mf.LimitDiffusion:
    return mf.LimitDiffusion(manifold, NOISE)


def programs() -> dict[str, Program]:
    """Of loss, manifold and model; a tangent is a projected gradient of the weights' norm."""
    key = jr.key(0)
    tangent = lambda m, p: m.tangent_projection(p, eqx.filter(p, eqx.is_array))
    flatness = lambda l: l.trace_gauss_newton
    simulate = lambda l, p: mf.simulate(
        l, NOISE, optax.sgd, p, learning_rate=0.1, num_steps=100, key=key, throw=False
    )
    return {
        "value_and_grad": lambda l, m, p: eqx.filter_value_and_grad(l)(p),
        "drift": lambda l, m, p: flow(m).drift(p),
        "project": lambda l, m, p: m.project(p, throw=False),
        "limit_map": lambda l, m, p: mf.limit_map(l, p, throw=False),
        "solve": lambda l, m, p: mf.solve(flow(m), p, end_time=1.0, throw=False).points,
        "simulate": lambda l, m, p: simulate(l, p).points,
        "geodesic": lambda l, m, p: mf.geodesic(m, p, tangent(m, p), jnp.array([1.0])),
        "logarithm_map": lambda l, m, p: mf.logarithm_map(
            m, p, m.retract(p, tangent(m, p), throw=False), throw=False
        ),
        "minimize": lambda l, m, p: mf.minimize(m, flatness(l), p, throw=False).points,
        "mean_curvature": lambda l, m, p: mf.mean_curvature(m, p),
    }


def arguments_of(width: int, num_examples: int) -> tuple[Any, Any]:
    """Model, inputs and targets: their arrays, and the rest."""
    model = eqx.nn.MLP(4, "scalar", width, 1, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 4))
    return eqx.partition((model, inputs, jr.normal(jr.key(2), (num_examples,))), eqx.is_array)


def of_arrays(program: Program, static: Any) -> Callable[[Any], Any]:
    """The program as a function of arrays alone."""

    def fn(arrays: Any) -> Any:
        model, inputs, targets = eqx.combine(arrays, static)
        loss = mf.LeastSquares(inputs, targets)
        return eqx.filter(program(loss, mf.ZeroLossManifold(loss), model), eqx.is_array)

    return fn


def on_chips(arrays: Any, devices: Any) -> Any:
    """Shapes of the arguments: the model on every chip, the examples cut up."""
    mesh = Mesh(np.array(devices), ("examples",))
    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("examples",)))
    place = lambda sharding: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    model, *data = arrays
    return jax.tree.map(place(whole), model), *jax.tree.map(place(cut), data)


def num_instructions(hlo: str) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?\S+ = ", hlo, flags=re.MULTILINE))


def collectives(text: str) -> str:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" ({kinds})(?:-start)?\(", text)
    return ", ".join(f"{n} {kind}" for kind, n in sorted(collections.Counter(found).items()))


def compiled(fn: Callable[[Any], Any], arguments: Any) -> dict[str, Any]:
    """What the compiler says of a program for the devices of its arguments."""
    lowered = jax.jit(fn).lower(arguments)
    began = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - began
    memory, costs = program.memory_analysis(), program.cost_analysis()
    return {
        "instructions": num_instructions(lowered.compiler_ir("hlo").as_hlo_text()),
        "compile s": seconds,
        "code MB": memory.generated_code_size_in_bytes / MB,
        "temporary MB": memory.temp_size_in_bytes / MB,
        "arguments MB": memory.argument_size_in_bytes / MB,
        "Mflop": costs["flops"] / 1e6,
        "collectives": collectives(program.as_text()) or "none",
    }


def for_tpus() -> Iterator[dict[str, Any]]:
    arrays, static = arguments_of(16, 16)
    for chip, topology in CHIPS.items():
        devices = topologies.get_topology_desc(topology, "tpu").devices
        for num_chips in (1, len(devices)):
            arguments = on_chips(arrays, devices[:num_chips])
            for name, program in programs().items():
                row = {"chip": chip, "chips": num_chips, "function": name}
                yield row | compiled(of_arrays(program, static), arguments)


def lowered() -> Iterator[dict[str, Any]]:
    """Without a compiler: the operations of the module for each kind of device."""
    arrays, static = arguments_of(4, 4)
    for chip in ("tpu", "cuda"):
        for name in ("value_and_grad", "drift", "project"):
            fn = jax.jit(of_arrays(programs()[name], static))
            began = time.perf_counter()
            module = jax.export.export(fn, platforms=(chip,))(arrays).mlir_module()
            row = {"chip": chip, "chips": 1, "function": name}
            num_operations = len(re.findall(r"^\s+%\S+ = ", module, flags=re.MULTILINE))
            yield row | {"instructions": num_operations, "lower s": time.perf_counter() - began}


def in_units(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside the `value_and_grad` for the same chips, which comes first.

    All take the better part of an hour: an interrupt keeps what there is.
    """
    found, unit = [], 1
    try:
        for row in rows:
            print(*row.values(), flush=True)
            unit = row["instructions"] if row["function"] == "value_and_grad" else unit
            found.append(row | {"÷ value_and_grad": row["instructions"] / unit})
    except KeyboardInterrupt:
        print(f"interrupted after {len(found)} programs")
    return found


def main() -> None:
    arguments = _harness.options(__doc__)
    has_compiler = importlib.util.find_spec("libtpu") is not None and not arguments.smoke
    _harness.write(
        "accelerators",
        __doc__.splitlines()[0],
        in_units(for_tpus() if has_compiler else lowered()),
        arguments,
        target="tpu-aot" if has_compiler else "lowered",
        note="compiled ahead of time on a machine without accelerators; other work ran beside it"
        if has_compiler
        else "lowered on a machine without accelerators, not compiled",
    )


if __name__ == "__main__":
    main()
