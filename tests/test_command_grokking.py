"""Grokking by the command line: the whole run, its picture, its refusals."""

import os
import sys

import jax
import numpy as np
import pytest

from checks import at_least, at_most, equal
from command_files import rows_of
from manifoldflow.__main__ import main
from manifoldflow._command._arguments import parsed
from manifoldflow._command._grok import _model
from manifoldflow._command._spectrum import concentration, power

GROK = ["--modulus", "5", "--width", "16", "--end-time", "2", "--saves", "3"]


@pytest.fixture(autouse=True)
def keep_settings(monkeypatch, tmp_path):
    # Nothing goes to the cache folder of whoever runs the tests.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    yield
    jax.config.update("jax_enable_x64", True)


def test_without_options_it_groks(tmp_path, capsys):
    assert main(["--end-time", "3.4", "--saves", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    equal("rows", len(rows), 3)
    at_most("test accuracy where the loss is zero first", rows[0][-1], 0.1)
    at_least("test accuracy at the end", rows[-1][-1], 0.99)
    equal("training accuracy on the way", {row[-2] for row in rows}, {"1.000"})
    at_most("the largest training loss", max(float(row[2]) for row in rows), 1e-20)
    with np.load(tmp_path / "walk.npz") as walk:
        points = [{name: walk[name][i] for name in "WV"} for i in (0, -1)]
        close_to = np.sum(points[1]["W"] ** 2) + np.sum(points[1]["V"] ** 2)
    at_most("½‖θ‖² in the table", abs(float(rows[-1][3]) - close_to / 2), 0.01)
    before, after = (concentration(11, point) for point in points)
    at_most("one frequency a unit, at the start", before, 0.5)
    at_least("one frequency a unit, at the end", after, 0.75)
    assert f"{before:.0%} → {after:.0%}" in out, out


def test_grokking_in_small(tmp_path, capsys):
    assert main([*GROK, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr()
    assert "compiling the walk" in first.err
    for words in ("limit time", "training loss", "½‖θ‖²", "tr∇²L", "test accuracy"):
        assert words in first.out, words
    equal("rows", len(rows_of(first.out)), 4)
    head = (tmp_path / "grokking.png").read_bytes()[:24]
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    at_least("pixels across, of 12.5 inches", width, 12.5 * 150)
    at_least("pixels down, of 5.8 inches", height, 5.8 * 150)
    assert not (tmp_path / "checkpoint.npz").exists(), "a finished walk needs no checkpoint"
    assert main([*GROK, "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "landed by an earlier call" in again, again
    equal("the same walk", rows_of(again), rows_of(first.out))


def test_without_matplotlib_there_is_no_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "manifoldflow._command._picture", None)
    assert main([*GROK, "--out", str(tmp_path)]) == 0
    assert "no picture: python -m pip install" in capsys.readouterr().out
    assert not (tmp_path / "grokking.png").exists() and (tmp_path / "walk.npz").exists()


@pytest.mark.parametrize("modulus", [5, 6])
def test_spectra_of_units(modulus):
    rng = np.random.default_rng(0)
    phases, waves = 2 * np.pi * np.arange(modulus) / modulus, np.array([0, 1, 2, 2])
    of_one = lambda: np.cos(np.outer(waves, phases) + rng.uniform(0, 1, (4, 1)))
    point = {"W": np.concatenate([of_one(), of_one()], axis=1), "V": of_one().T}
    spectrum = power(modulus, point)
    equal("frequencies", np.argmax(spectrum, axis=1).tolist(), waves.tolist())
    at_most("what is not in one", 1 - concentration(modulus, point), 1e-12)
    point = {"W": rng.normal(size=(4, 2 * modulus)), "V": rng.normal(size=(modulus, 4))}
    squares = np.sum(point["W"] ** 2, axis=1) + np.sum(point["V"] ** 2, axis=0)
    error = np.abs(power(modulus, point).sum(axis=1) - squares).max()
    at_most("sums over frequencies less squared lengths", error, 1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--modulus", "1"], "--modulus must be at least 2; got 1"),
        (["--modulus", "97"], "are too many"),
        (["--width", "3"], "Use fewer examples or a wider model: --modulus 3 or --width 33"),
        (["--train-fraction", "1"], "--train-fraction must be between 0 and 1; got 1.0"),
        (["--end-time", "inf"], "--end-time must be positive and finite; got inf"),
        (["wlak"], "invalid choice: 'wlak'"),
        (["--seed", "1", "walk"], "walk must come first"),
    ],
)
def test_bad_options_of_grokking(tmp_path, capsys, options, words):
    assert main(["--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    equal("lines of the message", len(err.splitlines()), 1)


@pytest.mark.parametrize("width", [2, 3, 20])
def test_proposed_sizes_are_taken(width):
    with pytest.raises(ValueError) as caught:
        _model(parsed(["--width", str(width)]))
    words = str(caught.value).split()
    modulus, enough = (words[words.index(name) + 1] for name in ("--modulus", "--width"))
    assert _model(parsed(["--width", str(width), "--modulus", modulus])).modulus >= 2
    model = _model(parsed(["--width", enough]))
    equal("its width", model.width, int(enough))
    with pytest.raises(ValueError):
        _model(parsed(["--width", str(int(enough) - 1)]))
