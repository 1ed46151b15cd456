"""The command line from end to end: digits, a user's own data, a killed run, bad options."""

import io
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from manifoldflow.__main__ import _keep_programs, _read, _Waiting, main
from manifoldflow.plotting import plot_walk

SMALL = ["--examples", "8", "--width", "10", "--end-time", "2"]


@pytest.fixture(autouse=True)
def keep_settings(monkeypatch, tmp_path):
    # Nothing goes to the cache folder of whoever runs the tests.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    yield
    jax.config.update("jax_enable_x64", True)


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    pytest.importorskip("platformdirs")
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    _keep_programs()
    assert jax.config.jax_compilation_cache_dir == before[names[0]], "JAX was told where to"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        _keep_programs()
        assert "manifoldflow" in jax.config.jax_compilation_cache_dir
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()], ids=["file", "terminal"])
def test_what_takes_long_is_announced(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    with _Waiting("compiling the walk") as waiting:
        time.sleep(1.2)
        waiting.clear()
    shown = stream.getvalue()
    assert "compiling the walk …" in shown
    if stream.isatty():
        assert "… 1 s" in shown and shown.endswith(" \r"), "the line is taken back at the end"


def test_own_data(tmp_path, capsys):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(30, 5))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=inputs[:, 0] - inputs[:, 1])
    assert main([*SMALL, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "test error" in out, "real targets are no classes"
    rows = [line for line in out.splitlines() if line.startswith("[")]
    assert len(rows) == 26, f"a row for each of 26 saves, got {len(rows)}"


def test_tables(tmp_path):
    rng = np.random.default_rng(0)
    inputs, classes = rng.normal(size=(30, 5)), rng.integers(0, 3, 30)
    path = tmp_path / "data.csv"
    for header in ("", "a,b,c,d,e,y"):
        table = np.column_stack([inputs, classes])
        np.savetxt(path, table, delimiter=",", header=header, comments="")
        got_inputs, got_targets = _read(path)
        assert np.array_equal(got_inputs, inputs), f"header {header!r}: inputs differ"
        assert np.array_equal(got_targets, classes), f"header {header!r}: targets differ"
        assert np.issubdtype(got_targets.dtype, np.integer), "whole numbers are classes"


def test_a_killed_walk_on_digits_goes_on_to_its_end(tmp_path):
    command = [sys.executable, "-m", "manifoldflow", *SMALL, "--out", str(tmp_path)]
    checkpoint = pathlib.Path(tmp_path) / "checkpoint.npz"
    # Compiled quickly rather than well, and once for both.
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        rows = 0
        for line in process.stdout:
            rows += line.startswith("[")
            if rows == 5:
                break
        process.kill()
    with np.load(checkpoint) as stored:
        done = len(stored["point_0"])
        assert done >= 4, f"4 saves were shown, {done} are stored"
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == 0, again.stderr[-2000:]
    shown = sum(line.startswith("[") for line in again.stdout.splitlines())
    assert shown <= 26 - done + 1, f"{shown} rows after a resume from save {done}"
    with np.load(tmp_path / "walk.npz") as walk:
        times, sharpness, loss = walk["times"], walk["sharpness"], walk["loss"]
    assert len(times) == 26, f"{len(times)} saves in the whole path"
    assert sharpness[-1] < sharpness[0], f"tr∇²L rose: {sharpness[[0, -1]]}"
    assert loss.max() < 1e-20, f"the loss was {loss.max():.1e} on the way"
    for name in ("network.eqx", "walk.png"):
        assert (tmp_path / name).stat().st_size > 1000, f"{name} is empty"
    assert not checkpoint.exists(), "a finished walk needs no checkpoint"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--examples", "0"], "--examples must be at least 1"),
        (["--examples", "2000"], "between 1 and 1000"),
        (["--end-time", "-1"], "--end-time must be positive"),
        (["--examples", "50", "--width", "2"], "Use fewer examples or a wider model"),
        (["--data", "nothing.xyz"], ".npz or a .csv"),
    ],
)
def test_bad_options(tmp_path, capsys, options, words):
    assert main([*SMALL, "--out", str(tmp_path), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("has_saves", "words"), [(True, "goes on from"), (False, "begins anew")])
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch, has_saves, words):
    def interrupted(options):
        if has_saves:
            (options.out / "checkpoint.npz").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("manifoldflow.__main__._run", interrupted)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0], lines


def test_picture_has_labels(tmp_path):
    import manifoldflow as mf

    walk = mf.Solution(
        times=jnp.arange(3.0),
        points=jnp.zeros((3, 2)),
        observables={
            "sharpness": jnp.array([3.0, 2, 1]),
            "test_accuracy": jnp.array([0.1, 0.2, 0.3]),
        },
        stats={},
        result=mf.RESULTS.successful,
        final_coordinates=jnp.zeros(2),
        remainder=None,
    )
    figure = plot_walk(walk, spectra=([1.0, 2.0], [0.5, 0.0]), caption="What to see.")
    for axes in figure.axes:
        assert axes.get_ylabel(), "an axis without a label"
    assert figure.axes[0].get_legend() and figure.axes[1].get_legend()
