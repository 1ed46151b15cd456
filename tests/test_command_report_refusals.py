"""The command `report`: what does not fit is said in one sentence."""

import pathlib

import equinox as eqx
import jax
import numpy as np
import pytest

from command_models import as_eqx, as_npz_by_name, classifier, command, DATA, folder, refusal
from manifoldflow.__main__ import main


@pytest.fixture(autouse=True)
def users_folder(monkeypatch, tmp_path):
    yield from folder(monkeypatch, tmp_path)


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
