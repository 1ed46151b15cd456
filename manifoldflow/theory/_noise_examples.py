"""Where SGD holds deep linear networks on examples, whatever their weights and residuals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key
from manifoldflow.theory._arguments import matrix
from manifoldflow.theory._noise_balance import layers_of
from manifoldflow.theory._noise_equilibrium import frames, Weights

_ROUNDING = 1e-10
_MAX_SWEEPS = 20_000


class _Batches(NamedTuple):
    """Examples, and E over batches of the gradient's square as ``share E[g g'] + (1 - share) E[g]
    E[g]'`` over examples."""

    inputs: np.ndarray
    targets: np.ndarray
    share: float


@checked
def deep_linear_sides_of_examples(
    weights: Sequence[Num[ArrayLike, "..."]],
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    batch_size: int | None = 1,
    replacement: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At any weights, for every hidden layer the two matrices that are equal in equilibrium.

    With residuals ``r = W_D ... W_1 x - y``, with ``h = W_{i-1} ... W_1 x`` that enters layer i and
    ``b = (W_D ... W_{i+2})' r`` that comes back to layer i + 1, for batches of one

        ``W_i E[|b|^2 h h'] W_i'`` and ``W_{i+1}' E[|h|^2 b b'] W_{i+1}``:

    a quarter of E[g'g] of the gradient by W_{i+1} and of E[g g'] of that by W_i, for larger
    batches with g of a batch. A step of SGD on the mean of |r|^2 changes
    ``W_{i+1}' W_{i+1} - W_i W_i'`` by 4 eta^2 times their difference in the mean, exactly.

    Args:
        weights: (W_1, ..., W_D), D >= 2.
        inputs: x, shape (N, d_x).
        targets: y, shape (N, d_y).
        batch_size: S; None for all N, gradient descent.
        replacement: how batches are drawn.

    Returns:
        D - 1 pairs.

    References:
        [Ziyin2024, Theorem E.1], batches of one. In the limit of small learning rates E[g] counts
        for nothing: `symmetry.noether_drift`. Where it is 0 all of them agree.
    """
    layers = layers_of(weights)
    shape = len(layers[-1]), layers[0].shape[1]
    batches = _batches(inputs, targets, shape, batch_size, replacement)
    residuals = _residuals(batches, layers)
    return [_sides(layers, i, residuals, batches) for i in range(len(layers) - 1)]


@checked
def deep_linear_equilibrium_of_examples(
    product: Num[ArrayLike, "..."],
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    widths: Sequence[int],
    key: Key,
    batch_size: int | None = 1,
    replacement: bool = False,
) -> Weights:
    """The factors W_D ... W_1 of a product at which no charge moves, whatever the residuals.

    Where `deep_linear_noise_equilibrium` needs a minimum, and residuals that are independent of
    the inputs, this one takes any product and the residuals as they are. It is the minimum of
    ``sum_i E|dL/dW_i|^2`` over all factors, up to rotations of the hidden layers the only one.

    Args:
        product: P = W_D ... W_1, shape (d_y, d_x), not 0: the least-squares map for the end of
            training, or the product of any network.
        inputs: x, shape (N, d_x).
        targets: y, shape (N, d_y).
        widths: of the D - 1 hidden layers, each at least the rank of P.
        key: draws the rotations, uniformly.
        batch_size: S; None for all N, gradient descent. Where the mean gradient is 0 all agree.
        replacement: how batches are drawn.

    Returns:
        (W_1, ..., W_D) in float64. Layers wider than the rank of P carry nothing else.

    Raises:
        ValueError: wrong shapes; a width below the rank of P; gradients that do not reach all of
            P: then no finite equilibrium exists.
        RuntimeError: no convergence.

    References:
        [Ziyin2024, Theorem E.1].
    """
    target = matrix("product", product)
    batches = _batches(inputs, targets, target.shape, batch_size, replacement)
    sizes = [checked_count("widths", width) for width in widths]
    if not sizes:
        raise ValueError("widths: got none, expected the width of at least one hidden layer.")
    layers = _even_factors(target, len(sizes) + 1)
    turns = frames(sizes, len(layers[0]), key)
    residuals = _residuals(batches, [target])
    _balance_all(layers, residuals, batches)
    begin, *middle, end = layers
    inner = [there @ w @ here.T for w, here, there in zip(middle, turns, turns[1:])]
    return turns[0] @ begin, *inner, end @ turns[-1].T


def _batches(
    inputs: ArrayLike,
    targets: ArrayLike,
    shape: tuple[int, ...],
    batch_size: int | None,
    replacement: bool,
) -> _Batches:
    x, y = matrix("inputs", inputs), matrix("targets", targets)
    if (y.shape[1], x.shape[1]) != shape or len(x) != len(y):
        raise ValueError(
            f"inputs and targets: got shapes {x.shape} and {y.shape}, expected (N, {shape[1]}) and "
            f"(N, {shape[0]}) for a network of shape {shape}."
        )
    size = len(x) if batch_size is None else checked_count("batch_size", batch_size)
    if size > len(x) and not replacement:
        raise ValueError(
            f"batch_size: got {size}, more than the {len(x)} examples; draw with replacement=True."
        )
    finite = 1.0 if replacement else (len(x) - size) / max(len(x) - 1, 1)
    return _Batches(x, y, finite / size)


def _residuals(batches: _Batches, layers: Sequence[np.ndarray]) -> np.ndarray:
    found = batches.inputs
    for layer in layers:
        found = found @ layer.T
    return found - batches.targets


def _sides(
    layers: Sequence[np.ndarray], index: int, residuals: np.ndarray, batches: _Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Of hidden layer `index`: of the gradient by what follows it, and by what it follows."""
    entering, coming_back = batches.inputs, residuals
    for layer in layers[:index]:
        entering = entering @ layer.T
    for layer in layers[: index + 1 : -1]:
        coming_back = coming_back @ layer
    hidden, returned = entering @ layers[index].T, coming_back @ layers[index + 1]
    return (
        _second_moment(hidden, coming_back, batches.share),
        _second_moment(returned, entering, batches.share),
    )


def _second_moment(rows: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    """``E_batches[g g']`` of ``g = E[row other']``."""
    each = (rows.T * np.sum(others**2, axis=1)) @ rows / len(rows)
    mean = rows.T @ others / len(rows)
    return share * each + (1 - share) * mean @ mean.T


def _balance_all(layers: list[np.ndarray], residuals: np.ndarray, batches: _Batches) -> None:
    """One layer after the other: the sum of squares is convex along the orbit, so this ends."""
    gap = np.inf
    for _ in range(_MAX_SWEEPS):
        last, hidden = gap, range(len(layers) - 1)
        gap = max(_balance(layers, i, residuals, batches) for i in hidden)
        if gap <= 1e-13 or last <= gap <= _ROUNDING:  # what rounding leaves
            return
    raise RuntimeError(
        f"deep_linear_equilibrium_of_examples: the sides still differ by {gap:.1e} after "
        f"{_MAX_SWEEPS} sweeps, expected rounding. Bring inputs and targets to alike scales."
    )


def _balance(
    layers: list[np.ndarray], index: int, residuals: np.ndarray, batches: _Batches
) -> float:
    """Makes the two sides of one hidden layer equal by ``(W, W') -> (Q W, W' Q^-1)``.

    They turn into ``Q N Q'`` and ``Q'^-1 M Q^-1``: with Q'Q = P, ``P N P = M``, whose solution is
    the geometric mean of ``N^-1`` and M.

    Returns:
        How far apart they were, relatively.
    """
    left, right = _sides(layers, index, residuals, batches)
    gap = np.linalg.norm(left - right) / np.linalg.norm(left + right)
    values, vectors = np.linalg.eigh(left)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle, turn = np.linalg.eigh(root @ right @ root)
    if values[0] <= _ROUNDING * values[-1] or middle[0] <= _ROUNDING**2 * middle[-1]:
        raise ValueError(
            "inputs and targets: the gradients reach less than all of product, so that no finite "
            "equilibrium exists. Restrict the problem to the directions that have noise."
        )
    # Q = D^(1/4) V' N^(-1/2) for N^(1/2) M N^(1/2) = V D V'.
    change = middle[:, None] ** 0.25 * (turn.T @ (vectors / np.sqrt(values)) @ vectors.T)
    layers[index] = change @ layers[index]
    layers[index + 1] = layers[index + 1] @ np.linalg.inv(change)
    return float(gap)


def _even_factors(product: np.ndarray, depth: int) -> list[np.ndarray]:
    """Factors of the product with its rank as widths, all of the same singular values."""
    left, values, right = np.linalg.svd(product, full_matrices=False)
    rank = int(np.sum(values > _ROUNDING * values[0])) if values[0] > 0 else 0
    if rank == 0:
        raise ValueError("product: got 0, expected a map that is not; 0 needs no weights.")
    root = values[:rank] ** (1 / depth)
    middle = [np.diag(root) for _ in range(depth - 2)]
    return [root[:, None] * right[:rank], *middle, left[:, :rank] * root]
