"""Programs in processes of their own: the number of devices is set when a process starts.

They are forked from a process that has imported the package and done nothing else, as importing
takes three seconds. What must be set before that is set by a process that starts anew.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import runpy
import socket
import sys
import tempfile
import time
from typing import Any, NamedTuple

TESTS = pathlib.Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["manifoldflow"])


class Finished(NamedTuple):
    """What became of a program; `seconds` of processor time, without the imports."""

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float


class Running:
    """`python *words` in this folder; `environment` is added to that of the tests.

    Options of JAX among it are set in its configuration.
    """

    def __init__(self, words, folder=".", environment=None):
        self.files = tempfile.TemporaryDirectory()
        arguments = [*map(str, words)], str(folder), self.files.name, dict(environment or {})
        self.process: Any = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    def printed(self) -> str:
        """What it has printed so far."""
        path = pathlib.Path(self.files.name) / "stdout"
        return path.read_text() if path.exists() else ""

    def finished(self, timeout=300.0) -> Finished:
        """What it printed, once it is over or `timeout` seconds are."""
        self.process.join(timeout)
        self.kill()
        with self.files as folder:
            said = {path.name: path.read_text() for path in pathlib.Path(folder).iterdir()}
        seconds = float(said.get("seconds", "inf"))
        return Finished(
            self.process.exitcode, said.get("stdout", ""), said.get("stderr", ""), seconds
        )

    def kill(self):
        self.process.kill()
        self.process.join()


def _run(words, folder, files, environment):
    """In the process of its own."""
    # Not at the top: flags of XLA are set before.
    import jax

    import quick

    began = time.process_time()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(files, name), os.O_WRONLY | os.O_CREAT), stream)
    quick.settle()
    os.environ.update(environment)
    for name, value in environment.items():
        if name.startswith("JAX_"):
            jax.config.update(name.lower(), value)
    os.chdir(folder)
    is_option = words[0] in ("-c", "-m")
    sys.argv = words[is_option:]
    sys.path.insert(0, os.getcwd() if is_option else os.path.dirname(os.path.abspath(words[0])))
    try:
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        with open(os.path.join(files, "seconds"), "w") as file:
            file.write(str(time.process_time() - began))


def start(program, *arguments, num_devices):
    """A program of the tests in a process with so many devices."""
    count = f"--xla_force_host_platform_device_count={num_devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    return Running([TESTS / program, *arguments], environment={"XLA_FLAGS": flags})


def finished(process, timeout=300):
    """What it printed last, read as JSON, and all that it printed."""
    done = process.finished(timeout)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]), done.stdout


def two_reports(program):
    """What two processes with two devices each reported, `program process 0 or 1 port`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        both = [start(program, "process", i, port, num_devices=2) for i in range(2)]
        for process in both:
            stack.callback(process.kill)
        return [finished(process, timeout=120)[0] for process in both]
