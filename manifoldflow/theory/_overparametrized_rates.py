"""Rates at late times at which label noise makes the overparametrised linear model sparse."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import number, problem

_ZERO = 1e-7  # multipliers below this part of the largest are rounding
_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@checked_concrete
def overparametrized_linear_rates(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    noise_constant: float = 1.0,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The rates at which |uⱼ| and |vⱼ| decay at late times of the label-noise flow.

    With sⱼ = (4/n)Σᵢ zᵢⱼ² the flow has uⱼ² = e^{−csⱼt + xⱼ + const} and vⱼ² = e^{−csⱼt − xⱼ +
    const}, x = Zᵀν(t). At late times ν grows like ctξ, where ξ solves the dual linear program, max
    ⟨y, ξ⟩ subject to |zⱼᵀξ| ≤ sⱼ. So |uⱼ| falls like e^{−(c/2)(sⱼ − zⱼᵀξ)t} and |vⱼ| like
    e^{−(c/2)(sⱼ + zⱼᵀξ)t}. The rate is 0 for what stays: uⱼ where the limit has wⱼ > 0, vⱼ where wⱼ
    < 0. There the other one has the rate csⱼ.

    Where the limit has fewer than n non-zeros there are many such ξ. The flow minimises a sum of
    exponentials, so it picks the one whose slowest rate is the fastest, then the second slowest,
    and so on. Each of these is found by a linear program.

    Args:
        inputs: Z, shape (n, d), finite. A coordinate whose column is zero has rate 0.
        targets: y, shape (n,), finite, in the range of Z.
        noise_constant: c ≥ 0 in Σ = cH.

    Returns:
        The rates of u and of v in float64, each of shape (d,), per unit of the clock kη².

    Raises:
        ValueError: a wrong shape, or a value out of range.
        RuntimeError: the targets cannot be interpolated, or a linear program failed.

    Assumes:
        No coordinate of u and v is 0 at the start: one that is 0 stays 0.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> u_rates, v_rates = theory.overparametrized_linear_rates(
        ...     np.array([[1.0, 2.0]]), np.array([2.0])
        ... )
        >>> print(u_rates.round(3).tolist(), v_rates.round(3).tolist())
        [0.0, 4.0] [4.0, 12.0]

    References:
        [LiWangArora2022, Lemmas 6.5 and D.13]; the rates are new here.
    """
    z, y = problem(inputs, targets)
    scale = number("noise_constant", noise_constant, least=0.0) / 2
    sizes = 4 * np.mean(z * z, axis=0)
    is_used = sizes > 0
    rows, bounds = z[:, is_used].T, sizes[is_used]
    slacks = _slacks(np.vstack([rows, -rows]), np.r_[bounds, bounds], y)
    rates = np.zeros((2, z.shape[1]))
    rates[:, is_used] = scale * slacks.reshape(2, -1)
    return rates[0], rates[1]


def _slacks(rows: np.ndarray, bounds: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The slacks b − Aξ of the ξ with the largest ⟨y, ξ⟩ that keeps farthest from Aξ ≤ b.

    Its least slack is as large as possible, then the next one, and so on.
    """
    fixed = np.full(len(bounds), np.nan)  # the slacks that are known
    if np.any(y):
        fixed[_program(-y, rows, bounds)[1]] = 0.0
    while not _is_settled(rows, fixed):
        is_open = np.isnan(fixed)
        # Variables xi and the least slack of those that are not known yet.
        cost = np.r_[np.zeros(rows.shape[1]), -1.0]
        wide = np.hstack([rows, np.ones((len(rows), 1))])
        even = np.hstack([rows, np.zeros((len(rows), 1))])[~is_open]
        found, is_tight = _program(
            cost, wide[is_open], bounds[is_open], even, (bounds - fixed)[~is_open]
        )
        fixed[np.flatnonzero(is_open)[is_tight]] = max(found[-1], 0.0)
    known = ~np.isnan(fixed)
    xi = np.linalg.lstsq(rows[known], (bounds - fixed)[known], rcond=None)[0]
    return np.where(known, fixed, bounds - rows @ xi)


def _is_settled(rows: np.ndarray, fixed: np.ndarray) -> bool:
    known = ~np.isnan(fixed)
    if not np.any(known):
        return False
    return bool(np.linalg.matrix_rank(rows[known]) == np.linalg.matrix_rank(rows))


def _program(
    cost: np.ndarray,
    rows: np.ndarray,
    bounds: np.ndarray,
    even_rows: np.ndarray | None = None,
    values: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A minimiser of ⟨cost, x⟩ with Ax ≤ b, and the bounds that are tight at every minimiser."""
    # Here, since only linear programs need scipy, which is slow to import.
    from scipy.optimize import linprog

    # In units of the largest cost, since the tolerances of HiGHS are absolute.
    found = linprog(
        cost / np.max(np.abs(cost)), A_ub=rows, b_ub=bounds, A_eq=even_rows, b_eq=values,
        bounds=(None, None), method="highs", options=_TOLERANCES,
    )  # fmt: skip
    if found.status != 0:
        raise RuntimeError(
            f"The dual linear program with {rows.shape} bounds was not solved: {found.message} "
            "Check that the targets lie in the range of the inputs."
        )
    # Strict complementarity: a bound with a positive multiplier is tight at every minimiser.
    multipliers = -found.ineqlin.marginals
    return found.x, multipliers > _ZERO * np.max(multipliers)
