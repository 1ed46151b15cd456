"""The entry point: options, compiled programs that are kept, and errors in a line."""

import argparse
import os
import pathlib
import re
import signal
import sys

import equinox as eqx
import jax

from manifoldflow._command._arguments import parsed
from manifoldflow._command._landed import checkpoint_of, landed_of

ERRORS = ValueError, ImportError, OSError, MemoryError, eqx.EquinoxRuntimeError


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `manifoldflow`; returns the exit status."""
    options = None
    try:
        options = parsed(sys.argv[1:] if arguments is None else arguments)
        if "float32" in options:  # the doctor looks at JAX as it is set
            jax.config.update("jax_enable_x64", not options.float32)
            keep_programs()
        if "out" in options:
            options.out.mkdir(parents=True, exist_ok=True)
        return options.run(options) or 0
    except (*ERRORS, jax.errors.JaxRuntimeError) as error:
        print(f"manifoldflow: {_sentence(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"manifoldflow: {_how_to_go_on(options)}", file=sys.stderr)
        # As shells report a program that Ctrl-C has ended.
        return 128 + signal.SIGINT


def keep_programs() -> None:
    """Compiled programs go to the user's cache folder, or where JAX has been told to keep them."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        import platformdirs
    except ImportError:
        return
    folder = platformdirs.user_cache_path("manifoldflow", appauthor=False) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _sentence(error: BaseException, options: argparse.Namespace | None) -> str:
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        if options is None or "width" in options:
            return "out of memory. Fewer examples or a narrower model (--width) take less of it."
        return "out of memory. Fewer --examples, or --float32, take less of it."
    found = re.search(r"EquinoxRuntimeError: (.*)", str(error))
    if found:
        return found[1]
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _how_to_go_on(options: argparse.Namespace | None) -> str:
    places: list[tuple[str, pathlib.Path]] = []
    if options is not None and "out" not in options:
        return "stopped; nothing is kept."
    if options is not None:
        places.append(("from the last save", checkpoint_of(options.out)))
        places.append(("from the landed network", landed_of(options.out)))
    for where, path in places:
        if path.exists():
            return f"stopped; the same command goes on {where}, in {path}."
    return "stopped before the first save; the same command begins anew."
