"""Timing, memory, tables and JSON for the benchmarks; not a benchmark itself."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import manifoldflow as mf

HERE = pathlib.Path(__file__).parent


def limit_of_mlp(width: int, depth: int, num_examples: int) -> tuple[mf.LimitDiffusion, Any]:
    """The label-noise limit of a tanh MLP from R³² on random data, and where it starts."""
    model = eqx.nn.MLP(32, "scalar", width, depth, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 32))
    loss = mf.LeastSquares(inputs, jr.normal(jr.key(2), (num_examples,)))
    manifold = mf.ZeroLossManifold(loss)
    return mf.LimitDiffusion(manifold, mf.LabelNoise(std=1.0, batch_size=1)), model


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls; the minimum counts")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="for JSON")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.repeats = 1
    return arguments


class Compiled:
    """A function compiled for its arguments, with what the compiler says of it."""

    def __init__(self, fn: Callable[..., Any], *arguments: Any):
        began = time.perf_counter()
        self._call = eqx.filter_jit(fn).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began
        self._arguments = arguments
        analysis = self._call.compiled.memory_analysis()
        self.temporary_mb = analysis.temp_size_in_bytes / 2**20

    def __call__(self, *arguments: Any) -> Any:
        """The result, for the arguments it was compiled for or others like them."""
        result = self._call(*(arguments or self._arguments))
        return jax.block_until_ready(eqx.filter(result, eqx.is_array))

    def seconds(self, repeats: int) -> float:
        return fastest(self, repeats)


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls, repeated where the clock is too coarse for one."""
    call()
    best, calls = float("inf"), 1
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - began) / calls)
        calls = max(1, min(1000, int(0.02 / best)))
    return best


def apart(module: str, smoke: bool) -> dict[str, Any]:
    """What `measure(smoke)` of a script of this folder gives in a fresh process.

    Peaks of memory never go back, and nothing may touch the device before another process has
    given it back.
    """
    call = f"import json, {module}; print(json.dumps({module}.measure({smoke})))"
    done = subprocess.run([sys.executable, "-c", call], cwd=HERE, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the measuring process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def kept(name: str, measure: Callable[[], Any]) -> Any:
    """The numbers of one stage of a long benchmark, from the folder KEPT if they are there."""
    if "KEPT" not in os.environ:
        return measure()
    path = pathlib.Path(os.environ["KEPT"], f"{name}.json")
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one kind as a Markdown table."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(c[i]) for c in cells)) for i, name in enumerate(names)]
    lines = [names, ["-" * w for w in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths)) + " |" for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(
    name: str,
    question: str,
    rows: list[dict[str, Any]],
    arguments: Any,
    *,
    target: str | None = None,
    note: str | None = None,
) -> None:
    """Print the table; write it with machine, versions and commit as JSON.

    `target` is for the name of the file where the numbers are not of this machine's devices.
    """
    print(f"\n{question}\n\n{table(rows)}\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    record = {
        "question": question,
        "smoke": arguments.smoke,
        **({} if note is None else {"note": note}),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": device.device_kind,
            "platform": device.platform,
            "num_devices": jax.device_count(),
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        **_commit(),
        "rows": rows,
    }
    suffix = ".smoke.json" if arguments.smoke else ".json"
    path = arguments.out / f"{name}-{target or device.platform}{suffix}"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path.name}")


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip()

    # Results of other benchmarks do not change what is measured.
    changed = git("status", "--porcelain", "--", ":/", ":(exclude)results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
