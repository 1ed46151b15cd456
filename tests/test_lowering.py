"""Every hot function can be lowered for TPUs and for NVIDIA GPUs, on a machine without either."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import lowering_programs

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def lowered(request):
    """What became of the programs, in one process in which nothing calls back to Python."""
    cases = [item for item in request.session.items if "lowered" in item.fixturenames]
    names = [case.callspec.params["name"] for case in cases]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "lowering_programs.py"), *names],
        env={**os.environ, "EQX_ON_ERROR": "nan", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = map(json.loads, done.stdout.splitlines())
    return {result["name"]: result for result in results}


@pytest.mark.parametrize("name", lowering_programs.PROGRAMS)
def test_lowers_for_both(name, lowered):
    assert lowered[name].get("platforms") == ["tpu", "cuda"], lowered[name]
