"""A loss over examples in equal parts, so that one program of each kind serves for all of it."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow import _tree
from manifoldflow._types import Point
from manifoldflow.diagnostics._passes import Outputs, outputs_at, pulled, pushed, Vector
from manifoldflow.losses import AbstractExampleLoss

# The most and the fewest examples of a part, and the number that still makes a single part.
_MOST, _FEWEST, _WHOLE = 64, 32, 128


class Gradient(NamedTuple):
    """The loss and its gradient, over all examples.

    Attributes:
        loss: L.
        data_loss: L without the weight decay.
        norm: ‖∇L‖.
        of_data: ‖∇L‖² without the weight decay.
        seconds: that a part took.
    """

    loss: float
    data_loss: float
    norm: float
    of_data: float
    seconds: float


class Chunks:
    """The examples in random order, in parts of equal size and perhaps a rest."""

    def __init__(self, loss: AbstractExampleLoss, point: Point, random: np.random.Generator):
        self.loss, self.point = loss, point
        count = loss.num_examples
        without_rest = (size for size in range(_MOST, _FEWEST - 1, -1) if count % size == 0)
        self.size = count if count <= _WHOLE else next(without_rest, _MOST)
        self.number = count // self.size
        # Files are often sorted by class: a part in their order would be no sample of them.
        self._order = random.permutation(count)

    def __getitem__(self, index: int) -> AbstractExampleLoss:
        if self.number == 1 and self.size == len(self._order):
            return self.loss
        return self.loss.select(self._order[index * self.size : (index + 1) * self.size])

    def words_for(self, number: int) -> str:
        """The words " on … of … examples" for some parts; "" for all."""
        some, count = number * self.size, len(self._order)
        return "" if some == count else f" on {some} of {count} examples"

    def all(self) -> Iterator[tuple[AbstractExampleLoss, float]]:
        """Every part, the rest as well, with its share of the examples."""
        for start in range(0, len(self._order), self.size):
            share = min(self.size, len(self._order) - start) / len(self._order)
            yield self[start // self.size], share

    def gradient(self) -> Gradient:
        def of_part(part: AbstractExampleLoss) -> tuple[Outputs, Vector]:
            outputs = outputs_at(part, self.point)
            return jax.block_until_ready((outputs, pulled(part, self.point, outputs.slopes)))

        of_part(self[0])  # compiled
        began = time.perf_counter()
        value = data_loss = 0.0
        gradient = 0.0
        for part, share in self.all():
            outputs, of_this = of_part(part)
            value, data_loss = value + share * outputs.loss, data_loss + share * outputs.data_loss
            gradient = gradient + share * of_this
        seconds = (time.perf_counter() - began) * self.size / len(self._order)
        of_data = float(jnp.linalg.norm(gradient))
        if self.loss.weight_decay is not None:
            flat, _ = _tree.ravel(self.loss.split(self.point)[0])
            gradient = gradient + self.loss.weight_decay.astype(flat.dtype) * flat
        norm = float(jnp.linalg.norm(gradient))
        return Gradient(float(value), float(data_loss), norm, of_data**2, seconds)


class GaussNewton:
    """Products with G of the first parts."""

    def __init__(self, chunks: Chunks, number: int):
        self.point, self.parts = chunks.point, [chunks[i] for i in range(number)]
        self.roots = [outputs_at(part, self.point).roots for part in self.parts]

    def __call__(self, vector: Vector) -> Vector:
        image = jnp.zeros_like(vector)
        for part, roots in zip(self.parts, self.roots, strict=True):
            image = image + pulled(part, self.point, pushed(part, self.point, roots, vector))
        return image / len(self.parts)
