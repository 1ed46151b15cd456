"""The machine as JAX sees it: devices, precision, threads, and where compiled programs go."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow import _precision
from manifoldflow._command._finding import Finding

SETTINGS = "JAX_", "XLA_", "PJRT_", "OPENBLAS_", "OMP_", "MKL_", "CUDA_VISIBLE_", "TPU_VISIBLE_"
FEW_CORES = 4


def setting(name: str) -> Any:
    """Of JAX, as it is in this process."""
    return getattr(jax.config, name)


def devices() -> list[Finding]:
    """The devices that JAX computes on, and an accelerator that it does not see."""
    try:
        found = jax.devices()
    except RuntimeError as error:
        text = f"JAX has no device: {str(error).splitlines()[0]}"
        remedy = "Install the jaxlib of your accelerator, or take the CPU: `JAX_PLATFORMS=cpu`"
        return [Finding(text, remedy, is_wrong=True)]
    kinds = ", ".join(sorted({device.device_kind for device in found}))
    text = f"{len(found)} × {found[0].platform} ({kinds}), {jax.process_count()} process(es)"
    if found[0].platform == "cpu" and shutil.which("nvidia-smi"):
        remedy = 'JAX does not see its GPU: `python -m pip install -U "jax[cuda13]"`'
        return [Finding(text), Finding("this machine has NVIDIA's driver", remedy)]
    return [Finding(text)]


def precision() -> list[Finding]:
    """The default dtype with what it means for tolerances, and how exact products are."""
    if setting("jax_enable_x64"):
        wide = Finding("float64 is on: `solve` has rtol 1e-6, `limit_map` rtol 1e-6")
    else:
        remedy = 'For more: `jax.config.update("jax_enable_x64", True)`, or `JAX_ENABLE_X64=1`'
        wide = Finding("float64 is off: `solve` has rtol 1e-4, `limit_map` rtol 1e-3", remedy)
    error = _error_of_products()
    asked = _precision.asked_for()
    text = f"products of float32 matrices (precision `{asked}`) are off by {error:.0e}"
    if error < 30 * _precision.eps_of_dtype(jnp.float32):
        return [wide, Finding(text)]
    remedy = (
        "The library computes its own at the highest precision; for those of your model: "
        "`JAX_DEFAULT_MATMUL_PRECISION=highest`"
    )
    return [wide, Finding(text, remedy)]


def _error_of_products() -> float:
    left, right = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    exact = left.astype(float) @ right.astype(float)
    return float(np.max(np.abs(jnp.matmul(left, right) - exact)) / np.max(np.abs(exact)))


def threads(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Cores, threads, and the settings that change them or JAX."""
    cores = num_cores()
    found = [Finding(f"{cores} cores; XLA has {num_threads(environment)} threads for its work")]
    openblas = environment.get("OPENBLAS_NUM_THREADS")
    if openblas is None and cores <= FEW_CORES:
        remedy = "Factorisations of small matrices are faster and steadier with 1"
        found.append(Finding("OPENBLAS_NUM_THREADS is not set", f"{remedy}: set it to that"))
    names = sorted(name for name in environment if name.startswith(SETTINGS))
    shown = " ".join(f"{name}={environment[name]}" for name in names)
    return [*found, Finding(f"settings: `{shown}`" if shown else "settings: none")]


def num_cores() -> int:
    """Those that this process may use."""
    try:
        # Fewer than the machine has where a container or a batch system says so.
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def num_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads of XLA's pool on CPUs."""
    asked = environment.get("PJRT_NPROC") or environment.get("NPROC") or ""
    return int(asked) if asked.isdigit() and int(asked) else num_cores()


def programs() -> list[Finding]:
    """The folder of compiled programs: whether there is one, its size, what is kept in it."""
    folder = setting("jax_compilation_cache_dir")
    if not folder:
        remedy = (
            "Every process compiles anew; to keep programs, before Python is started: "
            "`JAX_COMPILATION_CACHE_DIR=~/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`"
        )
        return [Finding("no folder for compiled programs is set", remedy)]
    if "://" in folder:
        return [Finding(f"compiled programs are kept in {folder}")]
    path = pathlib.Path(folder).expanduser()
    if not can_be_written(path):
        remedy = "Name another: `JAX_COMPILATION_CACHE_DIR=~/.cache/jax`"
        text = f"compiled programs should go to {folder}, which cannot be written"
        return [Finding(text, remedy, is_wrong=True)]
    sizes = [file.stat().st_size for file in path.glob("*") if file.is_file()]
    least = setting("jax_persistent_cache_min_compile_time_secs")
    text = (
        f"compiled programs are kept in {folder}: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} files; "
        f"kept is what compiles for {least:g} s or longer"
    )
    if least > 0:
        remedy = "Most programs compile faster: `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`"
        return [Finding(text, remedy)]
    return [Finding(text)]


def can_be_written(folder: pathlib.Path) -> bool:
    """True if a file can be made in a folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
