"""Examples to train on and to test with, their kind, and their units."""

import argparse
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from manifoldflow import models
from manifoldflow._command._builtin import BUILTIN, builtin
from manifoldflow._command._csv import read_csv
from manifoldflow._command._examples import Examples, some
from manifoldflow._command._npz import read_npz

MAX_CLASSES = 20  # of whole numbers that are taken for classes unasked
ROWS_PER_CLASS = 5
MAX_TEST = 10_000
DIGITS = 1000  # training images among them


class Problem(NamedTuple):
    """A problem to fit, and the measures of its solution.

    Attributes:
        train: inputs (N, d) and targets (N, k).
        test: the same of other examples.
        is_classes: True if targets are one-hot.
        measure: the name of the test's measure, for tables and axes.
    """

    train: tuple[Array, Array]
    test: tuple[Array, Array]
    is_classes: bool
    measure: str


def problem_of(options: argparse.Namespace) -> Problem:
    """The examples that were asked for; says what was made of them.

    Raises:
        ValueError: files and options that do not fit, in one sentence.
    """
    if are_images(options):
        return _digits(options)
    examples, is_classes, why = asked(options)
    targets, what = _encoded(options.data, examples.targets, is_classes)
    print(f"{options.data}: {len(targets)} rows, {len(examples.columns)} inputs; {what}, {why}")
    chosen, rest = _split(options, distinct(options, examples.inputs))
    return in_units(options, examples, targets, is_classes, (chosen, rest))


def are_images(options: argparse.Namespace) -> bool:
    """Digits as classes are those of `models.digits`."""
    return options.data == "digits" and options.task != "regression"


def asked(options: argparse.Namespace) -> tuple[Examples, bool, str]:
    """All examples of a file; whether the targets are classes, and why."""
    examples = read(options.data, options.target, options.drop)
    is_classes, why = guessed(examples.targets)
    if options.task:
        is_classes, why = options.task == "classification", f"as --task {options.task} says"
    return examples, is_classes, why


def read(place: str, target: str | None = None, dropped: list[str] | None = None) -> Examples:
    """The examples of a file, or of a name."""
    path, dropped = pathlib.Path(place), dropped or []
    suffix = path.suffix.lower()
    if place in BUILTIN:
        if target is not None or dropped:
            raise ValueError(f"--target and --drop are for files; {place} comes as it is.")
        return builtin(place)
    if suffix not in (".npz", ".csv", ".tsv"):
        raise ValueError(f"--data takes a .npz or a .csv file, or {some([*BUILTIN])}; got {place}.")
    if not path.is_file():
        raise ValueError(f"--data {place}: there is no such file.")
    return (read_npz if suffix == ".npz" else read_csv)(path, target, dropped)


def guessed(targets: np.ndarray) -> tuple[bool, str]:
    """True where the targets look like classes, and the reason; few distinct whole numbers do."""
    if targets.dtype.kind in "US":
        return True, "since the targets are texts"
    if targets.ndim == 2:
        is_one_hot = np.isin(targets, (0, 1)).all() and (targets.sum(axis=1) == 1).all()
        return bool(is_one_hot), "by the look of the targets (--task can say otherwise)"
    num_distinct, whole = len(np.unique(targets)), bool(np.all(targets == np.round(targets)))
    is_few = num_distinct <= MAX_CLASSES and len(targets) >= ROWS_PER_CLASS * num_distinct
    if whole and (num_distinct <= 2 or is_few):
        return True, "since the targets are few whole numbers (--task regression: numbers)"
    if not whole:
        return False, "since the targets are no whole numbers"
    return False, f"since the targets take {num_distinct} values (--task classification: classes)"


def _encoded(place: str, targets: np.ndarray, is_classes: bool) -> tuple[np.ndarray, str]:
    """Targets (N, k), and their kind."""
    if not is_classes:
        return numbers_of(place, targets)
    if targets.ndim == 2:
        targets = np.argmax(targets, axis=1)
    classes, indices = np.unique(targets, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"{place}: all targets are {classes[0]}; there is nothing to tell apart. Choose "
            "another column with --target."
        )
    names = [f"{name:g}" if np.isreal(name) else str(name) for name in classes.tolist()]
    return np.eye(len(classes))[indices], f"{len(classes)} classes ({some(names)})"


def numbers_of(place: str, targets: np.ndarray) -> tuple[np.ndarray, str]:
    """Targets (N, k) of a regression, and their kind."""
    if targets.dtype.kind in "US":
        raise ValueError(
            f"{place}: --task regression needs numbers as targets; got texts such as "
            f"{str(targets[0])!r}. Leave --task out, or choose another column with --target."
        )
    targets = targets.reshape(len(targets), -1)
    return targets, f"regression of {targets.shape[1]} number" + "s" * (targets.shape[1] > 1)


def distinct(options: argparse.Namespace, inputs: np.ndarray) -> np.ndarray:
    """The rows in random order, without those that repeat the inputs of another one.

    No network fits two targets at the same inputs, and a row that is there twice could be
    trained on and tested with.
    """
    order = np.random.default_rng(options.seed).permutation(len(inputs))
    _, first = np.unique(inputs[order], axis=0, return_index=True)
    if len(first) < len(order):
        print(f"left out, since with the same inputs as another row: {len(order) - len(first)}")
    return order[np.sort(first)]


def _split(options: argparse.Namespace, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = options.examples
    if count is None:
        count = max(1, min(50, 4 * len(order) // 5))
    if count >= len(order):
        raise ValueError(
            f"--examples must leave some of the {len(order)} examples in {options.data} for "
            f"testing; got {count}. Use at most {len(order) - 1}."
        )
    return order[:count], order[count:][:MAX_TEST]


def in_units(
    options: argparse.Namespace,
    examples: Examples,
    targets: np.ndarray,
    is_classes: bool,
    parts: tuple[np.ndarray, np.ndarray],
) -> Problem:
    """The problem with means 0 and deviations 1 on the training examples, unless asked not to."""
    inputs, chosen = examples.inputs, parts[0]
    measure = "test accuracy" if is_classes else "test error"
    if not options.no_standardise:
        moves = np.ptp(inputs[chosen], axis=0) > 0
        if not moves.any():
            raise ValueError(
                f"{options.data}: no input differs among the {len(chosen)} training examples; use "
                "more --examples, or look at the columns."
            )
        inputs = _standardised(inputs[:, moves], chosen)
        what = "inputs"
        if not is_classes:
            targets, what = _standardised(targets, chosen), "inputs and targets"
        print(
            f"{what} standardised by the training examples (--no-standardise: as they are)"
            + ("" if is_classes else "; a test error of 1 is that of guessing their mean")
        )
        constant = [name for name, does in zip(examples.columns, moves) if not does]
        if constant:
            print(f"left out, since constant on the training examples: column {some(constant)}")
    pairs = [(jnp.asarray(inputs[part]), jnp.asarray(targets[part])) for part in parts]
    return Problem(pairs[0], pairs[1], is_classes, measure)


def _standardised(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    spread = np.std(values[chosen], axis=0)
    return (values - np.mean(values[chosen], axis=0)) / np.where(spread > 0, spread, 1)


def _digits(options: argparse.Namespace) -> Problem:
    count = 50 if options.examples is None else options.examples
    if count > DIGITS:
        raise ValueError(f"--examples must be between 1 and {DIGITS} for digits; got {count}.")
    if options.target is not None or options.drop:
        raise ValueError("--target and --drop are for files; digits come as they are.")
    train = models.digits(count, seed=options.seed)
    print("digits: 8×8 pixels from 0 to 1, taken as they are; 10 classes")
    test = models.digits(test=True, seed=options.seed)
    return Problem(train, test, True, "test accuracy")
