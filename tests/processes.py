"""Programs in processes of their own: the number of devices is set when a process starts."""

import json
import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def start(program, *arguments, num_devices):
    """A program of the tests in a process with so many devices."""
    count = f"--xla_force_host_platform_device_count={num_devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(TESTS / program), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, timeout=300):
    """What it printed last, read as JSON, and all that it printed."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, f"{out[-2000:]}\n{errors[-4000:]}"
    lines = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]), out


def two_reports(program):
    """What two processes with two devices each reported, `program process 0 or 1 port`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [start(program, "process", i, port, num_devices=2) for i in range(2)]
    try:
        return [finished(process, timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
