"""The README: its examples run, its links lead somewhere."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINKS = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README)
TIME_LIMIT = 60.0


def processor_seconds():
    times = os.times()
    return times.children_user + times.children_system


def test_there_is_an_example():
    assert BLOCKS, "README.md has no python block"


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path):
    """Every block stands alone and needs less than a minute of a fresh interpreter.

    Counted in processor time, which other programs on the machine hardly stretch. Compiled as
    the tests are, quickly rather than well.
    """
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for library in re.findall(r"^(?:import|from) (flax|haiku)\b", BLOCKS[number], re.MULTILINE):
        pytest.importorskip(library, reason="of the `models` extra, which is part of `test`")
    began = processor_seconds()
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]],
        cwd=tmp_path,
        env=os.environ | quick | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=10 * TIME_LIMIT,
    )
    seconds = processor_seconds() - began
    print(f"python block {number} of README.md: {seconds:.1f} s\n{run.stdout}")
    assert run.returncode == 0, f"python block {number} of README.md:\n{run.stderr[-4000:]}"
    assert seconds < TIME_LIMIT, f"python block {number}: {seconds:.1f} s, bound {TIME_LIMIT} s"


def test_links_lead_somewhere():
    missing = [link for link in LINKS if not (ROOT / link).exists()]
    assert not missing, f"README.md links to files that do not exist: {missing}"


def test_names_the_test_command():
    assert "python -m pytest" in README
