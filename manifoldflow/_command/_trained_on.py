"""The data that a network was trained on, for a report on it."""

import argparse
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from manifoldflow import models
from manifoldflow._command._examples import Examples, some
from manifoldflow._command._problem import (
    are_images,
    asked,
    DIGITS,
    distinct,
    in_units,
    numbers_of,
)


class TrainedOn(NamedTuple):
    """Examples in the order of the file.

    Attributes:
        inputs: (N, …), each in the shape in which it came.
        targets: labels (N,), whole numbers, or numbers (N, k).
        is_classes: True if they are labels.
    """

    inputs: Array
    targets: Array
    is_classes: bool


def trained_on(options: argparse.Namespace) -> TrainedOn:
    """The examples that were asked for; says what was made of them.

    Whole numbers are taken for labels as they are, since they count the outputs of the network.

    Raises:
        ValueError: files and options that do not fit, in one sentence.
    """
    if are_images(options):
        return _digits(options)
    examples, is_classes, why = asked(options)
    encoded = _labels if is_classes else numbers_of
    targets, what = encoded(options.data, examples.targets)
    print(f"{options.data}: {len(targets)} rows, {len(examples.columns)} inputs; {what}, {why}")
    parts = _chosen(options, examples.inputs), np.arange(0)
    (inputs, targets), *_ = in_units(options, examples, targets, is_classes, parts)
    return TrainedOn(_shaped(inputs, examples), targets, is_classes)


def _digits(options: argparse.Namespace) -> TrainedOn:
    if options.target is not None or options.drop:
        raise ValueError("--target and --drop are for files; digits come as they are.")
    count = DIGITS if options.examples is None else options.examples
    if count > DIGITS:
        raise ValueError(f"--examples must be between 1 and {DIGITS} for digits; got {count}.")
    images, labels = models.digits(count, seed=options.seed)
    print(f"digits: {count} images of 8×8 pixels from 0 to 1; labels from 0 to 9")
    return TrainedOn(images, jnp.argmax(labels, axis=1), True)


def _labels(place: str, targets: np.ndarray) -> tuple[np.ndarray, str]:
    """Labels (N,), and their kind."""
    if targets.ndim == 2:
        return np.argmax(targets, axis=1), f"one-hot labels of {targets.shape[1]} classes"
    if targets.dtype.kind in "US":
        classes, labels = np.unique(targets, return_inverse=True)
        return labels, f"{len(classes)} classes in the order {some(classes.tolist())}"
    if np.any(targets != np.round(targets)):
        raise ValueError(
            f"{place}: labels must be whole numbers or texts; got {targets[0]:g}. Use --task "
            "regression, or choose another column with --target."
        )
    labels = targets.astype(int)
    return labels, f"labels from {labels.min()} to {labels.max()}"


def _chosen(options: argparse.Namespace, inputs: np.ndarray) -> np.ndarray:
    """All rows, or those that `walk` trains on."""
    if options.examples is None:
        return np.arange(len(inputs))
    order = distinct(options, inputs)
    if options.examples > len(order):
        raise ValueError(
            f"--examples must be at most {len(order)}, the examples in {options.data}; got "
            f"{options.examples}."
        )
    return order[: options.examples]


def _shaped(inputs: Array, examples: Examples) -> Array:
    """The inputs in their original shape, if all their numbers are still there."""
    shape = examples.shape or (inputs.shape[1],)
    return inputs.reshape(-1, *shape) if np.prod(shape) == inputs.shape[1] else inputs
