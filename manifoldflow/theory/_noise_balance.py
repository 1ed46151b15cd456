"""The noise of SGD on either side of a layer of a linear network, and the network's sharpness."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, matrix, number, rounding_of, semidefinite


@checked_concrete
def two_layer_noise_matrices(
    inputs: Num[ArrayLike, "..."],
    residuals: Num[ArrayLike, "..."],
    *,
    noise_scale: float,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The matrices G_W = 2σ²E[‖r‖²xxᵀ] + γI and G_U = 2σ²E[‖x‖²rrᵀ] + γI of a linear network.

    The network has two layers. For the loss ‖UWx − y‖² + γ(‖U‖² + ‖W‖²) all charges rest where
    W·G_W·Wᵀ = Uᵀ·G_U·U. This holds where the mean gradient without decay is 0, and anywhere for
    steps of SGD with batches of one.

    Args:
        inputs: x, shape (N, d_x).
        residuals: r = UWx − y, shape (N, d_y).
        noise_scale: σ² = η/(2S) ≥ 0, the learning rate over twice the batch size.
        weight_decay: γ ≥ 0.

    Returns:
        (G_W, G_U), of shapes (d_x, d_x) and (d_y, d_y).

    Raises:
        ValueError: wrong shapes, or numbers out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> g_w, g_u = theory.two_layer_noise_matrices(
        ...     np.array([[1.0, 0.0]]), np.array([[2.0]]), noise_scale=0.5
        ... )
        >>> print(g_w.tolist(), g_u.tolist())
        [[4.0, 0.0], [0.0, 0.0]] [[4.0]]

    References:
        [Ziyin2024, eq. (13)], which prints E[…] + 2γI, without η and S.
    """
    x, r = matrix("inputs", inputs), matrix("residuals", residuals)
    if len(x) != len(r):
        raise ValueError(f"residuals: got {len(r)} rows, expected {len(x)}, as many as inputs.")
    scale = 2 * number("noise_scale", noise_scale, least=0.0) / len(x)
    decay = number("weight_decay", weight_decay, least=0.0)
    of_inputs = scale * (x.T * np.sum(r**2, axis=1)) @ x
    of_outputs = scale * (r.T * np.sum(x**2, axis=1)) @ r
    return of_inputs + decay * np.eye(x.shape[1]), of_outputs + decay * np.eye(r.shape[1])


@checked_concrete
def deep_linear_noise_sides(
    weights: Sequence[Num[ArrayLike, "..."]],
    input_covariance: Num[ArrayLike, "..."],
    noise_covariance: Num[ArrayLike, "..."],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The noise matrices on both sides of each hidden layer, at a minimum of a linear network.

    With Nᵢ = Wᵢ₋₁ ⋯ W₁ and Mᵢ = W_D ⋯ Wᵢ₊₁ they are a quarter of the second moments of the
    gradients by Wᵢ₊₁ and by Wᵢ,

        Nᵢ₊₁ Σ_x Nᵢ₊₁ᵀ · tr(Mᵢ₊₁ᵀ Σ_ε Mᵢ₊₁)   and   Mᵢᵀ Σ_ε Mᵢ · tr(Nᵢ Σ_x Nᵢᵀ).

    At a noise equilibrium the two are equal. For two layers they are WΣ_xWᵀ·tr Σ_ε and UᵀΣ_εU·tr
    Σ_x.

    Args:
        weights: (W₁, …, W_D), each (outputs, inputs).
        input_covariance: Σ_x, (d_x, d_x).
        noise_covariance: Σ_ε of the residuals, (d_y, d_y).

    Returns:
        D − 1 pairs. Their difference times 8σ² is the drift of Wᵢ₊₁ᵀWᵢ₊₁ − WᵢWᵢᵀ.

    Raises:
        ValueError: wrong shapes, or a covariance with a negative eigenvalue.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> layers = [np.array([[2.0]]), np.array([[0.5]])]  # W = 2, U = 1/2
        >>> theory.deep_linear_noise_sides(layers, np.array([[1.0]]), np.array([[1.0]]))
        [(array([[4.]]), array([[0.25]]))]

    References:
        [Ziyin2024, Theorem 5.4].
    """
    layers = layers_of(weights)
    moments, returns = _moments(layers, input_covariance, noise_covariance)
    return [
        (moments[i + 1] * np.trace(returns[i + 1]), returns[i] * np.trace(moments[i]))
        for i in range(len(layers) - 1)
    ]


@checked_concrete
def deep_linear_sharpness(
    weights: Sequence[Num[ArrayLike, "..."]], input_covariance: Num[ArrayLike, "..."]
) -> float:
    """The trace of the Hessian of E‖W_D ⋯ W₁x − y‖², at any weights.

    It is 2 Σᵢ ‖W_D ⋯ Wᵢ₊₁‖²·tr(Wᵢ₋₁ ⋯ W₁ Σ_x W₁ᵀ ⋯ Wᵢ₋₁ᵀ). For two layers: 2(d_y·tr(WΣ_xWᵀ) +
    ‖U‖²·tr Σ_x).

    Args:
        weights: (W₁, …, W_D), each (outputs, inputs).
        input_covariance: Σ_x = E[xxᵀ], (d_x, d_x).

    Returns:
        tr ∇²L, a Python float.

    Raises:
        ValueError: wrong shapes, or a covariance with a negative eigenvalue.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> layers = [np.array([[2.0]]), np.array([[0.5]])]
        >>> theory.deep_linear_sharpness(layers, np.array([[1.0]]))
        8.5

    References:
        [Ziyin2024, Proposition 5.3], which prints half of it.
    """
    layers = layers_of(weights)
    moments, returns = _moments(layers, input_covariance, np.eye(len(layers[-1])))
    return float(2 * sum(np.trace(m) * np.trace(r) for m, r in zip(moments, returns)))


@checked_concrete
def deep_linear_initial_sharpness(
    sizes: Sequence[int], variances: Sequence[float], input_trace: float
) -> float:
    """The mean of `deep_linear_sharpness` over independent weights with mean 0.

    It is 2·tr Σ_x·n₁ ⋯ n_D·Σᵢ ∏_{j≠i} vⱼ. For two layers of hidden width d: 2·d_y·d·(v_W + v_U)·tr
    Σ_x.

    Args:
        sizes: (n₀, …, n_D) = (d_x, hidden widths, d_y).
        variances: vᵢ ≥ 0 of the entries of Wᵢ, one for each of the D layers; (1/d_x, 1/d) for
            Kaiming's start of two layers.
        input_trace: tr Σ_x ≥ 0.

    Returns:
        The mean of tr ∇²L, a Python float.

    Raises:
        ValueError: sizes, variances or a trace out of range.

    Examples:
        >>> from manifoldflow import theory
        >>> theory.deep_linear_initial_sharpness((4, 2, 1), (0.25, 0.5), input_trace=4.0)
        12.0

    References:
        [Ziyin2024, eq. (15)], which has half of it, and v_U = 1 for Kaiming's start.
    """
    counts = [checked_count("sizes", size) for size in sizes]
    v = finite("variances", np.array(variances))
    if v.shape != (len(counts) - 1,) or len(v) == 0 or np.any(v < 0):
        raise ValueError(f"variances: got {v}, expected {len(counts) - 1} numbers >= 0.")
    # Without division by vᵢ, which may be 0.
    others = sum(np.prod(np.delete(v, i)) for i in range(len(v)))
    return float(2 * number("input_trace", input_trace, least=0.0) * np.prod(counts[1:]) * others)


def problem(
    target_map: ArrayLike,
    inner: ArrayLike,
    outer: ArrayLike,
    inner_name: str = "input_covariance",
    outer_name: str = "noise_covariance",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map and the two covariances around it, refused unless their shapes fit."""
    given = target_map, inner, outer
    v = matrix("target_map", target_map)
    rows, columns = v.shape
    inner = shaped(inner_name, matrix(inner_name, inner), (columns, columns))
    outer = shaped(outer_name, matrix(outer_name, outer), (rows, rows))
    rounding = rounding_of(*given)
    inner = semidefinite(inner_name, inner, rounding)
    return v, inner, semidefinite(outer_name, outer, rounding)


def shaped(name: str, value: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The array itself, refused unless it has this shape."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {value.shape}, expected {shape}.")
    return value


def layers_of(weights: Sequence[ArrayLike]) -> list[np.ndarray]:
    """The weights (W₁, …, W_D) as float64 matrices whose shapes follow each other."""
    layers = [matrix(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    fits = all(after.shape[1] == before.shape[0] for before, after in zip(layers, layers[1:]))
    if not layers or not fits:
        raise ValueError(
            f"weights: got shapes {[layer.shape for layer in layers]}, expected (W_1, ..., W_D) "
            "from the inputs to the outputs, each (outputs, inputs)."
        )
    return layers


def _moments(
    layers: list[np.ndarray], input_covariance: ArrayLike, noise_covariance: ArrayLike
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nᵢ Σ_x Nᵢᵀ of the input to every layer, and Mᵢᵀ Σ_ε Mᵢ of the gradient at its output."""
    outputs, inputs = len(layers[-1]), layers[0].shape[1]
    _, forward, backward = problem(np.zeros((outputs, inputs)), input_covariance, noise_covariance)
    moments, returns = [forward], [backward]
    for layer in layers[:-1]:
        moments.append(layer @ moments[-1] @ layer.T)
    for layer in layers[:0:-1]:
        returns.append(layer.T @ returns[-1] @ layer)
    return moments, returns[::-1]
