"""Closed forms for the model ``f_i = <z_i, u*u - v*v>`` and its linear programs.

Notation: ``Z`` (n, d) the inputs, ``y`` (n,) the targets, ``w = u*u - v*v``. Gradient flow, and
label noise after it, multiply ``u_j^2`` and ``v_j^2`` by ``e^{-c s_j t + x_j}`` and ``e^{-c s_j t -
x_j}`` with ``x = Z' nu``, so the answer at every time is ``w = e^{p + x} - e^{q - x}`` for
logarithms ``p, q`` that are known, and only ``nu`` (n numbers) has to be found from ``Z w = y``. It
minimises ``sum(e^{p + x} + e^{q - x}) - <nu, y>``: smooth and convex.

Everything here is float64 NumPy, whatever JAX is set to: these are oracles, called outside ``jit``.
"""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked
from manifoldflow.theory._arguments import matrix, number, problem, times_of, vector

_EPS = float(np.finfo(np.float64).eps)
_TINY = 1e-250
_STAGE = 20.0  # nats by which the logarithms p, q may move between two Newton solves
_MAX_NEWTON_STEPS = 500


@checked
def overparametrized_linear_flow(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    u: Num[ArrayLike, "..."],
    v: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
    noise_constant: float = 1.0,
) -> Float[np.ndarray, "*times d"]:
    """The label-noise flow of the overparametrised linear model, in closed form at every time.

    The flow is ``dY/dt = -(c/4) P grad tr H`` on ``{Z (u*u - v*v) = y}`` for the loss ``(1/2n)
    sum_i (<z_i, u*u - v*v> - y_i)^2``, started where gradient flow from ``(u, v)`` lands. With
    ``s_j = (4/n) sum_i z_ij^2``, ``p_j = |u_j v_j| e^{-c s_j t}`` and ``a_j = ln|u_j / v_j|`` its
    answer is ``w(t) = 2 p * sinh(a + Z' nu)`` with ``nu`` fixed by ``Z w = y``. ``time=0`` is the
    limit of gradient flow alone.

    Only logarithms of p are kept, so ``p = e^{-800}`` is harmless. Where the linear program of the
    limit has a solution with fewer than n non-zeros, ``nu`` is no longer resolved at large times
    but ``w`` is: its absolute error stays near ``eps * (1 + c s_j t) * max|w|`` times a constant of
    the inputs. So ``nu`` itself is not returned.

    Args:
        inputs: Z, shape (n, d), finite. Rows may be dependent if the targets are consistent.
        targets: y, shape (n,), finite.
        u: Start coordinates, shape (d,), on the manifold or not. A coordinate that is 0 stays 0 for
        ever.
        v: Start coordinates, shape (d,); likewise.
        time: Limit-clock time(s), finite and >= 0: a scalar, or shape (m,) in any order.
        noise_constant: c in ``Sigma = c H``, finite and >= 0; 1 for label noise of unit variance at
        batch size 1.

    Returns:
        w(t) in float64, shape (d,) for scalar time, (m, d) for m times.

    Raises:
        ValueError: a wrong shape or a value out of range.
        RuntimeError: no w of the given signs fits the targets, or the Newton iteration stalled.

    References:
        [LiWangArora2022, Lemmas 6.3, 6.5 and D.13]
    """
    z, y = problem(inputs, targets)
    u, v = vector("u", u, z.shape[1]), vector("v", v, z.shape[1])
    times = times_of(time)
    rates = _decay_rates(z, noise_constant)
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: that part of w_j is absent
        log_plus, log_minus = 2.0 * np.log(np.abs(u)), 2.0 * np.log(np.abs(v))
    flat = times.reshape(-1)
    answer = np.empty((flat.size, z.shape[1]))
    state = _Dual(z, y, log_plus, log_minus)
    for k in np.argsort(flat, kind="stable"):
        decay = rates * flat[k]
        answer[k] = state.move_to(log_plus - decay, log_minus - decay)
    return answer.reshape(times.shape + (z.shape[1],))


@checked
def overparametrized_linear_charges(
    inputs: Num[ArrayLike, "..."],
    u: Num[ArrayLike, "..."],
    v: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
    noise_constant: float = 1.0,
) -> Float[np.ndarray, "*times d"]:
    """The products ``u_j v_j`` along the label-noise flow: ``u_j(0) v_j(0) e^{-c s_j t}``.

    ``s_j = (4/n) sum_i z_ij^2``. Gradient flow conserves them, label noise makes each decay at its
    own rate; with ``w(t)`` they give the point: ``u_j^2 + v_j^2 = sqrt(w_j^2 + 4 (u_j v_j)^2)``.

    Args:
        inputs: Z, shape (n, d), finite.
        u: Start coordinates, shape (d,), on the manifold or not.
        v: Start coordinates, shape (d,).
        time: Limit-clock time(s), finite and >= 0: a scalar, or shape (m,).
        noise_constant: c in ``Sigma = c H``, finite and >= 0.

    Returns:
        The products in float64, shape (d,) or (m, d).

    Raises:
        ValueError: a wrong shape or a value out of range.

    References:
        [LiWangArora2022, Lemma D.13]
    """
    z = matrix("inputs", inputs)
    u, v = vector("u", u, z.shape[1]), vector("v", v, z.shape[1])
    return u * v * np.exp(-_decay_rates(z, noise_constant) * times_of(time)[..., None])


@checked
def weighted_l1_interpolant(
    inputs: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."]
) -> Float[np.ndarray, " d"]:
    """Where label noise ends: ``argmin sum_j (sum_i z_ij^2) |w_j|`` subject to ``Z w = y``, a
    linear program.

    A coordinate whose column of Z is zero costs nothing and fits nothing; it is returned as 0.
    Where the minimiser is not unique this is one of its vertices, and not the one that the flow
    picks.

    Args:
        inputs: Z, shape (n, d), finite.
        targets: y, shape (n,), finite, in the range of Z.

    Returns:
        w in float64, shape (d,), with at most n non-zeros.

    Raises:
        ValueError: a wrong shape or a value that is not finite.
        RuntimeError: the targets cannot be interpolated, or the linear program failed.

    References:
        [LiWangArora2022, Lemma 6.5]
    """
    # Here, since only this oracle needs scipy, which is slow to import.
    from scipy.optimize import linprog

    z, y = problem(inputs, targets)
    cost = np.sum(z * z, axis=0)
    tolerances = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    program = linprog(
        np.r_[cost, cost], A_eq=np.hstack([z, -z]), b_eq=y, method="highs", options=tolerances
    )
    if program.status != 0:
        raise RuntimeError(
            f"The linear program of shape {z.shape} was not solved: {program.message} "
            "Check that the targets lie in the range of the inputs (n <= d and independent "
            "rows suffice)."
        )
    plus, minus = np.split(program.x, 2)
    return np.where(cost > 0.0, plus - minus, 0.0)


@checked
def kernel_rich_interpolant(
    inputs: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."], *, scale: float
) -> Float[np.ndarray, " d"]:
    """The interpolant that gradient flow on ``<w_+^2 - w_-^2, x>`` picks from ``w_+ = w_- = alpha
    1``.

    It minimises ``Q_alpha(theta) = alpha^2 sum_j q(theta_j / alpha^2)``, ``q'(z) = arcsinh(z/2)``,
    subject to ``X theta = y``: ``theta = 2 alpha^2 sinh(X' nu)``. The least l1 norm as alpha -> 0
    (the rich regime), the least l2 norm as alpha -> infinity (the kernel regime).

    Args:
        inputs: X, shape (n, d), finite.
        targets: y, shape (n,), finite, in the range of X.
        scale: alpha, finite and > 0.

    Returns:
        theta in float64, shape (d,).

    Raises:
        ValueError: a wrong shape or a value out of range.
        RuntimeError: the targets cannot be interpolated, or the Newton iteration stalled.

    References:
        [Woodworth2020, Theorem 1]; [Ma2022, chapter 9]
    """
    x, y = problem(inputs, targets)
    log_scale = np.full(x.shape[1], 2.0 * np.log(number("scale", scale, least=0.0, strict=True)))
    return _Dual(x, y, log_scale, log_scale).move_to(log_scale, log_scale)


@checked
def min_norm_interpolant(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    start: Num[ArrayLike, "..."] | None = None,
) -> Float[np.ndarray, " d"]:
    """Where gradient descent on linear regression lands: ``X^+ y + (I - X^+ X) beta_0``.

    The interpolant (or least-squares solution) nearest to the start.

    Args:
        inputs: X, shape (n, d), finite, of any rank.
        targets: y, shape (n,), finite.
        start: beta_0, shape (d,), finite; 0 if not given.

    Returns:
        beta in float64, shape (d,).

    Raises:
        ValueError: a wrong shape or a value that is not finite.

    References:
        [Ma2022, chapter 9]
    """
    x, y = problem(inputs, targets)
    origin = np.zeros(x.shape[1]) if start is None else vector("start", start, x.shape[1])
    return origin + np.linalg.lstsq(x, y - x @ origin, rcond=None)[0]


class _Dual:
    """Follows the solution nu of ``Z (e^{p + Z'nu} - e^{q - Z'nu}) = y`` as p and q move."""

    def __init__(self, z: np.ndarray, y: np.ndarray, log_plus: np.ndarray, log_minus: np.ndarray):
        size = np.max(np.abs(np.linalg.lstsq(z, y, rcond=None)[0]))
        easy = (
            np.log(size) if size > 0.0 else 0.0
        )  # p = q = ln|w|: there the dual is nearly quadratic
        self.z, self.y, self.nu = z, y, np.zeros(z.shape[0])
        self.plus = np.where(np.isfinite(log_plus), easy, -np.inf)
        self.minus = np.where(np.isfinite(log_minus), easy, -np.inf)

    def move_to(self, log_plus: np.ndarray, log_minus: np.ndarray) -> np.ndarray:
        """Continue to new logarithms by stages, nu predicted on a line; returns w there."""
        change_plus, change_minus = (
            _difference(log_plus, self.plus),
            _difference(log_minus, self.minus),
        )
        length = np.max(np.abs(np.r_[change_plus, change_minus]))
        origin_plus, origin_minus, done, stage = self.plus, self.minus, 0.0, _STAGE
        slope, w = np.zeros_like(self.nu), None
        while w is None or done < length:
            reach = min(done + stage, length)
            fraction = reach / length if length > 0.0 else 1.0
            self.plus, self.minus = (
                origin_plus + fraction * change_plus,
                origin_minus + fraction * change_minus,
            )
            # A long stage must be easy; a short one starts where the last ended, from where Newton
            # always converges.
            bold = stage > _STAGE
            guess = self.nu + (reach - done) * slope if bold else self.nu
            found = self._newton(guess, 20 if bold else _MAX_NEWTON_STEPS)
            if found is None:
                stage = max(_STAGE, stage / 8.0)
                continue
            nu, w = found
            if reach > done:
                slope = (nu - self.nu) / (reach - done)
            self.nu, done, stage = nu, reach, 2.0 * stage
        return w

    def _newton(self, nu: np.ndarray, max_steps: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Damped Newton; the step ln(1+m)/m, m = max|Z' dnu|, descends for sums of exponentials."""
        z, y = self.z, self.y
        error, best = np.inf, None
        for _ in range(max_steps):
            x = z.T @ nu
            with np.errstate(over="ignore", invalid="ignore"):
                plus, minus = np.exp(self.plus + x), np.exp(self.minus - x)
                gap = self.plus - self.minus + 2.0 * x
                w = np.where(
                    np.abs(gap) < 1.0, minus * np.expm1(gap), plus - minus
                )  # p = q >> |w| must not cancel
                hessian = (z * (plus + minus)) @ z.T
            if not np.all(np.isfinite(hessian)):
                break
            residual = y - z @ w
            previous, error = error, np.max(np.abs(residual))
            if error <= self._tolerance(plus + minus, x):
                if best is not None and error > 0.5 * previous:  # rounding is reached
                    return best
                best = nu, w
            # Off the support of the limit the weights fall like p: the shift bounds steps along
            # what is not resolved.
            shift = 4.0 * _EPS * np.trace(hessian) + _TINY
            step = np.linalg.solve(hessian + shift * np.eye(len(y)), residual)
            longest = np.max(np.abs(z.T @ step))
            nu = nu + (np.log1p(longest) / longest if longest > 0.0 else 1.0) * step
        if best is not None or max_steps < _MAX_NEWTON_STEPS:
            return best
        raise RuntimeError(
            f"Newton found no interpolant in {max_steps} steps: max|Z w - y| is {error:.3e}. "
            "The targets must lie in the range of the inputs, with signs that the non-zero "
            "start coordinates can "
            "produce (u_j = 0 keeps w_j <= 0, v_j = 0 keeps w_j >= 0)."
        )

    def _tolerance(self, weight: np.ndarray, x: np.ndarray) -> float:
        """What rounding leaves of the residual: x has relative error eps and size -ln p."""
        return (
            16.0
            * _EPS
            * (1.0 + np.max(np.abs(x)))
            * np.max(np.abs(self.z) @ weight + np.abs(self.y), initial=0.0)
        )


def _difference(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(old), new, 0.0) - np.where(np.isfinite(old), old, 0.0)


def _decay_rates(z: np.ndarray, noise_constant: float) -> np.ndarray:
    """c s_j with s_j = (4/n) sum_i z_ij^2."""
    return number("noise_constant", noise_constant, least=0.0) * 4.0 * np.mean(z * z, axis=0)
