"""The trials of the doctor: factorisations that may wait for each other, and a known walk."""

import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np

import manifoldflow as mf
from manifoldflow import _precision
from manifoldflow._command._finding import Finding
from manifoldflow._command._machine import num_threads

# Seconds for what takes a hundredth of one, and for the start of Python with compilation.
LIMIT, START = 10.0, 240.0
FACTORISATIONS = """
import os, sys, threading
import jax, jax.numpy as jnp, numpy as np
from manifoldflow import linalg

number, limit = int(sys.argv[1]), float(sys.argv[2])
roots = jnp.asarray(np.random.default_rng(0).normal(size=(16, 60, 50)))
for name, eigh in {"library": linalg.eigh, "jaxlib": jnp.linalg.eigh}.items():
    def several(root):
        return sum(eigh(root @ root.T + k * jnp.eye(60))[0].sum() for k in range(number))
    program = jax.jit(jax.vmap(several)).lower(roots).compile()
    # What waits for ever inside XLA cannot be interrupted, only ended with its process.
    watch = threading.Timer(limit, os._exit, [3])
    watch.start()
    for _ in range(2):
        program(roots).block_until_ready()
    watch.cancel()
    print(name, flush=True)
"""


def factorisations(program: str = FACTORISATIONS, limit: float = LIMIT) -> list[Finding]:
    """Batched factorisations on this machine's CPU: the library's own and jaxlib's.

    They run in a process of their own, which is ended when it takes longer than the limit.
    """
    command = [sys.executable, "-c", program, str(min(8 * num_threads(), 32)), str(limit)]
    # Factorisations hang on CPUs alone, and an accelerator may allow one process only. They hang
    # as often in programs that are not optimised, which compile in a fifth of the time.
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**os.environ, **quick}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=START
        )
    except subprocess.TimeoutExpired:
        text = f"batched factorisations: Python and JAX did not start within {START:.0f} s"
        return [Finding(text, "Try again on a machine with less to do", is_wrong=True)]
    return judged(run.stdout.split(), run.returncode, run.stderr, limit)


def judged(done: list[str], status: int, errors: str, limit: float) -> list[Finding]:
    """The meaning of a process that ended when this much was done."""
    if status not in (0, 3):
        last = (errors.strip().splitlines() or [f"exit status {status}"])[-1]
        text = f"batched factorisations failed: {last}"
        return [Finding(text, "Mend the versions above first", is_wrong=True)]
    more = "Give XLA more threads before jax is imported: `PJRT_NPROC=8`"
    if "library" not in done:
        text = f"the library's batched factorisations did not end within {limit:g} s"
        return [Finding(text, more, is_wrong=True)]
    found = [Finding("the library's batched factorisations end")]
    if "jaxlib" in done:
        return [*found, Finding("jaxlib's batched factorisations end")]
    text = f"jaxlib's own batched factorisations waited for each other for {limit:g} s"
    return [
        *found,
        Finding(text, f"If code of yours hangs under `vmap`: {more[0].lower()}{more[1:]}"),
    ]


def self_test() -> list[Finding]:
    """A walk on uv = 1 against its closed form: (eˢ, e⁻ˢ) with sinh 2s(t) = e⁻ᵗ sinh 2s(0)."""
    loss = mf.LeastSquares(jnp.ones(1), jnp.ones(1), predict=lambda w, x: w[0] * w[1] * x)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0, batch_size=1))
    seconds = []
    try:
        for _ in range(2):
            began = time.perf_counter()
            final = np.asarray(mf.solve(flow, jnp.exp(jnp.array([1.0, -1.0])), end_time=1.0).final)
            seconds.append(time.perf_counter() - began)
    except Exception as error:
        last = str(error).strip().splitlines() or [type(error).__name__]
        text = f"a small `solve` failed: {last[0]}"
        return [Finding(text, "Mend what is wrong above, or report this", is_wrong=True)]
    s = np.arcsinh(np.exp(-1) * np.sinh(2)) / 2
    error = float(np.max(np.abs(final / np.exp([s, -s]) - 1)))
    took = f"first call {seconds[0]:.2g} s, second {1e3 * seconds[1]:.2g} ms"
    text = f"a small `solve` is off by {error:.0e}; {took}"
    if error < (1e-5 if _precision.is_double(final) else 1e-3):
        return [Finding(text)]
    return [Finding(text, "Its result is not right here: please report this", is_wrong=True)]
