"""Noise equilibria of deep linear networks on given examples, at any weights and residuals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow._types import Key
from manifoldflow.theory._arguments import matrix, rounding_of
from manifoldflow.theory._noise_balance import layers_of
from manifoldflow.theory._noise_equilibrium import frames, Weights

_MAX_SWEEPS = 20_000


class _Batches(NamedTuple):
    """Examples, and the share of E[ggᵀ] over examples in the second moment of a batch's gradient.

    Over batches that moment is share·E[ggᵀ] + (1 − share)·E[g]E[g]ᵀ.
    """

    inputs: np.ndarray
    targets: np.ndarray
    share: float
    rounding: float  # of the numbers that were given


@checked_concrete
def deep_linear_sides_of_examples(
    weights: Sequence[Num[ArrayLike, "..."]],
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    batch_size: int | None = 1,
    replacement: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The noise matrices on both sides of each hidden layer, at any weights, on given examples.

    With residuals r = W_D ⋯ W₁x − y, with h = Wᵢ₋₁ ⋯ W₁x the input to layer i and b = (W_D ⋯
    Wᵢ₊₂)ᵀr the gradient at the output of layer i + 1, for batches of one they are

        WᵢE[‖b‖²hhᵀ]Wᵢᵀ   and   Wᵢ₊₁ᵀE[‖h‖²bbᵀ]Wᵢ₊₁:

    a quarter of E[gᵀg] of the gradient by Wᵢ₊₁ and of E[ggᵀ] of the gradient by Wᵢ. For larger
    batches g is the gradient of a batch. A step of SGD on the mean of ‖r‖² changes Wᵢ₊₁ᵀWᵢ₊₁ −
    WᵢWᵢᵀ by 4η² times their difference in the mean, exactly. At a noise equilibrium the two are
    equal.

    Args:
        weights: (W₁, …, W_D), D ≥ 2, each (outputs, inputs).
        inputs: x, shape (N, d_x).
        targets: y, shape (N, d_y).
        batch_size: S; None for all N, gradient descent.
        replacement: True where batches are drawn with replacement.

    Returns:
        D − 1 pairs.

    Raises:
        ValueError: wrong shapes, or a batch size above N without replacement.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> layers = [np.array([[2.0]]), np.array([[0.5]])]
        >>> theory.deep_linear_sides_of_examples(
        ...     layers, np.array([[1.0], [1.0]]), np.array([[0.0], [2.0]])
        ... )
        [(array([[4.]]), array([[0.25]]))]

    References:
        [Ziyin2024, Theorem E.1], for batches of one. In the limit of small learning rates E[g] does
        not contribute (`symmetry.noether_drift`). Where E[g] is 0 all of them agree.
    """
    layers = layers_of(weights)
    shape = len(layers[-1]), layers[0].shape[1]
    batches = _batches(inputs, targets, shape, batch_size, replacement)
    residuals = _residuals(batches, layers)
    return [_sides(layers, i, residuals, batches) for i in range(len(layers) - 1)]


@checked_concrete
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
    """The factors W_D, …, W₁ of a product at which no charge drifts, for the residuals as they are.

    `deep_linear_noise_equilibrium` needs a minimum, and residuals that are independent of the
    inputs. This function takes any product and any residuals. The factors minimise Σᵢ E‖∂L/∂Wᵢ‖²
    over all factors of the product, and are unique up to rotations of the hidden layers.

    Args:
        product: P = W_D ⋯ W₁, shape (d_y, d_x), not 0: the least-squares map for the end of
            training, or the product of any network.
        inputs: x, shape (N, d_x).
        targets: y, shape (N, d_y).
        widths: of the D − 1 hidden layers, each at least the rank of P.
        key: draws the rotations, uniformly.
        batch_size: S; None for all N, gradient descent. Where the mean gradient is 0 it does not
            matter.
        replacement: True where batches are drawn with replacement.

    Returns:
        (W₁, …, W_D) in float64. Layers wider than the rank of P carry nothing else.

    Raises:
        ValueError: wrong shapes; a width below the rank of P; gradients that do not reach all of P,
            so that no finite equilibrium exists.
        RuntimeError: no convergence.

    Examples:
        >>> import jax.random as jr
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> w, u = theory.deep_linear_equilibrium_of_examples(
        ...     np.array([[1.0]]),
        ...     np.array([[1.0], [2.0]]),
        ...     np.array([[0.0], [3.0]]),
        ...     widths=[1],
        ...     key=jr.key(0),
        ... )
        >>> print((u @ w).round(6).tolist(), (abs(u) - abs(w)).round(6).tolist())
        [[1.0]] [[0.0]]

    References:
        [Ziyin2024, Theorem E.1].
    """
    target = matrix("product", product)
    batches = _batches(inputs, targets, target.shape, batch_size, replacement)
    sizes = [checked_count("widths", width) for width in widths]
    if not sizes:
        raise ValueError("widths: got none, expected the width of at least one hidden layer.")
    layers = _even_factors(target, len(sizes) + 1, rounding_of(product))
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
    return _Batches(x, y, finite / size, rounding_of(inputs, targets))


def _residuals(batches: _Batches, layers: Sequence[np.ndarray]) -> np.ndarray:
    found = batches.inputs
    for layer in layers:
        found = found @ layer.T
    return found - batches.targets


def _sides(
    layers: Sequence[np.ndarray], index: int, residuals: np.ndarray, batches: _Batches
) -> tuple[np.ndarray, np.ndarray]:
    """The two sides of a hidden layer: from the gradient by the next layer, and by this one."""
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
    """E[ggᵀ] over batches, for g = E[row·otherᵀ]."""
    each = (rows.T * np.sum(others**2, axis=1)) @ rows / len(rows)
    mean = rows.T @ others / len(rows)
    return share * each + (1 - share) * mean @ mean.T


def _balance_all(layers: list[np.ndarray], residuals: np.ndarray, batches: _Batches) -> None:
    """Balances one layer after the other; ends since the sum of squares is convex on the orbit."""
    gap = np.inf
    for _ in range(_MAX_SWEEPS):
        last, hidden = gap, range(len(layers) - 1)
        gap = max(_balance(layers, i, residuals, batches) for i in hidden)
        if gap <= 1e-13 or last <= gap <= 1e-10:  # what rounding leaves
            return
    raise RuntimeError(
        f"deep_linear_equilibrium_of_examples: the sides still differ by {gap:.1e} after "
        f"{_MAX_SWEEPS} sweeps, expected rounding. Bring inputs and targets to alike scales."
    )


def _balance(
    layers: list[np.ndarray], index: int, residuals: np.ndarray, batches: _Batches
) -> float:
    """Makes the two sides of one hidden layer equal by (W, W′) ↦ (QW, W′Q⁻¹).

    They become QNQᵀ and Q⁻ᵀMQ⁻¹. With QᵀQ = P the equation is PNP = M, solved by the geometric mean
    of N⁻¹ and M.

    Returns:
        The relative difference of the two sides before.
    """
    left, right = _sides(layers, index, residuals, batches)
    gap = np.linalg.norm(left - right) / np.linalg.norm(left + right)
    values, vectors = np.linalg.eigh(left)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle, turn = np.linalg.eigh(root @ right @ root)
    # `middle` is of fourth order in the gradients, `values` of second.
    rounding = batches.rounding
    if values[0] <= rounding * values[-1] or middle[0] <= rounding**2 * middle[-1]:
        raise ValueError(
            "inputs and targets: the gradients reach less than all of product, so that no finite "
            "equilibrium exists. Restrict the problem to the directions that have noise."
        )
    # Q = D^¼VᵀN^{−½} for N^½MN^½ = VDVᵀ.
    # With QᵀQ the geometric mean of N⁻¹ and M; Q itself need not be symmetric.
    change = middle[:, None] ** 0.25 * (turn.T @ (vectors / np.sqrt(values)) @ vectors.T)
    layers[index] = change @ layers[index]
    layers[index + 1] = layers[index + 1] @ np.linalg.inv(change)
    return float(gap)


def _even_factors(product: np.ndarray, depth: int, rounding: float) -> list[np.ndarray]:
    """Factors of the product, with its rank as widths, that share the same singular values."""
    left, values, right = np.linalg.svd(product, full_matrices=False)
    rank = int(np.sum(values > rounding * values[0])) if values[0] > 0 else 0
    if rank == 0:
        raise ValueError("product: got 0, expected a map that is not; 0 needs no weights.")
    root = values[:rank] ** (1 / depth)
    middle = [np.diag(root) for _ in range(depth - 2)]
    return [root[:, None] * right[:rank], *middle, left[:, :rank] * root]
