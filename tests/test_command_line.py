"""The command line on data: digits, a user's own, a killed run, bad options."""

import io
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, equal, refused
from command_files import arrays, diabetes_like, iris_like, rows_of, SMALL, wine_like
from manifoldflow.__main__ import main
from manifoldflow._command._arguments import parsed
from manifoldflow._command._limit import known_updates, update_of
from manifoldflow._command._main import keep_programs
from manifoldflow._command._sizes import check_sizes, MAX_RESIDUALS
from manifoldflow._command._solved import plainly
from manifoldflow._command._waiting import Waiting
from manifoldflow.plotting import plot_walk
from processes import Running

WALK = ["walk", "--examples", "8", "--width", "10", "--end-time", "2"]


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
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == before[names[0]], "JAX was told where to"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        keep_programs()
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
    with Waiting("compiling the walk") as waiting:
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
    assert main([*WALK, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "test error" in out, "real targets are no classes"
    rows = rows_of(out)
    assert len(rows) == 26, f"a row for each of 26 saves, got {len(rows)}"


FILES = {
    "diabetes.csv": (diabetes_like, "regression of 1 number", "test error"),
    "arrays.npz": (arrays, "regression of 1 number", "test error"),
    "wine.csv": (wine_like, "3 classes (0, 1, 2)", "test accuracy"),
    "iris.csv": (iris_like, "3 classes (setosa, versicolor, virginica)", "test accuracy"),
}


@pytest.mark.parametrize("name", FILES)
def test_ordinary_files(tmp_path, capsys, name):
    make, what, measure = FILES[name]
    data = str(make(tmp_path / name))
    assert main(["walk", *SMALL, "--data", data, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (what, measure, "standardised by the training examples"):
        assert words in out, out
    rows = rows_of(out)
    equal("rows", len(rows), 4)
    at_most("the largest loss", max(float(row[2]) for row in rows), 1e-20)
    at_most("tr∇²L at the end, in those at the start", float(rows[-1][3]) / float(rows[0][3]), 0.99)


def test_a_landed_network_is_landed_once(tmp_path, capsys, monkeypatch):
    data = ["--data", str(arrays(tmp_path / "data.npz")), "--out", str(tmp_path)]
    with monkeypatch.context() as context:
        context.setattr("manifoldflow._command._walk._walked", interrupted)
        assert main(["walk", *SMALL, *data]) == 130
    err = capsys.readouterr().err
    assert f"goes on from the landed network, in {tmp_path / 'landed.npz'}" in err, err
    said = [line for line in err.splitlines() if line.startswith("compiling")]
    equal(
        "what is compiled",
        [line.split()[-2] for line in said],
        ["manifold", "training", "manifold"],
    )
    assert main(["walk", *SMALL, *data]) == 0
    first = capsys.readouterr()
    assert "landed by an earlier call" in first.out, first.out
    assert "training" not in first.err, "what was trained is trained again"
    assert main(["walk", *SMALL, *data, "--seed", "1"]) == 0
    assert "trained by Adam" in capsys.readouterr().out, "another start"
    (tmp_path / "landed.npz").write_bytes(b"damaged")
    assert main(["walk", *SMALL, *data]) == 0
    again = capsys.readouterr().out
    assert "trained by Adam" in again, "a damaged file is made anew"
    equal("the same walk as from the file", rows_of(again), rows_of(first.out))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (["--seed", "1"], "belongs to a walk from another network or on other data"),
        (["--end-time", "3"], "belongs to a solve with other save times"),
    ],
)
def test_a_stopped_walk_is_not_overwritten(tmp_path, capsys, monkeypatch, other, words):
    command = ["walk", *SMALL, "--data", str(arrays(tmp_path / "data.npz"))]
    command += ["--out", str(tmp_path)]
    with monkeypatch.context() as context:
        context.setattr("manifoldflow._command._walk._save", interrupted)
        assert main(command) == 130
    kept = (tmp_path / "landed.npz").read_bytes(), (tmp_path / "checkpoint.npz").read_bytes()
    capsys.readouterr()
    assert main([*command, *other]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert words in err and "--out" in err, err
    now = (tmp_path / "landed.npz").read_bytes(), (tmp_path / "checkpoint.npz").read_bytes()
    assert now == kept, "what was there is lost"


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_old_spelling(tmp_path, capsys):
    data = str(arrays(tmp_path / "data.npz"))
    assert main([*SMALL, "--data", data, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "python -m manifoldflow walk --examples" in captured.err, captured.err
    equal("rows", len(rows_of(captured.out)), 4)


@pytest.mark.parametrize("options", [["--noise", "none"], ["--update", "sgd:momentum=0.5"]])
def test_other_limits(tmp_path, capsys, options):
    data = str(arrays(tmp_path / "data.npz"))
    command = ["walk", *SMALL, "--data", data, "--out", str(tmp_path), *options]
    assert main(command) == 0
    rows = rows_of(capsys.readouterr().out)
    at_most("the largest loss", max(float(row[2]) for row in rows), 1e-20)
    at_least("the way walked", float(rows[-1][5]), 1e-3)


def test_isotropic_noise_goes_half_the_length_of_the_weights(tmp_path, capsys):
    data = ["--data", str(arrays(tmp_path / "data.npz")), "--out", str(tmp_path)]
    limit = ["--noise", "isotropic", "--steps", "8", "--saves", "2"]
    assert main(["walk", "--examples", "8", "--width", "10", *data, *limit]) == 0
    rows = rows_of(capsys.readouterr().out)
    at_most("the largest loss", max(float(row[2]) for row in rows), 1e-20)
    with np.load(tmp_path / "landed.npz") as landed:
        weights = np.concatenate([np.ravel(landed[name]) for name in landed if "leaf" in name])
    time = weights @ weights / (4 * (weights.size - 8))
    at_most("end time less |θ|²/4D", abs(float(rows[-1][1]) - time), 6e-3)


def test_what_cannot_be_fitted_is_said(tmp_path, capsys):
    # Numbers that no float tells apart from each other, with other targets.
    inputs = np.ones((12, 5)) + 1e-15 * np.arange(12)[:, None]
    np.savez(tmp_path / "data.npz", X=inputs, y=np.random.default_rng(0).normal(size=12))
    data = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path), "--no-standardise"]
    assert main(["walk", *SMALL, *data]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    for words in (
        "training did not fit",
        "Leave out --no-standardise",
        "--width",
        "--examples",
        "--seed",
    ):
        assert words in err, err


# --- killed, interrupted, refused -----------------------------------------------------------


def test_a_killed_walk_on_digits_goes_on_to_its_end(tmp_path):
    command = ["-m", "manifoldflow", *WALK, "--out", tmp_path]
    checkpoint = pathlib.Path(tmp_path) / "checkpoint.npz"
    # Compiled once for both.
    environment = {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    first = Running(command, environment=environment)
    while sum(line.startswith("[") for line in first.printed().splitlines()) < 5:
        assert first.process.is_alive(), first.finished().stderr[-2000:]
        time.sleep(0.01)
    first.finished(0)
    with np.load(checkpoint) as stored:
        done = len(stored["point_0"])
        assert done >= 4, f"4 saves were shown, {done} are stored"
    again = Running(command, environment=environment).finished()
    assert again.returncode == 0, again.stderr[-2000:]
    assert "landed by an earlier call" in again.stdout, "the landed network was on the disk"
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
        (["--examples", "1000"], "10000 residuals (examples × outputs) are too many"),
        (["--examples", "many"], "--examples: invalid int value: 'many'"),
        (["--noise", "sideways"], "--noise: invalid choice: 'sideways'"),
        (["--noise", "none", "--weight-decay", "1"], "leave out --update and --weight-decay"),
        (["--update", "nothing"], "--update must be one of"),
        (["--update", "sgd:speed=3"], "has no option speed; it has momentum"),
        (["--update", "sgd:momentum=1/2"], "NAME=VALUE"),
        (["--weight-decay", "-1"], "--weight-decay must be finite and not negative; got -1.0"),
        (["--target", "y"], "--target and --drop are for files"),
        (["--seed", "-1"], "--seed must be"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of; `manifoldflow walk --help`"),
    ],
)
def test_bad_options(tmp_path, capsys, options, words):
    assert main([*WALK, "--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    equal("lines of the message", len(err.splitlines()), 1)


def test_sizes_that_are_proposed_are_taken():
    with refused(ValueError, "--modulus 7 or --width 9"):
        check_sizes(700, 700, 8, fewer=lambda most: f"--modulus {most // 99}", wider="--width 9")
    most = MAX_RESIDUALS
    check_sizes(most, most + 1, 4, fewer=str, wider="")
    with refused(ValueError, "too many", str(most)):
        check_sizes(most + 1, 10**6, 4, fewer=str, wider="")


def test_memory_is_counted_first(monkeypatch):
    monkeypatch.setattr("manifoldflow._command._sizes.memory_of_this_machine", lambda: 10**8)
    with refused(ValueError, "0.2 GB; this machine has 0.1 GB", "--float32 or 632"):
        check_sizes(1000, 10_000, 8, fewer=str, wider="")
    # Where the system does not tell, only the number of residuals counts.
    monkeypatch.setattr("manifoldflow._command._sizes.memory_of_this_machine", lambda: None)
    check_sizes(1000, 10_000, 8, fewer=str, wider="")


class _Scaled(mf.updates.AbstractUpdate):
    """What may come to `manifoldflow.updates`: an option without a default."""

    factor: float
    is_fast: bool = False

    @property
    def clock(self):
        return mf.updates.SGD().clock

    def transform(self, learning_rate):
        return mf.updates.SGD().transform(self.factor * learning_rate)

    def slow_drift(self, coordinates):
        return None


def test_all_updates_can_be_asked_for(monkeypatch):
    equal("plain SGD", known_updates()["sgd"], mf.updates.SGD)
    monkeypatch.setattr(mf.updates, "Scaled", _Scaled, raising=False)
    ask = lambda *options: update_of(parsed(["walk", "--update", *options]))
    made = ask("scaled:factor=3,is_fast=true")
    equal("options", (type(made), made.factor, made.is_fast), (_Scaled, 3, True))
    equal("decay", float(ask("sgd", "--weight-decay", "0.5").weight_decay), 0.5)
    with refused(ValueError, "needs factor; write --update scaled:factor=NUMBER"):
        ask("scaled")
    with refused(ValueError, "--update scaled has no --weight-decay; it has factor, is_fast"):
        ask("scaled:factor=1", "--weight-decay", "0.5")


def test_messages_of_the_library_lose_its_options():
    for name in mf.RESULTS._name_to_item:
        plain = plainly(mf.RESULTS[getattr(mf.RESULTS, name)])
        assert "`" not in plain, f"{name}: {plain}"
    equal("step limit", plainly("It was reached. Raise `max_steps`."), "It was reached.")


@pytest.mark.parametrize("command", [[], ["walk"], ["report"]], ids=["grokking", "walk", "report"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    equal("exit status", ended.value.code, 0)
    out = capsys.readouterr().out
    examples = [line.split() for line in out.splitlines() if line.startswith("  python -m")]
    at_least("examples", len(examples), 4)
    for words in examples:
        if "--help" not in words:
            arguments = words[3 : words.index("weight") if "weight" in words else None]
            assert parsed(arguments).run, words
    at_most("columns", max(map(len, out.splitlines())), 100)


@pytest.mark.parametrize(("has_saves", "words"), [(True, "goes on from"), (False, "begins anew")])
def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch, has_saves, words):
    def stopped(options):
        if has_saves:
            (options.out / "checkpoint.npz").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("manifoldflow._command._walk.run", stopped)
    assert main([*WALK, "--out", str(tmp_path)]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0], lines


def test_picture_has_labels(tmp_path):
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
