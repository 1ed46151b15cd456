"""The number of examples that a sparse truth needs: with label noise, and in the kernel regime."""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import finite, matrix, number, vector

_EPS = float(np.finfo(np.float64).eps)
# Measured: up to this ratio of column lengths margins agree with those in other units to 1e-5.
_MAX_RATIO = 1e12
# Which part of an eigenvalue is given away, in the bound for Boolean inputs: each is valid.
_PARTS = np.linspace(0.02, 0.98, 97)


@checked_concrete
def kernel_regime_error_bound(num_examples: int, truth: Num[ArrayLike, "..."]) -> float:
    """The bound (1 − n/d)‖w*‖² ≤ E‖w − w*‖² for gradient descent in the kernel regime.

    It holds for fᵢ = ⟨zᵢ, u⊙u − v⊙v⟩, linearised at u = v = α·1, after any number of steps with any
    learning rates. The weights w stay in the span of the n inputs, and the projection of w* on that
    span is on average the part n/d. Mini-batches and label noise do not leave the span either. For
    inputs of covariance I this error is the expected squared error on a new one, E⟨z, w − w*⟩².

    Args:
        num_examples: n; from d on the bound is 0.
        truth: w*, shape (d,), finite. Its zeros count: they make d.

    Returns:
        The bound, a Python float.

    Raises:
        ValueError: a wrong shape or value.

    Assumes:
        inputs that are drawn independently of w*, and whose law does not change under rotations
        (such as Gaussian ones), or under permutations and changes of sign of the coordinates (such
        as Boolean ones). Then the projection on their span is on average (rank/d)·I.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> theory.kernel_regime_error_bound(30, np.eye(100)[0])
        0.7

    References:
        [LiWangArora2022, Theorem 6.7].
    """
    w = finite("truth", truth)
    w = vector("truth", w, w.size)
    return max(1 - num_examples / w.size, 0.0) * float(np.sum(w * w))


class RecoveryCertificate(NamedTuple):
    """The verdict on whether a vector is the only minimiser of a weighted ℓ₁ norm, with the proof.

    Attributes:
        margin: 1 − max |zⱼᵀν|/cⱼ over j off the support, for the ν with the largest one; at most 1.
            Above 0 the vector is the only minimiser, if the columns of its support are independent.
            At 0 it is one minimiser of several, below 0 it is none. −inf where no ν exists.
        dual: ν, shape (n,), with zⱼᵀν = cⱼ·sign(wⱼ) on the support; None where no ν exists.
        injectivity: the least singular value of the columns of the support, scaled to length 1.
        is_unique: True where margin and injectivity are above rounding.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> found = theory.sparse_recovery_certificate(np.array([[1.0, 2.0]]), np.array([1.0, 0.0]))
        >>> isinstance(found, theory.RecoveryCertificate), found.margin
        (True, 0.5)
    """

    margin: float
    dual: Float[np.ndarray, " n"] | None
    injectivity: float
    is_unique: bool


@checked_concrete
def sparse_recovery_certificate(
    inputs: Num[ArrayLike, "..."],
    truth: Num[ArrayLike, "..."],
    *,
    weights: Num[ArrayLike, "..."] | None = None,
) -> RecoveryCertificate:
    """The proof that w* is the only minimiser of Σⱼ cⱼ|wⱼ| subject to Zw = Zw*, or that it is not.

    It is the only one if and only if the columns of its support are independent and some ν has zⱼᵀν
    = cⱼ·sign(w*ⱼ) there and |zⱼᵀν| < cⱼ elsewhere. The best ν is found by a linear program, and
    then checked by itself: w* costs less than any other fit, since Σⱼ cⱼ|wⱼ| ≥ Σⱼ cⱼ|w*ⱼ| +
    margin·(Σ cⱼ|wⱼ| off the support). With the weights of the model ⟨z, u⊙u − v⊙v⟩ label noise then
    ends at w* from every start.

    Args:
        inputs: Z, shape (n, d), finite, without a column of zeros.
        truth: w*, shape (d,), finite. Its support is where it is not 0: round what was computed.
        weights: c > 0, shape (d,), with ‖zⱼ‖/cⱼ over at most 12 decades; None for Σᵢ zᵢⱼ².

    Returns:
        A `RecoveryCertificate`.

    Raises:
        ValueError: a wrong shape or value; weights beyond what a linear program in double precision
            resolves.
        RuntimeError: the linear program failed.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> inputs = np.array([[1.0, 2.0]])
        >>> print(theory.sparse_recovery_certificate(inputs, np.array([1.0, 0.0])).is_unique)
        True
        >>> print(theory.sparse_recovery_certificate(inputs, np.array([0.0, 0.5])).is_unique)
        False

    References:
        [LiWangArora2022, Lemmas 6.6 and D.6]; J.-J. Fuchs, On sparse representations in arbitrary
        redundant bases, IEEE Trans. Inform. Theory 50 (2004); H. Zhang, W. Yin, L. Cheng, Necessary
        and sufficient conditions of solution uniqueness in 1-norm minimization, JOTA 164 (2015).
    """
    z = matrix("inputs", inputs)
    w = vector("truth", truth, z.shape[1])
    size = np.max(np.abs(z))
    # In units of the largest entry: HiGHS has absolute tolerances.
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
    _check_decades(lengths / costs)
    on = w != 0.0
    dual = _best_dual(z / costs, on, np.sign(w))
    columns = z[:, on] / lengths[on]
    least = 1.0 if not on.any() else _least_singular(columns)
    is_injective = least > max(columns.shape) * _EPS
    if dual is None and is_injective:
        raise RuntimeError(
            f"The linear program of shape {z.shape} found no dual vector, though there is one: the "
            "columns of the support are independent. Bring the columns of the inputs to similar "
            "lengths."
        )
    if dual is None:
        return RecoveryCertificate(-math.inf, None, least, False)
    pulls = (z.T @ dual) / costs
    # A bound on the rounding of zⱼᵀν, so that a margin of rounding proves nothing.
    rounding = 8 * len(z) * _EPS * (1 + np.max(np.abs(z).T @ np.abs(dual) / costs))
    missed = np.max(np.abs(pulls - np.sign(w)), where=on, initial=0.0)
    margin = 1.0 - float(np.max(np.abs(pulls), where=~on, initial=0.0))
    is_unique = bool(is_injective and margin > rounding + missed)
    scale = np.max(lengths**2) * size if given is None else np.max(given) / size
    return RecoveryCertificate(margin, dual * scale, least, is_unique)


def _check_decades(lengths: Float[np.ndarray, " d"]) -> None:
    """Refuse columns z_j/c_j whose lengths the linear program cannot hold together.

    HiGHS takes coefficients above 1e15 for infinite and calls the program infeasible.
    """
    ratio = float(np.max(lengths) / np.min(lengths))
    if not ratio <= _MAX_RATIO:
        raise ValueError(
            f"weights: got |z_j|/c_j over a ratio of {ratio:.1e}, expected at most "
            f"{_MAX_RATIO:.0e}, which a linear program in double precision resolves; bring the "
            "weights and the columns of the inputs to similar scales."
        )


def _least_singular(columns: Float[np.ndarray, "n k"]) -> float:
    n, k = columns.shape
    return 0.0 if k > n else float(np.linalg.svd(columns, compute_uv=False)[-1])


def _best_dual(
    a: Float[np.ndarray, "n d"], on: np.ndarray, signs: np.ndarray
) -> Float[np.ndarray, " n"] | None:
    """argmin max_off |aⱼᵀν| subject to aⱼᵀν = signⱼ on the support; None if no such ν exists."""
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


@checked_concrete
def sparse_recovery_sample_size(
    num_features: int,
    sparsity: int,
    *,
    failure_probability: float = 0.05,
    design: str = "gaussian",
) -> int:
    """The number of examples with which label noise provably recovers a sparse truth.

    It is of the order κ·ln d and comes with a proof; the least number that works is several times
    smaller. Where it is above d it says nothing, as d Gaussian examples suffice.

    Gaussian inputs [LiWangArora2022, Lemmas D.8 and D.9]: with s = √(n − 1) − √κ − 3√(2κ·ln(2(d −
    κ))) recovery fails with probability at most e^{−s²/2} + d·P(|q − n| > n/2) for s > 0, q
    chi-squared with n degrees of freedom. The lemma takes half of √(n − 1) for s and leaves C and c
    open; here the tail of q is exact.

    Boolean inputs: Lemma D.7 quotes a theorem with constants that are not specified. Used here is
    the dual vector ν = nZ_S(Z_SᵀZ_S)⁻¹sign(w*), which fails with probability at most κ(e⁻ˣ/(1 −
    x)^{1−x})^{n/κ} + 2(d − κ)e^{−n(1−x)/(2κ)} for any x in (0, 1): a matrix Chernoff bound for
    Z_SᵀZ_S ≥ n(1 − x), and Hoeffding's inequality.

    Args:
        num_features: d > κ.
        sparsity: κ ≥ 1, of a truth that is fixed before the inputs are drawn.
        failure_probability: in (0, 1), over the draw of the inputs.
        design: "gaussian" or "boolean", like that of `models.sparse_regression`.

    Returns:
        The least n for which that bound is at most `failure_probability`.

    Raises:
        ValueError: a value out of range.

    Examples:
        >>> from manifoldflow import theory
        >>> theory.sparse_recovery_sample_size(10_000, 3, design="boolean")
        140

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
    # Doubling, then bisection: each evaluation is one closed form.
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
