"""What SGD's noise weighs in a linear network, on either side of a layer; its sharpness."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow.theory._arguments import finite, matrix, number, semidefinite


@checked
def two_layer_noise_matrices(
    inputs: Num[ArrayLike, "..."],
    residuals: Num[ArrayLike, "..."],
    *,
    noise_scale: float,
    weight_decay: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """``G_W = 2 s E[|r|^2 x x'] + g I`` and ``G_U = 2 s E[|x|^2 r r'] + g I`` with s = sigma^2.

    For ``|U W x - y|^2 + g (|U|^2 + |W|^2)``, all charges rest where ``W G_W W' = U' G_U U``:
    where the mean gradient (without decay) is 0, and at batch size 1 in steps of SGD anywhere.

    Args:
        inputs: x, shape (N, d_x).
        residuals: r = U W x - y, shape (N, d_y).
        noise_scale: sigma^2 = eta/(2 S), learning rate over twice the batch size.
        weight_decay: g >= 0.

    References:
        [Ziyin2024, eq. (13)], which prints E[...] + 2 g I, without eta and S.
    """
    x, r = matrix("inputs", inputs), matrix("residuals", residuals)
    if len(x) != len(r):
        raise ValueError(f"residuals: got {len(r)} rows, expected {len(x)}, as many as inputs.")
    scale = 2 * number("noise_scale", noise_scale, least=0.0) / len(x)
    decay = number("weight_decay", weight_decay, least=0.0)
    of_inputs = scale * (x.T * np.sum(r**2, axis=1)) @ x
    of_outputs = scale * (r.T * np.sum(x**2, axis=1)) @ r
    return of_inputs + decay * np.eye(x.shape[1]), of_outputs + decay * np.eye(r.shape[1])


@checked
def deep_linear_noise_sides(
    weights: Sequence[Num[ArrayLike, "..."]],
    input_covariance: Num[ArrayLike, "..."],
    noise_covariance: Num[ArrayLike, "..."],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At a minimum, for every hidden layer the two matrices that are equal in equilibrium.

    With N_i = W_{i-1} ... W_1 and M_i = W_D ... W_{i+1}, the second moments of the gradients
    by W_{i+1} and by W_i, over 4: ``N_{i+1} Sigma_x N_{i+1}' tr(M_{i+1}' Sigma_eps M_{i+1})`` and
    ``M_i' Sigma_eps M_i tr(N_i Sigma_x N_i')``. For two layers ``W Sigma_x W' tr Sigma_eps`` and
    ``U' Sigma_eps U tr Sigma_x``.

    Args:
        weights: (W_1, ..., W_D).
        input_covariance: Sigma_x.
        noise_covariance: Sigma_eps, of the residuals.

    Returns:
        D - 1 pairs; their difference times 8 sigma^2 is the drift of
        ``W_{i+1}' W_{i+1} - W_i W_i'``.
    """
    layers = layers_of(weights)
    moments, returns = _moments(layers, input_covariance, noise_covariance)
    return [
        (moments[i + 1] * np.trace(returns[i + 1]), returns[i] * np.trace(moments[i]))
        for i in range(len(layers) - 1)
    ]


@checked
def deep_linear_sharpness(
    weights: Sequence[Num[ArrayLike, "..."]], input_covariance: Num[ArrayLike, "..."]
) -> float:
    """The trace of the Hessian of ``E|W_D ... W_1 x - y|^2``, at any weights.

    ``2 sum_i |W_D ... W_{i+1}|^2 tr(W_{i-1} ... W_1 Sigma_x W_1' ... W_{i-1}')``; for two layers
    ``2 (d_y tr(W Sigma_x W') + |U|^2 tr Sigma_x)``.

    Args:
        weights: (W_1, ..., W_D).
        input_covariance: Sigma_x = E[x x'].

    References:
        [Ziyin2024, Proposition 5.3], which prints half of it.
    """
    layers = layers_of(weights)
    moments, returns = _moments(layers, input_covariance, np.eye(len(layers[-1])))
    return float(2 * sum(np.trace(m) * np.trace(r) for m, r in zip(moments, returns)))


@checked
def deep_linear_initial_sharpness(
    sizes: Sequence[int], variances: Sequence[float], input_trace: float
) -> float:
    """The mean of `deep_linear_sharpness` over independent centred weights.

    ``2 tr Sigma_x n_1 ... n_D sum_i prod_{j != i} v_j``; for two layers
    ``2 d_y d (v_W + v_U) tr Sigma_x``.

    Args:
        sizes: (n_0, ..., n_D) = (d_x, widths, d_y).
        variances: v_i of the entries of W_i, for each of the D layers: (1/d_x, 1/d) for
            Kaiming's start of two layers.
        input_trace: tr Sigma_x.

    References:
        [Ziyin2024, eq. (15)], half of it and with v_U = 1 for Kaiming's start.
    """
    counts = [checked_count("sizes", size) for size in sizes]
    v = finite("variances", np.array(variances))
    if v.shape != (len(counts) - 1,) or len(v) == 0 or np.any(v < 0):
        raise ValueError(f"variances: got {v}, expected {len(counts) - 1} numbers >= 0.")
    others = sum(np.prod(np.delete(v, i)) for i in range(len(v)))
    return float(2 * number("input_trace", input_trace, least=0.0) * np.prod(counts[1:]) * others)


def problem(
    target_map: ArrayLike,
    inner: ArrayLike,
    outer: ArrayLike,
    inner_name: str = "input_covariance",
    outer_name: str = "noise_covariance",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    v = matrix("target_map", target_map)
    rows, columns = v.shape
    inner = shaped(inner_name, matrix(inner_name, inner), (columns, columns))
    outer = shaped(outer_name, matrix(outer_name, outer), (rows, rows))
    return v, semidefinite(inner_name, inner), semidefinite(outer_name, outer)


def shaped(name: str, value: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {value.shape}, expected {shape}.")
    return value


def layers_of(weights: Sequence[ArrayLike]) -> list[np.ndarray]:
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
    """N_i Sigma_x N_i' of what enters every layer, M_i' Sigma_eps M_i of what comes back to it."""
    outputs, inputs = len(layers[-1]), layers[0].shape[1]
    _, forward, backward = problem(np.zeros((outputs, inputs)), input_covariance, noise_covariance)
    moments, returns = [forward], [backward]
    for layer in layers[:-1]:
        moments.append(layer @ moments[-1] @ layer.T)
    for layer in layers[:0:-1]:
        returns.append(layer.T @ returns[-1] @ layer)
    return moments, returns[::-1]
