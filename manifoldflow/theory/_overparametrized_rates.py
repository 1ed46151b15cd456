"""How fast label noise makes the overparametrised linear model sparse: its rates at late times."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import number, problem

_ZERO = 1e-7  # multipliers below this part of the largest are rounding
_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@checked
def overparametrized_linear_rates(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    *,
    noise_constant: float = 1.0,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The rates at which ``|u_j|`` and ``|v_j|`` decay at late times of the label-noise flow.

    With ``s_j = (4/n) sum_i z_ij^2`` the flow has ``u_j^2 = e^{-c s_j t + x_j + const}`` and
    ``v_j^2 = e^{-c s_j t - x_j + const}``, ``x = Z' nu(t)``. At late times nu grows like ``c t xi``
    with xi a solution of the dual linear program, ``max <y, xi>`` subject to ``|z_j' xi| <= s_j``,
    so that ``|u_j|`` falls like ``e^{-(c/2)(s_j - z_j' xi) t}`` and ``|v_j|`` like
    ``e^{-(c/2)(s_j + z_j' xi) t}``. The rate is 0 for what stays: ``u_j`` where the limit has ``w_j
    > 0``, ``v_j`` where ``w_j < 0``; there the other one has ``c s_j``.

    Where the limit has fewer than n non-zeros there are many such xi. The flow minimises a sum of
    exponentials, so it picks the one whose slowest rate is the fastest, then the second slowest,
    and so on; it is found by a linear program for each of them.

    Args:
        inputs: Z, shape (n, d), finite. A coordinate whose column is zero has rate 0.
        targets: y, shape (n,), finite, in the range of Z.
        noise_constant: c in ``Sigma = c H``, finite and >= 0.

    Returns:
        The rates of u and of v in float64, each of shape (d,), per unit of the limit clock.

    Raises:
        ValueError: a wrong shape or a value out of range.
        RuntimeError: the targets cannot be interpolated, or a linear program failed.

    Assumes:
        No coordinate of u and v is 0 at the start: one that is stays 0.

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
    """b - A xi for the one of all xi with the largest <y, xi>, A xi <= b, that keeps farthest from
    the bounds: its least slack is as large as it can be, then the next, and so on."""
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
    """A minimiser of <cost, x> with A x <= b, and which bounds are tight at every minimiser."""
    # Here, since only linear programs need scipy, which is slow to import.
    from scipy.optimize import linprog

    found = linprog(
        cost / np.max(np.abs(cost)), A_ub=rows, b_ub=bounds, A_eq=even_rows, b_eq=values,
        bounds=(None, None), method="highs", options=_TOLERANCES,
    )  # fmt: skip
    if found.status != 0:
        raise RuntimeError(
            f"The dual linear program with {rows.shape} bounds was not solved: {found.message} "
            "Check that the targets lie in the range of the inputs."
        )
    multipliers = -found.ineqlin.marginals
    return found.x, multipliers > _ZERO * np.max(multipliers)
