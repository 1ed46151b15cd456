"""The command `report`: a network of a user's own, its weights in a file, its data in another."""

import os
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import manifoldflow as mf
from checks import close, equal
from command_files import diabetes_like, measured, NUM_ROWS
from command_models import (
    as_eqx,
    as_npz_by_name,
    classifier,
    command,
    DATA,
    folder,
    labels_loss,
    said,
)
from manifoldflow import plotting
from manifoldflow.__main__ import main


@pytest.fixture(autouse=True)
def users_folder(monkeypatch, tmp_path):
    yield from folder(monkeypatch, tmp_path)


def as_eqx_with_hyperparameters(path, model):
    with open(path, "wb") as file:
        file.write(b'{"width": 4}\n')
        eqx.tree_serialise_leaves(file, model)


def as_eqx_of_parameters(path, model):
    eqx.tree_serialise_leaves(path, eqx.filter(model, eqx.is_inexact_array))


def as_npz_in_order(path, model):
    np.savez(path, *jax.tree.leaves(eqx.filter(model, eqx.is_array)))


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
    for words in ("trace of G", "not stable", "of batches of 4", "layers[0].weight"):
        assert words in run.stdout, run.stdout
    assert "importing trained_here …" in run.stderr, run.stderr
    assert "compiling and measuring …" in run.stderr, run.stderr


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
