"""Linear relations between the shares of slices: candidates for rescalings."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from manifoldflow.symmetry._paths import Leaf
from manifoldflow.symmetry._shares import Shares, Slices
from manifoldflow.symmetry._views import View


class Relation(NamedTuple):
    """Slices that grow, and slices that shrink `degree` times as fast, number by number."""

    first: tuple[Slices, ...]
    second: tuple[Slices, ...]
    degree: float
    length: int


def relations(shares: Shares, shapes: list[tuple[int, ...]], tolerance: float) -> list[Relation]:
    """All relations between slices of equal length, in the order of the leaves that grow.

    Args:
        shares: along every axis.
        shapes: of the leaves.
        tolerance: a relation may fail by this share of its terms.
    """
    by_length: dict[int, list[Slices]] = defaultdict(list)
    for one in shares.of:
        by_length[one.view.length(shapes[one.leaf])].append(one)
    found = []
    for length, whole in by_length.items():
        if length == 1:
            continue  # kernels of one pixel have such axes; layers of one neuron are found whole
        columns = _columns(length, whole, shares, tolerance)
        vectors = _dependences(np.array([c for _, c in columns]), tolerance) if columns else []
        for vector in vectors:
            members = {columns[i][0]: weight for i, weight in vector.items()}
            relation = _two_valued(members, shapes, length, tolerance)
            # Parts of axes are looked at beside a whole one only.
            if relation and set(relation.first + relation.second) & set(whole):
                found.append(relation)
    # Heads, what is in them, and both together are one relation, by one, two and many numbers.
    longest: dict[tuple, Relation] = {}
    for relation in sorted(found, key=lambda r: r.length):
        longest[tuple(tuple(s.leaf for s in side) for side in relation[:2])] = relation
    return sorted(longest.values(), key=lambda r: [s.leaf for s in r.first])


def _columns(
    length: int, whole: list[Slices], shares: Shares, tolerance: float
) -> list[tuple[Slices, np.ndarray]]:
    """The shares of slices of one length, whole axes before parts of longer ones."""
    columns = [(one, shares.of[one].ravel()) for one in whole]
    for one, values in shares.of.items():
        many, rest = divmod(values.shape[1], length)
        if rest or many == 1 or len(one.view.axes) > 1:
            continue
        for view in (View(one.view.axes, after=many), View(one.view.axes, before=many)):
            part = Slices(one.leaf, view)
            columns.append((part, along(shares, part).ravel()))
    # What has no share on its own is scale invariant, or dead.
    rows = len(shares.totals)
    least = lambda one: tolerance * shares.sizes[one.leaf] * np.sqrt(rows)
    is_live = lambda one, values: np.linalg.norm(values) > max(least(one), 0)
    return [(one, v) for one, v in columns if np.isfinite(v).all() and is_live(one, v)]


def _dependences(
    columns: Float[np.ndarray, "columns rows"], tolerance: float
) -> list[dict[int, float]]:
    """The dependences Σ weight·column = 0, one for every column that those before it span."""
    basis: list[np.ndarray] = []
    kept: list[int] = []
    found = []
    for index, column in enumerate(columns):
        size = np.linalg.norm(column)
        rest = column / size
        for _ in range(2):  # once is not enough in floating point
            for vector in basis:
                rest = rest - (vector @ rest) * vector
        if np.linalg.norm(rest) > tolerance:
            basis.append(rest / np.linalg.norm(rest))
            kept.append(index)
            continue
        scales = np.linalg.norm(columns[kept], axis=1)
        weights = np.linalg.lstsq((columns[kept].T / scales), column / size, rcond=None)[0]
        # Weights of rounding would add slices that have nothing to do with the relation.
        small = 10 * tolerance * np.max(np.abs(weights), initial=0)
        vector = {i: w * size / s for i, w, s in zip(kept, weights, scales) if abs(w) > small}
        found.append({**vector, index: -1.0})
    return found


def _two_valued(
    weights: dict[Slices, float],
    shapes: list[tuple[int, ...]],
    length: int,
    tolerance: float,
) -> Relation | None:
    """A relation x₁ + … = p(y₁ + …), or None where weights have more than two values."""
    up = {s: w for s, w in weights.items() if w > 0}
    down = {s: -w for s, w in weights.items() if w < 0}
    if not up or not down:
        return None
    sides = []
    for side in (up, down):
        values = np.array(list(side.values()))
        if np.ptp(values) > 10 * tolerance * values.max():
            return None
        sides.append((tuple(sorted(side, key=lambda s: s.leaf)), float(values.mean())))
    # A bias grows with what is before the activation; else what comes first in the tree.
    has_bias = lambda side: len(side[0]) > 1 and any(len(shapes[s.leaf]) == 1 for s in side[0])
    sides.sort(key=lambda side: (not has_bias(side), side[0][0].leaf))
    (first, a), (second, b) = sides
    degree = b / a
    if degree < 0.75 and not has_bias(sides[0]):
        first, second, degree = second, first, 1 / degree
    nearest = float(np.rint(degree))
    degree = nearest if abs(degree - nearest) <= 10 * tolerance else degree
    return Relation(first, second, degree, length)


def total_relations(
    shares: Shares, leaves: Sequence[Leaf], grown: Collection[int], tolerance: float
) -> Iterator[list[Relation]]:
    """The later layers that each layer may be rescaled against, for layers not known to grow yet.

    By totals alone: each is one number for an example, so that proportions hold by chance more
    often, and what is proposed must be checked.
    """
    layers: dict[str, list[int]] = defaultdict(list)
    for number, leaf in enumerate(leaves):
        layers[leaf.layer].append(number)
    is_map = lambda numbers: any(len(leaves[i].shape) > 1 for i in numbers)
    several = [numbers for numbers in layers.values() if is_map(numbers)]
    for index, numbers in enumerate(several):
        if set(numbers) & set(grown):
            continue
        proposed = []
        for later in several[index + 1 :]:
            main = [i for i in later if len(leaves[i].shape) > 1]
            for second in (main, later)[: 1 + (len(later) > len(main))]:
                x, y = (shares.totals[:, part].sum(axis=1) for part in (numbers, second))
                degree = _degree(x, y, shares.sizes[numbers].sum(), tolerance)
                if degree is not None:
                    whole = lambda part: tuple(Slices(i, View(())) for i in part)
                    proposed.append(Relation(whole(numbers), whole(second), degree, 1))
        yield proposed


def _degree(x: np.ndarray, y: np.ndarray, size: float, tolerance: float) -> float | None:
    """The degree p > 0 with x = p·y, a small integer if it is one to rounding."""
    if not np.isfinite([x, y]).all() or not np.max(np.abs(x)) > tolerance * size:
        return None
    if not np.max(np.abs(y)) > 0:
        return None
    degree = float(x @ y / (y @ y))
    nearest = float(np.rint(degree))
    degree = nearest if abs(degree - nearest) <= tolerance else degree
    largest = np.max(np.abs(x)) + abs(degree) * np.max(np.abs(y))
    return degree if degree > 0 and np.max(np.abs(x - degree * y)) <= tolerance * largest else None


def along(shares: Shares, one: Slices) -> Float[np.ndarray, "rows n"]:
    """The shares of slices, also of parts of an axis."""
    if not one.view.axes:
        return shares.totals[:, [one.leaf]]
    whole = shares.of[Slices(one.leaf, View(one.view.axes))]
    before, after = one.view.before, one.view.after
    return whole.reshape(len(whole), before, -1, after).sum(axis=(1, 3))
