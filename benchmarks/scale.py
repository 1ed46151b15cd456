"""How large a network and how many examples fit, and is the memory known beforehand?

One exact drift of a tanh MLP with three hidden layers in a fresh process: D = 5·10⁷ and
n = 2,048 on a CPU, D = 10⁸ and n = 10⁴ on an accelerator. `plan` says what it will take; the
memory really used is the growth of the process (CPU) or the device's own count over the
drift. Arguments, the compiler and the interpreter are not in either number.
"""

import pathlib
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import _harness
import manifoldflow as mf

GB = 1e9


def measure(smoke: bool) -> dict[str, Any]:
    """To be called in a fresh process: peaks never go back."""
    on_cpu = jax.default_backend() == "cpu"
    width, num_examples = (5_000, 2_048) if on_cpu else (7_060, 10_000)
    if smoke:
        width, num_examples = 1_000, 64
    flow, model = jax.block_until_ready(_harness.limit_of_mlp(width, 3, num_examples))
    plan = mf.plan(flow, model)
    drift = _harness.Compiled(lambda f, m: f.drift(m), flow, model)

    before = memory("VmRSS", "bytes_in_use")
    began = time.perf_counter()
    result = drift()
    seconds = time.perf_counter() - began
    peak = memory("VmHWM", "peak_bytes_in_use")

    loss = flow.manifold.loss
    unit = _harness.Compiled(lambda l, m: eqx.filter_value_and_grad(l)(m), loss, model)
    estimate = plan.drift + plan.result
    return {
        "D": sum(leaf.size for leaf in jax.tree.leaves(result)),
        "n": num_examples,
        "drift s": seconds,
        "value_and_grad s": unit.seconds(1),
        "compile s": drift.compile_seconds,
        "planned GB": estimate / GB,
        "used GB": (peak - before) / GB,
        "planned/used": estimate / max(peak - before, 1),
        "whole process GB" if on_cpu else "whole device GB": peak / GB,
        "n×D Jacobian GB": plan.dense_jacobian / GB,
        "tangency ‖Jv‖/(‖J‖‖v‖)": tangency(loss, model, result),
    }


@eqx.filter_jit
def _tangency(loss: mf.LeastSquares, model: eqx.nn.MLP, vector: Any) -> jax.Array:
    jacobian = loss.jacobian(model)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(vector)))
    scale = jnp.sqrt(jnp.sum(jacobian.row_norms_squared()))
    return jnp.linalg.norm(jacobian.mv(vector)) / (scale * norm)


def tangency(loss: mf.LeastSquares, model: eqx.nn.MLP, vector: Any) -> float:
    return float(_tangency(loss, model, vector))


def memory(of_process: str, of_device: str) -> int:
    """Bytes now or at the peak, of the device or, on a CPU, of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is not None:
        return statistics[of_device]
    status = pathlib.Path("/", "proc", "self", "status")
    if not status.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(of_process)]
    return 1024 * int(line.split()[1])


def main() -> None:
    arguments = _harness.options(__doc__)
    rows = [_harness.apart("scale", arguments.smoke)]
    _harness.write("scale", __doc__.splitlines()[0], rows, arguments)


if __name__ == "__main__":
    main()
