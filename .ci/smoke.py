"""Benchmarks and notebooks in their smallest settings, two at a time.

Each runs in a process of its own, forked from one that has imported what they all import: starting
Python and importing would be half of the time.

    python .ci/smoke.py FOLDER FILE…    # FOLDER for what they write
"""

import json
import multiprocessing
import os
import pathlib
import runpy
import sys
import time
from multiprocessing.pool import ThreadPool

IMPORTED = [
    "diffrax", "equinox", "IPython.core.interactiveshell", "jax", "manifoldflow",
    "manifoldflow.models", "manifoldflow.plotting", "manifoldflow.sgd", "manifoldflow.theory",
    "optax", "sklearn.datasets",
]  # fmt: skip
SECONDS = 600  # other checks may run beside
CONTEXT = multiprocessing.get_context("forkserver")


def run_script(path: pathlib.Path, folder: pathlib.Path) -> None:
    sys.argv = [str(path), "--smoke", "--out", str(folder / "benchmarks")]
    sys.path.insert(0, str(path.parent))
    if "os.environ |=" in path.read_text(encoding="utf-8"):
        # It sets what libraries read when they are imported: too late here.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    runpy.run_path(str(path), run_name="__main__")


def leave_layouts() -> None:
    """Draw pictures, but find no room for their texts: that takes longer than drawing."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine, TightLayoutEngine

    for engine in (ConstrainedLayoutEngine, TightLayoutEngine):
        engine.execute = lambda self, figure: None
    save = Figure.savefig
    # Cutting off empty margins draws a picture twice.
    Figure.savefig = lambda *args, **options: save(*args, **options | {"bbox_inches": None})


def run_notebook(path: pathlib.Path) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    leave_layouts()
    os.chdir(path.parent)
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            shell.run_cell("".join(cell["source"])).raise_error()


def run(path: pathlib.Path, folder: pathlib.Path, log: pathlib.Path) -> None:
    """In the process of its own; what it says goes to a file."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
    import quick  # and JAX with it, which knows where to run only now

    quick.settle()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        if path.suffix == ".py":
            run_script(path, folder)
        else:
            run_notebook(path)
    finally:
        print(f"{time.process_time():.0f} s of processor time", flush=True)


def watched(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Run it, print what it said, and tell whether it went well."""
    began, log = time.perf_counter(), folder / f"{path.name}.log"
    process = CONTEXT.Process(target=run, args=(path.resolve(), folder.resolve(), log.resolve()))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    seconds = time.perf_counter() - began
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    print(f"\n--- {path}: {seconds:.0f} s, exit status {process.exitcode}\n{said}", flush=True)
    return process.exitcode == 0


def main(folder: str, *files: str) -> int:
    os.environ["MANIFOLDFLOW_SMOKE"] = "1"
    CONTEXT.set_forkserver_preload(IMPORTED)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with ThreadPool(2) as pool:
        jobs = [(pathlib.Path(file), pathlib.Path(folder)) for file in files]
        went_well = pool.starmap(watched, jobs, chunksize=1)
    return int(not all(went_well))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
