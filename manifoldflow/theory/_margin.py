"""Where gradient descent on separable data goes: directions of largest margin."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import finite, matrix, number, problem, vector


@checked
def max_margin_direction(
    inputs: Num[ArrayLike, "..."], labels: Num[ArrayLike, "..."]
) -> Float[np.ndarray, " d"]:
    """The unit w with the largest ``min_i y_i <w, x_i>``: a hard-margin support vector machine.

    Gradient flow and gradient descent on the logistic or exponential loss of separable data
    converge to it in direction, from any start. Solved as a least-distance problem, ``min |w|``
    subject to ``y_i <w, x_i> >= 1``, by non-negative least squares.

    Args:
        inputs: X, shape (n, d), finite; add a column of ones for a bias.
        labels: y, shape (n,), -1 or 1.

    Returns:
        w in float64, shape (d,), of length 1.

    Raises:
        ValueError: a wrong shape, labels other than -1 and 1, or data that no plane through
            the origin separates.

    References:
        [Soudry2018]; C. Lawson, R. Hanson, Solving Least Squares Problems, chapter 23.
    """
    # Here, since scipy is slow to import and only some oracles need it.
    from scipy.optimize import nnls

    x, y = problem(inputs, labels)
    if not np.all(np.abs(y) == 1.0):
        raise ValueError(f"labels: got {np.unique(y)[:5]}, expected -1 and 1 only.")
    constraints = y[:, None] * x
    scale = np.max(np.linalg.norm(x, axis=1))
    if scale == 0.0:
        raise ValueError("inputs: got zeros only, expected data that can be separated.")
    system = np.vstack([constraints.T / scale, np.ones(len(y))])
    wanted = np.zeros(len(system))
    wanted[-1] = 1.0
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
    """How far a point is from stationary for the margin.

    Attributes:
        residual: of both conditions together, between 0 and 1; 0 exactly where both hold.
        stationarity: ``|u - sum_i lambda_i y_i grad f_i|`` for the unit vector u.
        slackness: ``1 - k gamma sum_i lambda_i``, the share of examples beyond the margin.
        multipliers: lambda, shape (n,), not negative; positive for support vectors only.
        margin: gamma, ``min_i y_i f_i(u)``.
    """

    residual: float
    stationarity: float
    slackness: float
    multipliers: Float[np.ndarray, " n"]
    margin: float


@checked
def margin_kkt(
    point: Num[ArrayLike, "..."],
    margins: Num[ArrayLike, "..."],
    gradients: Num[ArrayLike, "..."],
    *,
    degree: float = 1.0,
) -> MarginKKT:
    """How nearly a point is stationary for ``min |theta|`` subject to ``y_i f_i(theta) >= 1``.

    For outputs that are homogeneous of degree k, ``f(c theta) = c^k f(theta)``, as of a network of
    k layers without biases. Gradient descent on the logistic or exponential loss, once it separates
    the data, goes to such a direction: with the unit vector ``u = theta/|theta|`` and gamma its
    margin there are ``lambda >= 0`` with

        u = sum_i lambda_i y_i grad f_i(u),   lambda_i (y_i f_i(u) - gamma) = 0.

    The lambda here minimise the squares of both, ``|u - sum_i lambda_i y_i grad f_i|^2 + (k sum_i
    lambda_i (y_i f_i - gamma))^2``, and `residual` is the root of that. For a linear model the
    margin is at least ``(1 - sqrt(5) residual)`` of the largest; a network may have many such
    directions. Where an output has a kink, as of a ReLU at 0, any subgradient would do; only the
    one that is given counts here.

    Args:
        point: theta, shape (D,), of any length but 0.
        margins: ``y_i f_i(theta)``, shape (n,), all positive.
        gradients: ``y_i grad f_i(theta)``, shape (n, D).
        degree: k > 0.

    Returns:
        `MarginKKT`.

    Raises:
        ValueError: a wrong shape, a point that does not separate the labels, or margins and
            gradients that are not those of this degree, ``<grad f_i, theta> = k f_i``.

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
    unit, least = theta / length, np.min(values) / length**k
    rows = slopes / length ** (k - 1)
    excess = k * (values / length**k - least)
    found, residual = nnls(np.vstack([rows.T, excess]), np.r_[unit, 0.0], maxiter=100 * len(values))
    gap = float(np.linalg.norm(unit - found @ rows))
    return MarginKKT(float(residual), gap, float(found @ excess), found, float(least))
