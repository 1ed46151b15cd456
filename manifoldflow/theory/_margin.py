"""Where gradient flow on separable data goes: the direction of largest margin."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import finite, problem


@checked
def max_margin_direction(
    inputs: Num[ArrayLike, "..."], labels: Num[ArrayLike, "..."]
) -> Float[np.ndarray, " d"]:
    """The unit w with the largest ``min_i y_i <w, x_i>``: a hard-margin support vector machine.

    Gradient flow on the logistic or exponential loss of separable data converges to it in
    direction. Solved as a least-distance problem, ``min |w|`` subject to ``y_i <w, x_i> >= 1``, by
    non-negative least squares.

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
