"""Noise equilibria of linear networks, and the displacement by nearly symmetric losses."""

from collections.abc import Sequence

import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Num

from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_count
from manifoldflow._types import Key
from manifoldflow.theory._arguments import finite, matrix, number, rounding_of, semidefinite
from manifoldflow.theory._noise_balance import problem, shaped

Weights = tuple[np.ndarray, ...]
"""(W_1, ..., W_D), from the inputs to the outputs, each of shape (outputs, inputs)."""


@checked_concrete
def deep_linear_noise_equilibrium(
    target_map: Num[ArrayLike, "..."],
    input_covariance: Num[ArrayLike, "..."],
    noise_covariance: Num[ArrayLike, "..."],
    *,
    widths: Sequence[int],
    key: Key,
) -> Weights:
    """The noise equilibrium of ‖W_D ⋯ W₁x − y‖² among its minima, for y = Vx + ε.

    SGD without weight decay ends here, gradient descent does not. With Σ_ε^½ V Σ_x^½ = LSR
    (singular value decomposition), t_x = tr Σ_x, t_ε = tr Σ_ε and c = (tr S/√(t_x·t_ε))^(1/D),

        Σ_ε^½ W_D = c·√(t_ε/tr S)·L√S·U_{D−1}ᵀ,
        Wᵢ = c·UᵢUᵢ₋₁ᵀ,
        W₁Σ_x^½ = c·√(t_x/tr S)·U₁·√S R,

    with any Uᵢ of orthonormal columns. All layers between the first and the last have the same
    norm. Layers between the ends may carry a further part, from the complement of Uᵢ₋₁ to that of
    Uᵢ. Neither inputs nor outputs reach it, and SGD leaves it as it was at the start; here it is 0.

    Args:
        target_map: V, shape (d_y, d_x), not 0.
        input_covariance: Σ_x = E[xxᵀ], positive semidefinite.
        noise_covariance: Σ_ε = E[εεᵀ], positive semidefinite, with ε independent of x.
        widths: of the D − 1 hidden layers, each at least the rank of V.
        key: draws the Uᵢ, uniformly.

    Returns:
        (W₁, …, W_D) in float64, with W_D ⋯ W₁ = V.

    Raises:
        ValueError: wrong shapes; a covariance with a negative eigenvalue; a width below the rank of
            V; noise that does not reach all of V, so that no finite equilibrium exists.

    Examples:
        >>> import jax.random as jr
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> one, key = np.array([[1.0]]), jr.key(0)
        >>> w, u = theory.deep_linear_noise_equilibrium(
        ...     np.array([[6.0]]), one, np.array([[4.0]]), widths=[2], key=key
        ... )
        >>> print((u @ w).round(6).tolist(), (w.T @ w).round(6).tolist())
        [[6.0]] [[6.0]]

    References:
        [Ziyin2024, Theorem 5.4]; what is printed there needs tr Σ_x = tr Σ_ε = rank V.
    """
    v, sigma_x, sigma_eps = problem(target_map, input_covariance, noise_covariance)
    sizes = [checked_count("widths", width) for width in widths]
    if not sizes:
        raise ValueError("widths: got none, expected the width of at least one hidden layer.")
    rounding = rounding_of(target_map, input_covariance, noise_covariance)
    inner, outer = _root(sigma_x, rounding), _root(sigma_eps, rounding)
    last, values, first = _aligned("target_map", v, inner, outer, rounding)
    # W_D ⋯ W₁ = V for any turns, as UᵢᵀUᵢ = I between two layers.
    turns = frames(sizes, len(values), key)
    # last @ first = V with sqrt(S) in each, so that the factors below multiply to 1.
    trace, depth = np.sum(values), len(sizes) + 1
    t_x, t_eps = np.trace(sigma_x), np.trace(sigma_eps)
    c = (trace / np.sqrt(t_x * t_eps)) ** (1 / depth)
    middle = [c * there @ here.T for here, there in zip(turns, turns[1:])]
    begin = c * np.sqrt(t_x / trace) * turns[0] @ first
    return begin, *middle, c * np.sqrt(t_eps / trace) * last @ turns[-1].T


@checked_concrete
def two_layer_noise_equilibrium(
    product: Num[ArrayLike, "..."],
    input_noise: Num[ArrayLike, "..."],
    output_noise: Num[ArrayLike, "..."],
    *,
    width: int,
    key: Key,
) -> Weights:
    """The factors (W, U) of a given product UW with W·G_W·Wᵀ = Uᵀ·G_U·U.

    They are the noise equilibrium of ‖UWx − y‖² + γ(‖U‖² + ‖W‖²) at this product, for the matrices
    of `two_layer_noise_matrices`. Where the width is the rank of the product, the pair is unique up
    to (QW, UQᵀ) with an orthogonal Q.

    Args:
        product: UW, shape (d_y, d_x), not 0.
        input_noise: G_W, positive semidefinite, (d_x, d_x).
        output_noise: G_U, positive semidefinite, (d_y, d_y).
        width: rows of W, at least the rank of the product.
        key: draws the rotation.

    Returns:
        (W, U) in float64, of shapes (width, d_x) and (d_y, width).

    Raises:
        ValueError: wrong shapes; a matrix with a negative eigenvalue; a width below the rank of the
            product; noise that does not reach all of the product.

    Examples:
        >>> import jax.random as jr
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> w, u = theory.two_layer_noise_equilibrium(
        ...     np.array([[6.0]]), np.array([[9.0]]), np.array([[4.0]]), width=1, key=jr.key(0)
        ... )
        >>> print((u @ w).round(6).tolist(), (9 * w**2 - 4 * u**2).round(6).tolist())
        [[6.0]] [[0.0]]

    References:
        [Ziyin2024, Theorem 5.2].
    """
    v, g_w, g_u = problem(product, input_noise, output_noise, "input_noise", "output_noise")
    rounding = rounding_of(product, input_noise, output_noise)
    roots = _root(g_w, rounding), _root(g_u, rounding)
    last, values, first = _aligned("product", v, *roots, rounding)
    (frame,) = frames([checked_count("width", width)], len(values), key)
    return frame @ first, last @ frame.T


@checked_concrete
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
    """The distance s along n at which the noise holds SGD from a minimum that breaks a symmetry.

    The loss is ℓ₁ + zℓ₂ with an A-symmetric ℓ₁, at a common minimiser t. To first order in σ²,

        s = σ²·tr(ΣA)/(z·nᵀHAt)

    balances z∇ℓ₂ᵀAθ = σ²·tr(ΣA) at θ = t + s·n. Where H = hI the charge ½θᵀAθ moves by
    σ²·tr(ΣA)/(zh), whatever the direction.

    Args:
        point: t, shape (D,).
        generator: A, symmetric, (D, D).
        covariance: Σ of the gradient of ℓ₁ at t, centred, (D, D).
        hessian: H of ℓ₂ at t, (D, D).
        direction: n, shape (D,), of any length; s counts in units of n.
        noise_scale: σ² = η/(2S) ≥ 0.
        strength: z > 0.

    Returns:
        s, a Python float.

    Raises:
        ValueError: wrong shapes; a covariance with a negative eigenvalue; a direction with nᵀHAt =
            0, along which nothing pulls back.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> a, eye = np.diag([1.0, -1.0]), np.eye(2)
        >>> noise = np.diag([3.0, 1.0])
        >>> found = theory.approximate_symmetry_displacement(
        ...     np.array([1.0, 1.0]),
        ...     a,
        ...     noise,
        ...     eye,
        ...     np.array([1.0, 0.0]),
        ...     noise_scale=0.01,
        ...     strength=0.1,
        ... )
        >>> print(round(found, 6))
        0.2

    References:
        [Ziyin2024, eqs. (20) to (23)]; (23) prints twice the change of the charge.
    """
    theta, n = finite("point", point), finite("direction", direction)
    given = {"generator": generator, "covariance": covariance, "hessian": hessian}
    shape = (theta.size, theta.size)
    a, sigma, h = (shaped(name, matrix(name, value), shape) for name, value in given.items())
    rounding = rounding_of(point, generator, covariance, hessian, direction)
    sigma = semidefinite("covariance", sigma, rounding)
    if theta.ndim != 1 or n.shape != theta.shape:
        raise ValueError(
            f"point and direction: got shapes {theta.shape} and {n.shape}, expected (D,) both."
        )
    pull = number("strength", strength, least=0.0, strict=True) * n @ h @ a @ theta
    if abs(pull) <= rounding * strength * np.linalg.norm(n) * np.linalg.norm(h @ a @ theta):
        raise ValueError(
            "direction: got n with n' H A t = 0, along which the charge stays. Take another one."
        )
    return float(number("noise_scale", noise_scale, least=0.0) * np.trace(sigma @ a) / pull)


def _root(covariance: np.ndarray, rounding: float) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    # An eigenvalue of rounding, 1e-16, would have the root 1e-8, which no test takes for zero.
    values = np.where(values > rounding * values[-1], values, 0.0)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _aligned(
    name: str, product: np.ndarray, inner: np.ndarray, outer: np.ndarray, rounding: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors last (d_y, r) and first (r, d_x) with last·first = V, and the singular values S.

    outer·last = L√S and first·inner = √S R, for outer·V·inner = LSR. They are built from factors of
    V, so that singular covariances work as well.
    """
    left, values, right = np.linalg.svd(product, full_matrices=False)
    rank = int(np.sum(values > rounding * values[0])) if values[0] > 0 else 0
    if rank == 0:
        raise ValueError(f"{name}: got 0, expected a map that is not; 0 needs no weights.")
    left, right = left[:, :rank], values[:rank, None] * right[:rank]
    a, b = outer @ left, right @ inner
    l, s, r = np.linalg.svd(a @ b, full_matrices=False)
    # Against the largest that it could be: for rank 1, s[0] itself is what may vanish.
    largest = np.linalg.norm(outer, 2) * values[0] * np.linalg.norm(inner, 2)
    if s[rank - 1] <= rounding * largest:
        raise ValueError(
            f"covariances: the noise reaches less than the rank {rank} of {name}, so that no "
            "finite equilibrium exists. Restrict the problem to the directions that have noise."
        )
    l, s, r = l[:, :rank], s[:rank], r[:rank]
    roots = np.sqrt(s)
    # Through factors of V and not by Σ^{−½}, which does not exist for singular covariances.
    last = left @ (np.linalg.pinv(a) @ l * roots)
    return last, s, (roots[:, None] * r @ np.linalg.pinv(b)) @ right


def frames(widths: Sequence[int], rank: int, key: Key) -> list[np.ndarray]:
    """Uniformly drawn matrices with orthonormal columns, of shape (width, rank) each."""
    small = [width for width in widths if width < rank]
    if small:
        raise ValueError(f"width: got {small[0]}, expected at least {rank}, the rank of the map.")
    # By NumPy, seeded by the key, for the same float64 draws whatever JAX is set to.
    rng = np.random.default_rng(np.asarray(jr.key_data(key)).ravel())
    found = [np.linalg.qr(rng.normal(size=(width, rank))) for width in widths]
    # Q is uniform only if R has a positive diagonal, which LAPACK does not promise.
    return [q * np.sign(np.diag(triangle)) for q, triangle in found]
