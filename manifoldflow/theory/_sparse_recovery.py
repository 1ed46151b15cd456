"""How many examples a sparse truth needs: with label noise, and in the kernel regime.

Everything here is float64 NumPy, called outside ``jit``.
"""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import finite, matrix, number, vector

_EPS = float(np.finfo(np.float64).eps)
# Which part of an eigenvalue is given away, in the bound for Boolean inputs: each is valid.
_PARTS = np.linspace(0.02, 0.98, 97)


@checked
def kernel_regime_error_bound(num_examples: int, truth: Num[ArrayLike, "..."]) -> float:
    """The error ``E |w - w*|^2 >= (1 - n/d) |w*|^2`` of gradient descent in the kernel regime.

    For ``f_i = <z_i, u*u - v*v>``, linearised at ``u = v = alpha 1``, after any number of steps
    with any learning rates: w stays in the span of the n inputs, of which the projection of w* is
    on average the part n/d. Mini-batches and label noise do not leave the span either. For inputs
    of covariance I this error is the expected squared error on a new one, ``E <z, w - w*>^2``.

    Args:
        num_examples: n; from d on the bound is 0.
        truth: w*, shape (d,), finite. Its zeros count: they make d.

    Raises:
        ValueError: a wrong shape or value.

    Assumes:
        inputs that are drawn independently of w*, and whose law does not change under rotations,
        as Gaussian ones, or under permutations and changes of sign of the coordinates, as Boolean
        ones: then the projection on their span is on average (rank/d) I.

    Example:
        >>> theory.kernel_regime_error_bound(30, np.eye(100)[0])
        0.7

    References:
        [LiWangArora2022, Theorem 6.7]
    """
    w = finite("truth", truth)
    w = vector("truth", w, w.size)
    return max(1 - num_examples / w.size, 0.0) * float(np.sum(w * w))


class RecoveryCertificate(NamedTuple):
    """Whether a vector is the only minimiser of a weighted l1 norm, with the proof.

    Attributes:
        margin: 1 - max |z_j' nu|/c_j over j off the support; at most 1. Above 0 the vector is the
            only minimiser, if its columns are independent. The largest margin of all nu: at 0 it
            is one minimiser of several, below 0 it is none.
        dual: nu, shape (n,), with ``z_j' nu = c_j sign(w_j)`` on the support. None, with a
            margin of minus infinity, if there is none.
        injectivity: the least singular value of the columns of the support, brought to length 1.
        is_unique: whether margin and injectivity are above what rounding can make of 0.
    """

    margin: float
    dual: Float[np.ndarray, " n"] | None
    injectivity: float
    is_unique: bool


@checked
def sparse_recovery_certificate(
    inputs: Num[ArrayLike, "..."],
    truth: Num[ArrayLike, "..."],
    *,
    weights: Num[ArrayLike, "..."] | None = None,
) -> RecoveryCertificate:
    """Whether w* is the only minimiser of ``sum_j c_j |w_j|`` subject to ``Z w = Z w*``.

    That is so if and only if the columns of its support are independent and some nu has ``z_j' nu
    = c_j sign(w*_j)`` there and ``|z_j' nu| < c_j`` elsewhere. The best nu is found by a linear
    program, and then checked by itself: w* costs less than any other fit, for
    ``sum_j c_j |w_j| >= sum_j c_j |w*_j| + margin * (sum of c_j |w_j| off the support)``.
    With the weights of the model ``<z, u*u - v*v>`` label noise then ends at w* from every start.

    Args:
        inputs: Z, shape (n, d), finite, without a column of zeros.
        truth: w*, shape (d,), finite. Its support is where it is not 0: round what was computed.
        weights: c > 0, shape (d,); ``sum_i z_ij^2`` if not given.

    Raises:
        ValueError: a wrong shape or value.
        RuntimeError: the linear program failed.

    References:
        [LiWangArora2022, Lemmas 6.6 and D.6]; J.-J. Fuchs, On sparse representations in arbitrary
        redundant bases, IEEE Trans. Inform. Theory 50 (2004); H. Zhang, W. Yin, L. Cheng,
        Necessary and sufficient conditions of solution uniqueness in 1-norm minimization, JOTA 164
        (2015).
    """
    z = matrix("inputs", inputs)
    w = vector("truth", truth, z.shape[1])
    size = np.max(np.abs(z))
    z = z / (size if size > 0 else 1.0)
    lengths = np.sqrt(np.sum(z * z, axis=0))
    if np.any(lengths == 0.0):
        place = int(np.argmin(lengths))
        raise ValueError(
            f"inputs: column {place} is zero, so that w_{place} is free; leave such columns out."
        )
    given = None if weights is None else vector("weights", weights, z.shape[1])
    costs = lengths**2 if given is None else given
    if np.any(costs <= 0.0):
        raise ValueError(f"weights: got {np.min(costs)}, expected all > 0.")
    costs = costs / np.max(costs)  # nu and the costs have one scale between them
    on = w != 0.0
    dual = _best_dual(z / costs, on, np.sign(w))
    columns = z[:, on] / lengths[on]
    least = 1.0 if not on.any() else _least_singular(columns)
    is_injective = least > max(columns.shape) * _EPS
    if dual is None:
        return RecoveryCertificate(-math.inf, None, least, False)
    pulls = (z.T @ dual) / costs
    rounding = 8 * len(z) * _EPS * (1 + np.max(np.abs(z).T @ np.abs(dual) / costs))
    missed = np.max(np.abs(pulls - np.sign(w)), where=on, initial=0.0)
    margin = 1.0 - float(np.max(np.abs(pulls), where=~on, initial=0.0))
    is_unique = bool(is_injective and margin > rounding + missed)
    scale = np.max(lengths**2) * size if given is None else np.max(given) / size
    return RecoveryCertificate(margin, dual * scale, least, is_unique)


def _least_singular(columns: Float[np.ndarray, "n k"]) -> float:
    n, k = columns.shape
    return 0.0 if k > n else float(np.linalg.svd(columns, compute_uv=False)[-1])


def _best_dual(
    a: Float[np.ndarray, "n d"], on: np.ndarray, signs: np.ndarray
) -> Float[np.ndarray, " n"] | None:
    """argmin max_off |a_j' nu| subject to a_j' nu = sign_j on the support; None if none exists."""
    from scipy.optimize import linprog  # slow to import

    n, off = len(a), a[:, ~on].T
    bound = np.ones((len(off), 1))
    program = linprog(
        np.r_[np.zeros(n), 1.0],
        A_ub=np.block([[off, -bound], [-off, -bound]]),
        b_ub=np.zeros(2 * len(off)),
        A_eq=np.c_[a[:, on].T, np.zeros(np.sum(on))],
        b_eq=signs[on],
        bounds=[(None, None)] * n + [(0, None)],
        method="highs",
    )
    if program.status == 2:
        return None
    if program.status != 0:
        raise RuntimeError(
            f"The linear program of shape {a.shape} was not solved: {program.message} "
            "Bring the columns of the inputs to similar lengths."
        )
    dual = program.x[:n]
    # The solver's equations hold to 1e-7; here they hold to rounding.
    return dual + np.linalg.lstsq(a[:, on].T, signs[on] - a[:, on].T @ dual, rcond=None)[0]


@checked
def sparse_recovery_sample_size(
    num_features: int,
    sparsity: int,
    *,
    failure_probability: float = 0.05,
    design: str = "gaussian",
) -> int:
    """How many examples suffice for label noise to recover a sparse truth, with this probability.

    A number of the order of ``kappa ln d`` that comes with a proof, not the least that works, which
    is several times smaller. Where it is above d it says nothing: d Gaussian examples suffice.

    Gaussian inputs [LiWangArora2022, Lemmas D.8 and D.9]: with ``s = sqrt(n - 1) - sqrt(kappa) - 3
    sqrt(2 kappa ln(2(d - kappa)))`` recovery fails with probability at most ``e^{-s^2/2} + d P(|q -
    n| > n/2)`` for s > 0, q chi-squared with n degrees of freedom. The lemma takes half of
    ``sqrt(n - 1)`` for s and leaves C and c open; here the tail of q is exact.

    Boolean inputs: Lemma D.7 quotes a theorem with constants that are not specified. Here it is the
    dual vector ``nu = n Z_S (Z_S' Z_S)^{-1} sign(w*)`` instead, which fails with probability at
    most ``kappa (e^{-x}/(1-x)^{1-x})^{n/kappa} + 2(d - kappa) e^{-n(1-x)/(2 kappa)}`` for any x in
    (0, 1): a matrix Chernoff bound for ``Z_S' Z_S >= n(1-x)``, and Hoeffding's inequality.

    Args:
        num_features: d > kappa.
        sparsity: kappa >= 1, of a truth that is fixed before the inputs are drawn.
        failure_probability: between 0 and 1, over the draw of the inputs.
        design: "gaussian" or "boolean", as of `models.sparse_regression`.

    Returns:
        The least n for which that bound is at most `failure_probability`.

    Raises:
        ValueError: a value out of range.

    References:
        [LiWangArora2022, Lemmas 6.6 and D.7-D.9]; J. Tropp, User-friendly tail bounds for sums of
        random matrices, Found. Comput. Math. 12 (2012), Theorem 1.1.
    """
    probability = number("failure_probability", failure_probability, least=0.0, strict=True)
    if probability >= 1.0:
        raise ValueError(f"failure_probability: got {probability}, expected between 0 and 1.")
    if not 1 <= sparsity < num_features:
        raise ValueError(
            f"sparsity: got {sparsity}, expected between 1 and d - 1 = {num_features - 1}."
        )
    bounds = {"gaussian": _gaussian_failure, "boolean": _boolean_failure}
    if design not in bounds:
        raise ValueError(f'design: got {design!r}, expected "gaussian" or "boolean".')
    low, high = sparsity, sparsity + 1  # the bound falls with n
    while bounds[design](high, num_features, sparsity) > probability:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fails = bounds[design](middle, num_features, sparsity) > probability
        low, high = (middle, high) if fails else (low, middle)
    return high


def _gaussian_failure(n: int, d: int, sparsity: int) -> float:
    from scipy.special import gammainc, gammaincc

    width = math.sqrt(sparsity) + 3 * math.sqrt(2 * sparsity * math.log(2 * (d - sparsity)))
    slack = math.sqrt(n - 1) - width
    tails = float(gammainc(n / 2, n / 4) + gammaincc(n / 2, 3 * n / 4))
    return 1.0 if slack <= 0 else math.exp(-(slack**2) / 2) + d * tails


def _boolean_failure(n: int, d: int, sparsity: int) -> float:
    ratio = n / sparsity
    support = sparsity * np.exp(ratio * (-_PARTS - (1 - _PARTS) * np.log1p(-_PARTS)))
    others = 2 * (d - sparsity) * np.exp(-ratio * (1 - _PARTS) / 2)
    return float(np.min(support + others))
