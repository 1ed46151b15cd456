"""Where the noise of SGD holds linear networks, and nearly symmetric losses."""

from collections.abc import Sequence

import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Key
from manifoldflow.theory._arguments import finite, matrix, number, semidefinite
from manifoldflow.theory._noise_balance import problem, shaped

Weights = tuple[np.ndarray, ...]
"""(W_1, ..., W_D), from the inputs to the outputs, each of shape (outputs, inputs)."""

_ROUNDING = 1e-10


@checked
def deep_linear_noise_equilibrium(
    target_map: Num[ArrayLike, "..."],
    input_covariance: Num[ArrayLike, "..."],
    noise_covariance: Num[ArrayLike, "..."],
    *,
    widths: Sequence[int],
    key: Key,
) -> Weights:
    """The noise equilibrium of ``|W_D ... W_1 x - y|^2`` at its minima, for ``y = V x + eps``.

    With ``Sigma_eps^(1/2) V Sigma_x^(1/2) = L S R`` (SVD), t_x = tr Sigma_x, t_eps = tr Sigma_eps
    and ``c = (tr S / sqrt(t_x t_eps))^(1/D)``,

        ``Sigma_eps^(1/2) W_D = c sqrt(t_eps/tr S) L sqrt(S) U_{D-1}'``,
        ``W_i = c U_i U_{i-1}'``,
        ``W_1 Sigma_x^(1/2) = c sqrt(t_x/tr S) U_1 sqrt(S) R``,

    with any U_i of orthonormal columns: all layers between the first and the last have the
    same norm. SGD without weight decay ends here, gradient descent does not. Layers between
    the ends may carry more, that takes the complement of U_{i-1} to that of U_i: neither inputs
    nor outputs reach it, and SGD leaves it as it was at the start.

    Args:
        target_map: V, shape (d_y, d_x), not 0.
        input_covariance: Sigma_x = E[x x'], positive semidefinite.
        noise_covariance: Sigma_eps = E[eps eps'], positive semidefinite, eps independent of x.
        widths: of the D - 1 hidden layers, each at least the rank of V.
        key: draws the U_i, uniformly.

    Returns:
        (W_1, ..., W_D) in float64, with W_D ... W_1 = V.

    Raises:
        ValueError: wrong shapes, a covariance with a negative eigenvalue, a width below the
            rank of V, or noise that does not reach all of V: then no finite equilibrium exists.

    References:
        [Ziyin2024, Theorem 5.4]; what is printed there needs tr Sigma_x = tr Sigma_eps = rank V.
    """
    v, sigma_x, sigma_eps = problem(target_map, input_covariance, noise_covariance)
    sizes = [checked_count("widths", width) for width in widths]
    if not sizes:
        raise ValueError("widths: got none, expected the width of at least one hidden layer.")
    inner, outer = _root(sigma_x), _root(sigma_eps)
    last, values, first = _aligned("target_map", v, inner, outer)
    turns = frames(sizes, len(values), key)
    # last @ first = V with sqrt(S) in each, so that the factors below multiply to 1.
    trace, depth = np.sum(values), len(sizes) + 1
    t_x, t_eps = np.trace(sigma_x), np.trace(sigma_eps)
    c = (trace / np.sqrt(t_x * t_eps)) ** (1 / depth)
    middle = [c * there @ here.T for here, there in zip(turns, turns[1:])]
    begin = c * np.sqrt(t_x / trace) * turns[0] @ first
    return begin, *middle, c * np.sqrt(t_eps / trace) * last @ turns[-1].T


@checked
def two_layer_noise_equilibrium(
    product: Num[ArrayLike, "..."],
    input_noise: Num[ArrayLike, "..."],
    output_noise: Num[ArrayLike, "..."],
    *,
    width: int,
    key: Key,
) -> Weights:
    """(W, U) with ``U W`` given and ``W G_W W' = U' G_U U``, for any positive semidefinite G.

    The noise equilibrium of ``|U W x - y|^2 + g (|U|^2 + |W|^2)`` at this product, for the
    matrices of `two_layer_noise_matrices`. It is the one pair of factors up to ``(Q W, U Q')``
    with an orthogonal Q, where the width is the rank of the product.

    Args:
        product: U W, shape (d_y, d_x), not 0.
        input_noise: G_W, (d_x, d_x).
        output_noise: G_U, (d_y, d_y).
        width: rows of W, at least the rank of the product.
        key: draws the rotation.

    Raises:
        ValueError: as `deep_linear_noise_equilibrium`.

    References:
        [Ziyin2024, Theorem 5.2].
    """
    v, g_w, g_u = problem(product, input_noise, output_noise, "input_noise", "output_noise")
    last, values, first = _aligned("product", v, _root(g_w), _root(g_u))
    (frame,) = frames([checked_count("width", width)], len(values), key)
    return frame @ first, last @ frame.T


@checked
def approximate_symmetry_displacement(
    point: Num[ArrayLike, "..."],
    generator: Num[ArrayLike, "..."],
    covariance: Num[ArrayLike, "..."],
    hessian: Num[ArrayLike, "..."],
    direction: Num[ArrayLike, "..."],
    *,
    noise_scale: float,
    strength: float,
) -> float:
    """How far along n the noise holds SGD from a minimum that breaks a symmetry, to O(sigma^2).

    For ``l_1 + z l_2`` with an A-symmetric l_1, at a minimiser t of both:
    ``s = sigma^2 tr(Sigma A)/(z n' H A t)`` balances ``z grad(l_2)' A theta = sigma^2 tr(Sigma
    A)`` at ``t + s n``. Where ``H = h I``, the charge ``theta' A theta/2`` moves by ``sigma^2
    tr(Sigma A)/(z h)`` whatever the direction.

    Args:
        point: t, shape (D,).
        generator: A, symmetric.
        covariance: Sigma of the gradient of l_1 at t, centred.
        hessian: H of l_2 at t.
        direction: n, shape (D,), of any length; s counts in units of it.
        noise_scale: sigma^2 = eta/(2 S).
        strength: z > 0.

    Raises:
        ValueError: wrong shapes; a covariance with a negative eigenvalue; a direction with
            n' H A t = 0, along which nothing pulls back.

    References:
        [Ziyin2024, eqs. (20) to (23)]; (23) prints twice the change of the charge.
    """
    theta, n = finite("point", point), finite("direction", direction)
    given = {"generator": generator, "covariance": covariance, "hessian": hessian}
    shape = (theta.size, theta.size)
    a, sigma, h = (shaped(name, matrix(name, value), shape) for name, value in given.items())
    sigma = semidefinite("covariance", sigma)
    if theta.ndim != 1 or n.shape != theta.shape:
        raise ValueError(
            f"point and direction: got shapes {theta.shape} and {n.shape}, expected (D,) both."
        )
    pull = number("strength", strength, least=0.0, strict=True) * n @ h @ a @ theta
    if abs(pull) <= _ROUNDING * strength * np.linalg.norm(n) * np.linalg.norm(h @ a @ theta):
        raise ValueError(
            "direction: got n with n' H A t = 0, along which the charge stays. Take another one."
        )
    return float(number("noise_scale", noise_scale, least=0.0) * np.trace(sigma @ a) / pull)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _aligned(
    name: str, product: np.ndarray, inner: np.ndarray, outer: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """last (d_y, r) and first (r, d_x) with last @ first = V and their S.

    outer @ last = L sqrt(S) and first @ inner = sqrt(S) R, for outer @ V @ inner = L S R.
    By factors of V, so that singular covariances do as well.
    """
    left, values, right = np.linalg.svd(product, full_matrices=False)
    rank = int(np.sum(values > _ROUNDING * values[0])) if values[0] > 0 else 0
    if rank == 0:
        raise ValueError(f"{name}: got 0, expected a map that is not; 0 needs no weights.")
    left, right = left[:, :rank], values[:rank, None] * right[:rank]
    a, b = outer @ left, right @ inner
    l, s, r = np.linalg.svd(a @ b, full_matrices=False)
    if s[rank - 1] <= _ROUNDING * s[0] or s[0] == 0:
        raise ValueError(
            f"covariances: the noise reaches less than the rank {rank} of {name}, so that no "
            "finite equilibrium exists. Restrict the problem to the directions that have noise."
        )
    l, s, r = l[:, :rank], s[:rank], r[:rank]
    roots = np.sqrt(s)
    last = left @ (np.linalg.pinv(a) @ l * roots)
    return last, s, (roots[:, None] * r @ np.linalg.pinv(b)) @ right


def frames(widths: Sequence[int], rank: int, key: Key) -> list[np.ndarray]:
    """Uniform matrices with orthonormal columns, (width, rank) each."""
    small = [width for width in widths if width < rank]
    if small:
        raise ValueError(f"width: got {small[0]}, expected at least {rank}, the rank of the map.")
    rng = np.random.default_rng(np.asarray(jr.key_data(key)).ravel())
    found = [np.linalg.qr(rng.normal(size=(width, rank))) for width in widths]
    return [q * np.sign(np.diag(triangle)) for q, triangle in found]
