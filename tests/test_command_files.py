"""Files as people have them: what is read and guessed, what is said of wrong ones."""

import numpy as np
import pytest

from checks import at_most, close, equal, refused
from command_files import arrays, diabetes_like, iris_like, measured, NUM_ROWS, wine_like
from manifoldflow._command._arguments import parsed
from manifoldflow._command._problem import guessed, problem_of, read


@pytest.mark.quick
def test_tables(tmp_path):
    rng = np.random.default_rng(0)
    inputs, classes = rng.normal(size=(30, 5)), rng.integers(0, 3, 30)
    path = tmp_path / "data.csv"
    for header in ("", "a,b,c,d,e,y"):
        table = np.column_stack([inputs, classes])
        np.savetxt(path, table, delimiter=",", header=header, comments="")
        got = read(str(path))
        assert np.array_equal(got.inputs, inputs), f"header {header!r}: inputs differ"
        assert np.array_equal(got.targets, classes), f"header {header!r}: targets differ"
        assert guessed(got.targets)[0], "few whole numbers are classes"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_byte_order_marks(tmp_path, separator):
    path = tmp_path / "data.csv"
    lines = ["a", "b", "y"], ["1", "2.5", "3"], ["4", "-5e3", "6"]
    text = "\ufeff" + "\n".join(separator.join(line) for line in lines) + "\n\n"
    path.write_text(text, encoding="utf-8")
    got = read(str(path))
    equal("inputs", got.inputs.tolist(), [[1, 2.5], [4, -5000]])
    equal("targets", got.targets.tolist(), [3, 6])
    equal("columns", got.columns, ["1, 'a'", "2, 'b'"])


def test_another_target_and_fewer_columns(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('id,a,"b, in m",y\n7,1,2,3\n8,4,5,6\n', encoding="utf-8")
    got = read(str(path), "b, in m", ["id"])
    equal("inputs", got.inputs.tolist(), [[1, 3], [4, 6]])
    equal("targets", got.targets.tolist(), [2, 5])
    equal("by number", read(str(path), "2").targets.tolist(), [1, 4])


def test_row_numbers_are_no_input(tmp_path, capsys):
    got = read(str(iris_like(tmp_path / "iris.csv", row_numbers=True)))
    plain = read(str(iris_like(tmp_path / "plain.csv")))
    assert np.array_equal(got.inputs, plain.inputs)
    assert "numbers the rows and is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [("inputs", "targets"), ("X", "y"), ("x", "y"), ("data", "target"), ("features", "labels")],
)
def test_names_of_arrays(tmp_path, names):
    got = read(str(arrays(tmp_path / "data.npz", *names)))
    equal("inputs", bool(np.all(got.inputs == measured(3)[0])), True)
    equal("targets", bool(np.all(got.targets == measured(3)[1])), True)


def test_images_and_labels_of_any_name(tmp_path):
    images, labels = np.arange(24.0).reshape(3, 2, 4), np.array(["cat", "dog", "cat"])
    np.savez(tmp_path / "data.npz", pictures=images, kinds=labels)
    got = read(str(tmp_path / "data.npz"), "kinds")
    equal("inputs", got.inputs.shape, (3, 8))
    equal("targets", got.targets.tolist(), labels.tolist())


def whole(num_rows, num_values):
    return np.arange(num_rows) % num_values


@pytest.mark.quick
@pytest.mark.parametrize(
    ("targets", "is_classes"),
    [
        (np.random.default_rng(0).integers(25, 347, 442).astype(float), False),
        (whole(178, 3), True),
        (whole(1797, 10).astype(float), True),
        (whole(1000, 50), False),
        (whole(12, 2), True),
        (whole(12, 4), False),
        (np.array(["a", "b"] * 9), True),
        (np.linspace(0, 1, 40), False),
        (np.arange(40) % 3 / 2, False),
        (np.eye(3)[whole(30, 3)], True),
        (np.ones((30, 3)), False),
        (np.where(np.arange(12) > 5, 1, -1), True),
        (np.arange(12) > 5, True),
    ],
    ids=[
        "214 whole numbers in 442 rows", "3 in 178", "10 in 1797", "50 in 1000", "2 in 12",
        "4 in 12", "texts", "reals", "few reals", "one-hot", "several numbers", "signs", "truth",
    ],
)  # fmt: skip
def test_classes_are_guessed(targets, is_classes):
    guess, why = guessed(targets)
    equal(f"{why}: classes", guess, is_classes)


def problem(*arguments):
    return problem_of(parsed(["walk", *map(str, arguments)]))


def test_units_are_those_of_the_training_examples(tmp_path, capsys):
    path = diabetes_like(tmp_path / "data.csv")
    got = problem("--data", path, "--examples", 15)
    for name, values in zip(("inputs", "targets"), got.train):
        at_most(f"means of {name}", np.abs(np.mean(values, axis=0)).max(), 1e-9)
        close(f"deviations of {name}", np.std(values, axis=0), np.ones(values.shape[1]), 1e-9)
    equal("test examples", len(got.test[0]), NUM_ROWS - 15)
    assert abs(float(np.mean(got.test[1]))) > 1e-3, "the test does not set the units"
    out = capsys.readouterr().out
    assert "regression of 1 number, since the targets take" in out, out
    assert "inputs and targets standardised" in out, out
    plain = problem("--data", path, "--examples", 15, "--no-standardise")
    equal("as they are", set(np.ravel(plain.train[1])) <= set(read(str(path)).targets), True)
    ratio = np.ptp(plain.train[0], axis=0) / np.std(plain.train[0], axis=0)
    close("the same rows", np.ptp(got.train[0], axis=0), ratio, 1e-9)


def test_classes_keep_their_units(tmp_path):
    got = problem("--data", wine_like(tmp_path / "wine.csv"))
    equal("examples, four fifths of all", len(got.train[0]), 4 * NUM_ROWS // 5)
    equal("one-hot targets", set(np.ravel(got.train[1]).tolist()), {0.0, 1.0})
    equal("measure", got.measure, "test accuracy")
    as_numbers = problem("--data", wine_like(tmp_path / "wine.csv"), "--task", "regression")
    equal("targets asked to be numbers", as_numbers.train[1].shape[1], 1)


def test_repeated_and_constant_are_left_out(tmp_path, capsys):
    inputs, signal = measured(3)
    inputs = np.column_stack([inputs, np.full(NUM_ROWS, 4.0)])
    inputs[7], inputs[9] = inputs[3], inputs[3]
    np.savez(tmp_path / "data.npz", X=inputs, y=signal)
    got = problem("--data", tmp_path / "data.npz")
    equal("inputs that differ", got.train[0].shape[1], 5)
    equal("rows that differ", len(got.train[0]) + len(got.test[0]), NUM_ROWS - 2)
    out = capsys.readouterr().out
    assert "with the same inputs as another row: 2" in out, out
    assert "constant on the training examples: column 6" in out, out


TEXT = "a,colour,y\n1,red,0.5\n2,blue,0.7\n"
WRONG_FILES = {
    "text.csv": (TEXT, [], "column 2, 'colour' holds text, 'red' in line 2", "--drop 'colour'"),
    "gap.csv": ("a,b\n1,2\n,3\n", [], "column 1, 'a' has no finite number in line 3", "--drop"),
    "inf.csv": ("1,2\ninf,3\n", [], "column 1 has no finite number in line 2", "Fill or delete"),
    "short.csv": ("a,b,y\n1,2,3\n4,5\n", [], "line 3: 2 cells, where 3 are due", ""),
    "empty.csv": ("", [], "has no rows of numbers", ""),
    "one.csv": ("y\n1\n2\n", [], "needs at least two columns", "got y"),
    "mixed.csv": ("a,y\n1,2\n2,3\n3,x\n", [], "the target, column 2, 'y', is 'x' in line 4", ""),
    "hole.csv": ("a,y\n1,2\n2,\n", [], "the target, column 2, 'y', is '' in line 3", "--target"),
    "names.csv": ("a,b\n1,2\n", ["--target", "c"], "--target c", "it has a, b"),
    "drops.csv": ("a,b\n1,2\n", ["--drop", "c"], "--drop c", "it has a, b"),
    "both.csv": ("a,b\n1,2\n", ["--drop", "b"], "leaves out the target", "choose another"),
    "same.csv": ("a,b\n1,x\n2,x\n", [], "all targets are x", "--target"),
    "words.csv": ("a,b\n1,x\n2,z\n", ["--task", "regression"], "needs numbers", "Leave --task"),
    "two.csv": ("a,b\n1,2\n3,4\n", ["--examples", "2"], "--examples must leave some", "at most 1"),
    "flat.csv": ("a,b\n1,2\n1,4\n2,5\n", ["--examples", "1"], "no input differs", "--examples"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_tables(tmp_path, name):
    text, options, *words = WRONG_FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with refused(ValueError, *words):
        problem("--data", tmp_path / name, *options)


WRONG_ARRAYS = {
    "names": ({"a": [[1.0]], "b": [1.0]}, "X and y", "it has a, b"),
    "lengths": ({"X": [[1.0], [2.0]], "y": [1.0]}, "2 rows in X, but 1 in y", ""),
    "gaps": ({"X": [[1.0, 2.0], [3.0, np.nan]], "y": [1.0, 2.0]}, "row (and column) 2, 2", "X"),
    "texts": ({"X": [["a"], ["b"]], "y": [1.0, 2.0]}, "X must be real numbers", ""),
    "objects": ({"X": np.array([{}, {}]), "y": [1.0, 2.0]}, "Python objects", "save again"),
    "scalars": ({"X": 3.0, "y": [1.0, 2.0]}, "X is one number", ""),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays(tmp_path, name):
    contents, *words = WRONG_ARRAYS[name]
    np.savez(tmp_path / "data.npz", **contents)
    with refused(ValueError, *words):
        problem("--data", tmp_path / "data.npz")


def test_files_that_are_none(tmp_path):
    (tmp_path / "data.npz").write_text("no archive", encoding="utf-8")
    with refused(ValueError, "npz"):
        problem("--data", tmp_path / "data.npz")
    (tmp_path / "data.csv").write_bytes(b"a,b\n\xff\xfe,2\n")
    with refused(ValueError, "UTF-8"):
        problem("--data", tmp_path / "data.csv")
    with refused(ValueError, "there is no such file"):
        problem("--data", tmp_path / "missing.csv")
