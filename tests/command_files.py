"""Files as people have them, in small: what the command line is tried on."""

import pathlib

import numpy as np

# All of one shape, so that the commands on them run the same compiled programs.
NUM_ROWS, NUM_INPUTS = 40, 5
SMALL = ["--examples", "8", "--width", "10", "--end-time", "2", "--saves", "3"]


def measured(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Columns of very different scales and offsets, and what depends on them."""
    plain = np.random.default_rng(seed).normal(size=(NUM_ROWS, NUM_INPUTS))
    scales = 10.0 ** np.arange(-3, NUM_INPUTS - 3) * 7
    return 30 * scales + scales * plain, plain[:, 0] - np.sin(plain[:, 1])


def diabetes_like(path: pathlib.Path) -> pathlib.Path:
    """Whole numbers from 25 to 346 as targets, and a header."""
    inputs, signal = measured()
    targets = np.rint(25 + 321 * (signal - signal.min()) / np.ptp(signal))
    table = np.column_stack([inputs, targets])
    header = "age,bmi,bp,s1,s2,progression"
    np.savetxt(path, table, delimiter=",", header=header, comments="", fmt="%.12g")
    return path


def wine_like(path: pathlib.Path) -> pathlib.Path:
    """Three classes as numbers, columns of very different scales, semicolons, no header."""
    inputs, signal = measured(1)
    classes = np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3]))
    np.savetxt(path, np.column_stack([inputs, classes]), delimiter=";", fmt="%.12g")
    return path


def iris_like(path: pathlib.Path, row_numbers: bool = False) -> pathlib.Path:
    """Three classes as texts, a header, perhaps row numbers as pandas writes them."""
    inputs, signal = measured(2)
    classes = np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3]))
    names = np.array(["setosa", "versicolor", "virginica"])[classes]
    lines = ["sepal length,sepal width,petal length,petal width,area,species"]
    lines += [",".join([*map(str, row), name]) for row, name in zip(inputs.tolist(), names)]
    if row_numbers:
        lines = [f"{'' if i == 0 else i - 1},{line}" for i, line in enumerate(lines)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arrays(path: pathlib.Path, first: str = "X", second: str = "y") -> pathlib.Path:
    """Real targets under names of one's own."""
    inputs, signal = measured(3)
    np.savez(path, **{first: inputs, second: signal})
    return path


def rows_of(out: str) -> list[list[str]]:
    """The cells of the table that a command has printed; the bar is the first."""
    return [line.split() for line in out.splitlines() if line.startswith("[")]
