"""Directions of largest margin, to which gradient descent on separable data converges."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import finite, matrix, number, problem, vector


@checked_concrete
def max_margin_direction(
    inputs: Num[ArrayLike, "..."], labels: Num[ArrayLike, "..."]
) -> Float[np.ndarray, " d"]:
    """The unit vector w with the largest margin minᵢ yᵢ⟨w, xᵢ⟩.

    It is the hard-margin support vector machine. Gradient flow and gradient descent on the logistic
    or exponential loss of separable data converge to it in direction, from any start. It solves min
    ‖w‖ subject to yᵢ⟨w, xᵢ⟩ ≥ 1, a least-distance problem, by non-negative least squares.

    Args:
        inputs: X, shape (n, d), finite; add a column of ones for a bias.
        labels: y, shape (n,), each −1 or 1.

    Returns:
        w in float64, shape (d,), of length 1.

    Raises:
        ValueError: a wrong shape; labels other than −1 and 1; data that no plane through the origin
            separates.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> inputs, labels = np.array([[1.0, 3.0], [-1.0, 2.0]]), np.array([1, -1])
        >>> print(theory.max_margin_direction(inputs, labels).round(3) + 0.0)
        [1. 0.]

    References:
        [Soudry2018]; C. Lawson, R. Hanson, Solving Least Squares Problems, chapter 23.
    """
    # Here, since scipy is slow to import and only some oracles need it.
    from scipy.optimize import nnls

    x, y = problem(inputs, labels)
    if not np.all(np.abs(y) == 1.0):
        raise ValueError(f"labels: got {np.unique(y)[:5]}, expected -1 and 1 only.")
    constraints = y[:, None] * x
    # In units of the longest input, since the tolerances of nnls are absolute.
    scale = np.max(np.linalg.norm(x, axis=1))
    if scale == 0.0:
        raise ValueError("inputs: got zeros only, expected data that can be separated.")
    system = np.vstack([constraints.T / scale, np.ones(len(y))])
    wanted = np.zeros(len(system))
    wanted[-1] = 1.0
    # Its default of 3n exchanges is too few where many examples lie close to the margin.
    dual, _ = nnls(system, wanted, maxiter=100 * len(y))
    residual = system @ dual - wanted
    # A zero residual is a convex combination of the y_i x_i that vanishes (Farkas).
    if np.linalg.norm(residual) < 1e-9:
        raise ValueError(
            "inputs: no plane through the origin separates the labels, so there is no margin. "
            "Add a column of ones to the inputs for a bias, or features."
        )
    direction = -residual[:-1] / residual[-1]
    return finite("direction", direction / np.linalg.norm(direction))


class MarginKKT(NamedTuple):
    """The defects of the optimality conditions of the largest margin, from `margin_kkt`.

    Attributes:
        residual: both conditions together, from 0 to 1; 0 exactly where both hold.
        stationarity: ‖u − Σᵢ λᵢyᵢ∇fᵢ‖ for the unit vector u = θ/‖θ‖.
        slackness: 1 − kγ·Σᵢ λᵢ, the share of examples beyond the margin.
        multipliers: λ ≥ 0, shape (n,); positive for support vectors only.
        margin: γ = minᵢ yᵢfᵢ(u).

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> found = theory.margin_kkt(
        ...     np.array([0.0, 1.0]), np.array([1.0, 2.0]), np.array([[1.0, 1.0], [0.0, 2.0]])
        ... )
        >>> isinstance(found, theory.MarginKKT), found.margin
        (True, 1.0)
    """

    residual: float
    stationarity: float
    slackness: float
    multipliers: Float[np.ndarray, " n"]
    margin: float


@checked_concrete
def margin_kkt(
    point: Num[ArrayLike, "..."],
    margins: Num[ArrayLike, "..."],
    gradients: Num[ArrayLike, "..."],
    *,
    degree: float = 1.0,
) -> MarginKKT:
    """The distance of a point from stationarity for min ‖θ‖ subject to yᵢfᵢ(θ) ≥ 1.

    The outputs are homogeneous of degree k, f(cθ) = cᵏf(θ), like those of a network of k layers
    without biases. Gradient descent on the logistic or exponential loss, once it separates the
    data, converges to a direction that satisfies the Karush-Kuhn-Tucker conditions: with u = θ/‖θ‖
    and its margin γ there are λ ≥ 0 with

        u = Σᵢ λᵢyᵢ∇fᵢ(u),   λᵢ(yᵢfᵢ(u) − γ) = 0.

    The λ returned minimise ‖u − Σᵢ λᵢyᵢ∇fᵢ‖² + (k Σᵢ λᵢ(yᵢfᵢ − γ))², and `residual` is the root of
    that minimum. For a linear model the margin is at least (1 − √5·residual) of the largest one. A
    network may have many such directions. At a kink of an output, such as a ReLU at 0, any
    subgradient would serve; only the given one is tried.

    Args:
        point: θ, shape (D,), not 0.
        margins: yᵢfᵢ(θ), shape (n,), all positive.
        gradients: yᵢ∇fᵢ(θ), shape (n, D).
        degree: k > 0.

    Returns:
        A `MarginKKT`.

    Raises:
        ValueError: a wrong shape; a point that does not separate the labels; margins and gradients
            that break ⟨∇fᵢ, θ⟩ = k·fᵢ, so that the degree is another one.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> rows = np.array([[1.0, 0.0], [0.0, 1.0]])  # yᵢxᵢ of a linear model
        >>> best = theory.max_margin_direction(rows, np.array([1, 1]))
        >>> print(round(theory.margin_kkt(best, rows @ best, rows).residual, 6))
        0.0
        >>> other = np.array([3.0, 1.0])
        >>> print(round(theory.margin_kkt(other, rows @ other, rows).residual, 3))
        0.507

    References:
        [Soudry2018; Ma2022, section 9.4]; K. Lyu, J. Li, Gradient descent maximizes the margin of
        homogeneous neural networks, ICLR 2020.
    """
    from scipy.optimize import nnls

    slopes = matrix("gradients", gradients)
    theta = vector("point", point, slopes.shape[1])
    values = vector("margins", margins, slopes.shape[0])
    k = number("degree", degree, least=0.0, strict=True)
    length = np.linalg.norm(theta)
    if length == 0.0 or np.min(values) <= 0.0:
        raise ValueError(
            f"margins: got {np.min(values):.3g} at a point of length {length:.3g}, expected "
            "positive ones; train until every example is on its side."
        )
    sizes = np.linalg.norm(slopes, axis=1) * length
    # 1e-3, since outputs in single precision are welcome.
    if np.any(np.abs(slopes @ theta - k * values) > 1e-3 * (sizes + k * values)):
        raise ValueError(
            f"degree: got {k}, expected that of the model, for which <grad f_i, theta> = k f_i; "
            f"the ratios here go up to {np.max(slopes @ theta / values):.4g}. Leave out biases."
        )
    # On the unit sphere: f(u) = f(θ)/‖θ‖ᵏ and ∇f(u) = ∇f(θ)/‖θ‖ᵏ⁻¹.
    unit, least = theta / length, np.min(values) / length**k
    rows = slopes / length ** (k - 1)
    excess = k * (values / length**k - least)
    # One least-squares problem for both conditions: slackness is one more row.
    found, residual = nnls(np.vstack([rows.T, excess]), np.r_[unit, 0.0], maxiter=100 * len(values))
    gap = float(np.linalg.norm(unit - found @ rows))
    return MarginKKT(float(residual), gap, float(found @ excess), found, float(least))
