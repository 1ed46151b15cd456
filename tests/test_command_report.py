"""The command `report`: a network of a user's own, its weights in a file, its data in another."""

import os
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import manifoldflow as mf
from checks import close, equal
from command_files import arrays, diabetes_like, iris_like, measured, NUM_INPUTS, NUM_ROWS
from manifoldflow import plotting
from manifoldflow.__main__ import main

MODULE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

WEIGHTS = {"W": jnp.zeros((2, 5)), "b": jnp.zeros(2)}


def classifier(width=4, dtype=None):
    return eqx.nn.MLP(5, 3, width, 1, activation=jnp.tanh, dtype=dtype, key=jr.key(0))


def single():
    return classifier(dtype=jnp.float32)


def wide():
    return classifier(width=6)


def deep():
    return eqx.nn.MLP(5, 3, 4, 2, activation=jnp.tanh, key=jr.key(0))


def number():
    return eqx.nn.MLP(5, 1, 8, 1, activation=jnp.tanh, key=jr.key(0))


def scalar():
    return eqx.nn.MLP(5, "scalar", 8, 1, activation=jnp.tanh, key=jr.key(0))


class Images(eqx.Module):
    inner: eqx.nn.Conv2d

    def __init__(self):
        self.inner = eqx.nn.Conv2d(1, 3, (2, 3), key=jr.key(0))

    def __call__(self, x):
        return self.inner(x)[:, 0, 0]


def pair():
    return WEIGHTS, lambda w, x: w["W"] @ x + w["b"]


def weights():
    return WEIGHTS


def empty():
    return abs


def wrong():
    raise KeyError("depth")


def fails(model):
    return model


class Bug(eqx.Module):
    w: jax.Array

    def __init__(self):
        self.w = jnp.ones(3)

    def __call__(self, x):
        return x.undefined


def poisson(output, count):
    return jnp.exp(output[0]) - count * output[0]


def squares_of_labels(output, label):
    return jnp.sum((output - label) ** 2)


def vector(output, target):
    return output


def bug(output, target):
    return output.undefined
"""
QUICK = ["--seconds", "0.1"]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A folder with a user's module, of a name that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "trained_here", raising=False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    pathlib.Path("trained_here.py").write_text(MODULE, encoding="utf-8")
    iris_like(pathlib.Path("iris.csv"))
    arrays(pathlib.Path("arrays.npz"))
    inputs = np.random.default_rng(0).normal(size=(NUM_ROWS, NUM_INPUTS))
    np.savez("labels.npz", X=inputs, y=np.arange(NUM_ROWS) % 3)
    yield
    jax.config.update("jax_enable_x64", True)
    sys.modules.pop("trained_here", None)


def command(*options, model="classifier"):
    return ["report", *QUICK, *map(str, options), "--model", f"trained_here:{model}"]


def said(capsys, *options, model="classifier"):
    """The output of a command that ends well, and its table: values by their names."""
    assert main(command(*options, model=model)) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines() if len(line) > 34}
    return out, {name: float(row[0]) for name, row in rows.items() if _is_number(row)}


def _is_number(row):
    try:
        return bool(row) and float(row[0]) is not None
    except ValueError:
        return False


def refusal(capsys, *options, model="classifier"):
    """The one sentence of a command that does not."""
    assert main(command(*options, model=model)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" …")]
    equal("lines of the message", len(lines), 1)
    return lines[0]


def classifier(width=4, outputs=3, key=1):
    return eqx.nn.MLP(5, outputs, width, 1, activation=jnp.tanh, key=jr.key(key))


def labels_loss():
    with np.load("labels.npz") as stored:
        inputs, labels = stored["X"], stored["y"]
    return mf.PerExampleLoss(inputs, labels, optax.softmax_cross_entropy_with_integer_labels)


def as_eqx(path, model):
    eqx.tree_serialise_leaves(path, model)


def as_eqx_with_hyperparameters(path, model):
    with open(path, "wb") as file:
        file.write(b'{"width": 4}\n')
        eqx.tree_serialise_leaves(file, model)


def as_eqx_of_parameters(path, model):
    eqx.tree_serialise_leaves(path, eqx.filter(model, eqx.is_inexact_array))


def as_npz_in_order(path, model):
    np.savez(path, *jax.tree.leaves(eqx.filter(model, eqx.is_array)))


def as_npz_by_name(path, model):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array))
    named = {jax.tree_util.keystr(name): leaf for name, leaf in leaves}
    np.savez(path, **dict(reversed(named.items())))


WAYS = [
    (as_eqx, "net.eqx"),
    (as_eqx_with_hyperparameters, "net.eqx"),
    (as_eqx_of_parameters, "net.eqx"),
    (as_npz_in_order, "net.npz"),
    (as_npz_by_name, "net.npz"),
]


@pytest.mark.parametrize(("save", "path"), WAYS, ids=[save.__name__ for save, _ in WAYS])
def test_the_weights_of_the_file_are_reported(capsys, save, path):
    model = classifier()
    save(path, model)
    out, table = said(capsys, path, "--data", "labels.npz", "--learning-rate", 0.1)
    expected = mf.report(labels_loss(), model, learning_rate=0.1, seconds=0.1)
    names = "loss", "trace of G", "largest eigenvalue", "largest stable learning rate"
    for name in names:
        close(name, table[name], expected[name].value, 1e-4)
    assert "labels from 0 to 2" in out and "cross-entropy of 3 outputs" in out, out
    outputs = jax.vmap(model)(labels_loss().inputs)
    right = np.mean(np.argmax(outputs, axis=1) == labels_loss().targets)
    assert f"{right:.1%} of the labels right" in out, out


def test_without_a_file_the_model_as_it_is_built(capsys):
    _, table = said(capsys, "--data", "labels.npz")
    close("loss", table["loss"], labels_loss()(classifier(key=0)), 1e-4)


def test_single_precision_is_read_into_double_and_back(capsys):
    model = classifier()
    single = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, model)
    as_eqx("net.eqx", single)
    as_eqx("double.eqx", model)
    value = float(labels_loss()(single))
    for options in (["net.eqx"], ["net.eqx", "--float32"], ["double.eqx", "--float32"]):
        jax.config.update("jax_enable_x64", "--float32" not in options)
        _, table = said(capsys, *options, "--data", "labels.npz")
        close(f"loss, {options}", table["loss"], value, 1e-4)


def test_one_precision_for_all(monkeypatch):
    """That of the command: not of the file, and not of what builds the model."""
    seen = []
    monkeypatch.setattr(mf, "report", lambda loss, point, **options: seen.append((loss, point)))
    as_eqx(
        "net.eqx",
        jax.tree.map(lambda x: x.astype("float32") if eqx.is_array(x) else x, classifier()),
    )
    for model in ("classifier", "single"):
        for options, expected in (([], jnp.float64), (["--float32"], jnp.float32)):
            jax.config.update("jax_enable_x64", not options)  # as in a process of its own
            assert main(command("net.eqx", *DATA, *options, model=model)) == 0
            loss, point = seen.pop()
            leaves = [*jax.tree.leaves(eqx.filter(point, eqx.is_array)), loss.inputs]
            equal(f"{model} {options}", {leaf.dtype for leaf in leaves}, {jnp.dtype(expected)})


def test_numbers_are_fitted_by_squares_in_the_units_of_the_file(capsys):
    model = classifier(8, outputs=1)
    as_eqx("net.eqx", model)
    out, table = said(capsys, "net.eqx", "--data", "arrays.npz", model="number")
    inputs, targets = measured(3)
    residuals = np.asarray(jax.vmap(model)(inputs))[:, 0] - targets
    close("loss", table["loss"], np.mean(residuals**2) / 2, 1e-4)
    assert "regression of 1 number" in out and "half the mean square" in out, out
    assert f"mean square error {np.mean(residuals**2):.3g}" in out, out
    scalar, other = said(capsys, "--data", "arrays.npz", model="scalar")
    assert "half the mean square" in scalar and "loss" in other, "outputs without an axis"


def test_labels_by_squares(capsys):
    as_eqx("net.eqx", classifier())
    _, table = said(capsys, "net.eqx", "--data", "labels.npz", "--loss", "squares")
    loss = labels_loss()
    residuals = jax.vmap(classifier())(loss.inputs) - np.eye(3)[loss.targets]
    close("loss", table["loss"], jnp.mean(residuals**2) / 2, 1e-4)


def test_what_walk_leaves_behind_is_reported(capsys):
    """The same rows, in the same units: the loss is as small as it was at the end of the walk."""
    walk = ["walk", "--examples", "8", "--width", "4", "--end-time", "1", "--saves", "2"]
    assert main([*walk, "--data", "iris.csv", "--out", "."]) == 0
    rows = ["--data", "iris.csv", "--examples", 8, "--standardise", "--loss", "squares"]
    out, table = said(capsys, "network.eqx", *rows)
    assert table["loss"] < 1e-20, out
    assert "100.0% of the labels right" in out, out
    assert "(setosa, versicolor" in out or "in the order setosa, versicolor" in out, out


def test_text_labels_and_one_hot_labels(capsys):
    out, _ = said(capsys, "--data", "iris.csv")
    assert "3 classes in the order setosa, versicolor, virginica" in out, out
    with np.load("labels.npz") as stored:
        np.savez("one_hot.npz", X=stored["X"], y=np.eye(3)[stored["y"]])
    out, table = said(capsys, "--data", "one_hot.npz")
    assert "one-hot labels of 3 classes" in out, out
    close("loss", table["loss"], labels_loss()(classifier(key=0)), 1e-4)


def test_images_keep_their_shape(capsys):
    images = np.random.default_rng(0).normal(size=(NUM_ROWS, 1, 2, 3))
    np.savez("images.npz", images=images, labels=np.arange(NUM_ROWS) % 3)
    out, table = said(capsys, "--data", "images.npz", "--target", "labels", model="Images")
    assert "loss" in table, out


def test_weights_beside_their_function(capsys):
    weights = {"W": np.arange(10.0).reshape(2, 5) / 10, "b": np.ones(2)}
    np.savez("weights.npz", **weights)
    with np.load("labels.npz") as stored:
        np.savez("two.npz", X=stored["X"], y=stored["y"] % 2)
        loss = mf.PerExampleLoss(
            stored["X"], stored["y"] % 2, optax.softmax_cross_entropy_with_integer_labels,
            predict=lambda w, x: w["W"] @ x + w["b"],
        )  # fmt: skip
    _, table = said(capsys, "weights.npz", "--data", "two.npz", model="pair")
    close("loss", table["loss"], loss(jax.tree.map(jnp.asarray, weights)), 1e-4)


def test_a_loss_of_ones_own(capsys):
    with np.load("labels.npz") as stored:
        inputs, counts = stored["X"], stored["y"]
    outputs = np.asarray(jax.vmap(classifier(8, outputs=1, key=0))(inputs))[:, 0]
    expected = np.mean(np.exp(outputs) - counts * outputs)
    for task in ("regression", "classification"):
        own = ["--data", "labels.npz", "--loss", "trained_here:poisson", "--task", task]
        out, table = said(capsys, *own, model="number")
        close(f"loss of {task}", table["loss"], expected, 1e-4)
        assert "loss: trained_here:poisson" in out, out


def test_the_command_by_itself(tmp_path):
    """In a process of its own, where the module is found in the current folder."""
    as_eqx("net.eqx", classifier())
    words = command("net.eqx", "--data", "labels.npz", "--learning-rate", 100, "--batch-size", 4)
    code = "import sys; from manifoldflow.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # as the installed command: this folder is not looked in
        "PYTHONPATH": str(pathlib.Path(mf.__file__).parents[1]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, timeout=300, env=environment, encoding="utf-8",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for words in ("trace of G", "NOT STABLE", "of batches of 4", "layers[0].weight"):
        assert words in run.stdout, run.stdout
    assert "importing trained_here …" in run.stderr, run.stderr
    assert "compiling and measuring …" in run.stderr, run.stderr


# --- what is said of what does not fit ------------------------------------------------------

DATA = ["--data", "labels.npz"]
BAD_OPTIONS = {
    "no --data": ([], "classifier", ["a report needs --data", ".csv"]),
    "no file": (["none.eqx", *DATA], "classifier", ["none.eqx: there is no such file"]),
    "another suffix": (["net.pt", *DATA], "classifier", [".eqx", ".npz", "got net.pt"]),
    "no data": (["--data", "none.csv"], "classifier", ["there is no such file"]),
    "no function": (DATA, "builds", ["has no builds", "it has classifier, single, wide"]),
    "no name": (DATA, "", ["takes MODULE:FUNCTION", "train:build", "got trained_here:"]),
    "not callable": (DATA, "WEIGHTS", ["WEIGHTS must be a function; got a dict"]),
    "no model": (DATA, "weights", ["returned a dict", "a pair"]),
    "no weights": (DATA, "empty", ["without weights"]),
    "fails": (DATA, "wrong", ["fails: KeyError: 'depth' (trained_here.py, line"]),
    "arguments": (DATA, "fails", ["called without arguments", "TypeError"]),
    "a bug": (DATA, "Bug", ["fails: AttributeError", "undefined", "(trained_here.py, line"]),
    "inputs": (["--data", "labels.npz", "--drop", "1"], "classifier", ["fails on one example"]),
    "one output": (DATA, "number", ["an output for each class, of shape (3,)", "(1,)"]),
    "regression": (["--data", "arrays.npz"], "classifier", ["outputs of shape (3,)", "1 target"]),
    "no classes": (
        ["--data", "arrays.npz", "--loss", "cross-entropy"],
        "classifier",
        ["needs classes", "--loss squares"],
    ),
    "--loss": ([*DATA, "--loss", "hinge"], "classifier", ["squares, cross-entropy, or", "hinge"]),
    "--loss of another": ([*DATA, "--loss", "trained_here:no"], "classifier", ["has no no"]),
    "--loss that fails": (
        [*DATA, "--loss", "trained_here:bug"],
        "classifier",
        ["--loss trained_here:bug fails: AttributeError", "(trained_here.py, line"],
    ),
    "--loss of a vector": (
        [*DATA, "--loss", "trained_here:vector"],
        "classifier",
        ["--loss trained_here:vector", "one real number"],
    ),
    "--learning-rate": ([*DATA, "--learning-rate", "0"], "classifier", ["must be positive"]),
    "--seconds": ([*DATA, "--seconds", "-1"], "classifier", ["--seconds must be positive"]),
    "--batch-size": ([*DATA, "--batch-size", "0"], "classifier", ["--batch-size must be at least"]),
    "batches": ([*DATA, "--batch-size", "41"], "classifier", ["at most 40", "got 41"]),
    "--examples": ([*DATA, "--examples", "41"], "classifier", ["at most 40", "got 41"]),
    "--save": ([*DATA, "--save", "a.txt"], "classifier", ["--save must end in .png", "a.txt"]),
    "no folder": ([*DATA, "--save", "no/a.png"], "classifier", ["there is no folder no"]),
    "digits": (["--data", "digits", "--target", "y"], "classifier", ["digits come as they are"]),
    "many digits": (["--data", "digits", "--examples", "1001"], "classifier", ["between 1 and"]),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(capsys, name):
    options, model, words = BAD_OPTIONS[name]
    message = refusal(capsys, *options, model=model)
    for some in words:
        assert some in message, message


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("trained_here.py:classifier", "--model trained_here:classifier"),
        ("here/trained_here.py", "--model trained_here:FUNCTION"),
        ("trained_here", "takes MODULE:FUNCTION"),
        ("not_there_at_all:build", "there is no module not_there_at_all"),
        ("not_there_at_all.inner:build", "there is no module not_there_at_all"),
        ("broken:build", "SyntaxError"),
        ("asks:build", "No module named 'not_there_at_all' (asks.py, line 2)"),
        ("ends:build", "it ends the program"),
    ],
)
def test_modules_that_are_none(capsys, place, words):
    pathlib.Path("broken.py").write_text("def build(:\n", encoding="utf-8")
    pathlib.Path("asks.py").write_text("\nimport not_there_at_all\n", encoding="utf-8")
    pathlib.Path("ends.py").write_text("raise SystemExit(1)\n", encoding="utf-8")
    assert main(["report", *DATA, "--model", place]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_model_must_be_named(capsys):
    assert main(["report", *DATA]) == 2
    assert "a report needs --model MODULE:FUNCTION" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["net.eqx", "net.npz"])
def test_a_file_of_another_model(capsys, path):
    {".eqx": as_eqx, ".npz": as_npz_by_name}[path[-4:]](path, classifier())
    message = refusal(capsys, path, *DATA, model="wide")
    for words in (
        "net.",
        "trained_here:wide",
        "layers.0.weight is (4, 5) in the file and (6, 5) in the model",
        "layers.1.weight is (3, 4) in the file and (3, 6) in the model",
    ):
        assert words in message, message
    assert "layers.1.bias" not in message, "that one is the same"
    message = refusal(capsys, path, *DATA, model="deep")
    for words in ("4 arrays in the file", "(4, 5)", "6 in the model", "layers.2.weight (3, 4)"):
        assert words in message, message


def test_files_that_are_no_weights(capsys):
    np.savez("names.npz", a=np.ones((4, 5)), b=np.ones(4), c=np.ones((3, 4)), d=np.ones(3))
    message = refusal(capsys, "names.npz", *DATA)
    assert "layers.0.weight" in message and "got a, b, c, d" in message, message
    np.savez("kinds.npz", *(1j * leaf for leaf in jax.tree.leaves(_arrays(classifier()))))
    assert "complex128 in the file" in refusal(capsys, "kinds.npz", *DATA)
    as_eqx("nan.eqx", jax.tree.map(lambda x: x * np.nan if eqx.is_array(x) else x, classifier()))
    assert "layers.0.weight is not finite" in refusal(capsys, "nan.eqx", *DATA)
    np.savez("objects.npz", *np.array([{}], dtype=object))
    assert "Python objects" in refusal(capsys, "objects.npz", *DATA)
    for name in ("text.eqx", "text.npz"):
        pathlib.Path(name).write_text("no weights\nat all\n", encoding="utf-8")
        assert f"{name} is no {name[-4:]} file" in refusal(capsys, name, *DATA)
    as_eqx("whole.eqx", classifier())
    pathlib.Path("cut.eqx").write_bytes(pathlib.Path("whole.eqx").read_bytes()[:-20])
    assert "cut.eqx is damaged after 3 arrays" in refusal(capsys, "cut.eqx", *DATA)


def _arrays(model):
    return eqx.filter(model, eqx.is_array)


@pytest.mark.parametrize(
    ("shift", "words"), [(1, "Count them from 0"), (2, "choose other targets"), (-1, "-1 to 1")]
)
def test_labels_out_of_range(capsys, shift, words):
    with np.load("labels.npz") as stored:
        np.savez("shifted.npz", X=stored["X"], y=stored["y"] + shift)
    message = refusal(capsys, "--data", "shifted.npz")
    assert f"labels from {shift} to {2 + shift} are out of range for 3 outputs" in message, message
    assert words in message, message


def test_labels_that_are_no_whole_numbers(capsys):
    message = refusal(capsys, "--data", "arrays.npz", "--task", "classification")
    assert "labels must be whole numbers or texts" in message, message


def test_words_for_no_memory_and_for_a_stop(capsys, monkeypatch):
    def raises(error):
        def built(place):
            raise error

        monkeypatch.setattr("manifoldflow._command._report._built", built)

    raises(MemoryError())
    assert "Fewer --examples, or --float32" in refusal(capsys, *DATA)
    raises(KeyboardInterrupt())
    assert main(command(*DATA)) == 130
    assert "stopped; nothing is kept." in capsys.readouterr().err


def test_the_report_is_drawn(capsys, monkeypatch):
    drawn = []

    def draw(found):
        drawn.append(found["loss"].value)
        figure = Figure()
        figure.add_subplot()
        return figure

    monkeypatch.setattr(plotting, "plot_report", draw, raising=False)
    out, table = said(capsys, *DATA, "--save", "report.png")
    close("loss of what is drawn", drawn[0], table["loss"], 1e-4)
    assert "picture in report.png" in out, out
    assert pathlib.Path("report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table(capsys, monkeypatch):
    monkeypatch.delattr(mf, "plotting", raising=False)
    monkeypatch.setitem(sys.modules, "manifoldflow.plotting", None)
    out, table = said(capsys, *DATA, "--save", "report.png")
    assert "no picture: python -m pip install" in out and "loss" in table, out


def test_repeated_rows_count(capsys):
    """They were trained on: none is left out unless --examples asks for those of `walk`."""
    path = diabetes_like(pathlib.Path("twice.csv"))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n", encoding="utf-8")
    out, _ = said(capsys, "--data", path, "--task", "regression", model="number")
    assert f"{NUM_ROWS + 1} rows" in out and "left out, since" not in out, out
