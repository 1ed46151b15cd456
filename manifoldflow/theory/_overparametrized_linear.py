"""Closed forms of the model fᵢ = ⟨zᵢ, u⊙u − v⊙v⟩, and its linear programs.

Notation: Z (n, d) the inputs, y (n,) the targets, w = u⊙u − v⊙v. Gradient flow, and label noise
after it, multiply uⱼ² and vⱼ² by e^{−csⱼt + xⱼ} and e^{−csⱼt − xⱼ} with x = Zᵀν. So w = e^{p + x} −
e^{q − x} at every time, for logarithms p and q that are known, and only ν (n numbers) has to be
found from Zw = y. It minimises Σ(e^{p + x} + e^{q − x}) − ⟨ν, y⟩, which is smooth and convex.
"""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from manifoldflow._boundary import checked_concrete
from manifoldflow.theory._arguments import matrix, number, problem, times_of, vector

_EPS = float(np.finfo(np.float64).eps)
_TINY = 1e-250
_STAGE = 20.0  # nats by which the logarithms p, q may move between two Newton solves
_MAX_NEWTON_STEPS = 500


@checked_concrete
def overparametrized_linear_flow(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    u: Num[ArrayLike, "..."],
    v: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
    noise_constant: float = 1.0,
) -> Float[np.ndarray, "*times d"]:
    """The weights w = u⊙u − v⊙v along the label-noise flow of fᵢ = ⟨zᵢ, w⟩, in closed form.

    The flow is dY/dt = −(c/4)P∇tr H on {Z(u⊙u − v⊙v) = y} for the loss (1/2n)Σᵢ(⟨zᵢ, u⊙u − v⊙v⟩ −
    yᵢ)². It starts where gradient flow from (u, v) lands, and `time=0` is that point. With sⱼ =
    (4/n)Σᵢ zᵢⱼ², pⱼ = |uⱼvⱼ|e^{−csⱼt} and aⱼ = ln|uⱼ/vⱼ| the answer is w(t) = 2p⊙sinh(a + Zᵀν),
    with ν fixed by Zw = y.

    Only logarithms of p are kept, so p = e⁻⁸⁰⁰ is harmless. Where the linear program of the limit
    has a solution with fewer than n non-zeros, ν is not resolved at large times, but w is: its
    absolute error stays near eps·(1 + csⱼt)·max|w| times a constant of the inputs. For this reason
    ν is not returned.

    Args:
        inputs: Z, shape (n, d), finite. Rows may be dependent if the targets are consistent.
        targets: y, shape (n,), finite.
        u: start coordinates, shape (d,), on the manifold or not. A coordinate that is 0 stays 0.
        v: start coordinates, shape (d,); likewise.
        time: t ≥ 0 on the clock kη², finite: a scalar, or shape (m,) in any order.
        noise_constant: c ≥ 0 in Σ = cH; 1 for label noise of unit variance with batches of one.

    Returns:
        w(t) in float64, shape (d,) for a scalar time, (m, d) for m times.

    Raises:
        ValueError: a wrong shape, or a value out of range.
        RuntimeError: no w of the given signs fits the targets, or the Newton iteration stalled.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> start = np.array([1.0, 1.0])
        >>> options = {"time": np.array([0.0, 5.0])}
        >>> print(
        ...     theory.overparametrized_linear_flow(
        ...         np.array([[1.0, 2.0]]), np.array([2.0]), start, start, **options
        ...     ).round(3)
        ... )
        [[0.394 0.803]
         [2.    0.   ]]

    References:
        [LiWangArora2022, Lemmas 6.3, 6.5 and D.13].
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


@checked_concrete
def overparametrized_linear_charges(
    inputs: Num[ArrayLike, "..."],
    u: Num[ArrayLike, "..."],
    v: Num[ArrayLike, "..."],
    *,
    time: Num[ArrayLike, "..."],
    noise_constant: float = 1.0,
) -> Float[np.ndarray, "*times d"]:
    """The products uⱼvⱼ along the label-noise flow: uⱼ(0)vⱼ(0)e^{−csⱼt}, with sⱼ = (4/n)Σᵢ zᵢⱼ².

    Gradient flow conserves them; label noise makes each decay at a rate of its own. Together with
    w(t) they give the point: uⱼ² + vⱼ² = √(wⱼ² + 4(uⱼvⱼ)²).

    Args:
        inputs: Z, shape (n, d), finite.
        u: start coordinates, shape (d,), on the manifold or not.
        v: start coordinates, shape (d,).
        time: t ≥ 0 on the clock kη², finite: a scalar, or shape (m,).
        noise_constant: c ≥ 0 in Σ = cH.

    Returns:
        The products in float64, shape (d,) or (m, d).

    Raises:
        ValueError: a wrong shape, or a value out of range.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> charges = theory.overparametrized_linear_charges(
        ...     np.array([[1.0, 0.5]]), np.array([1.0, 2.0]), np.array([1.0, 1.0]), time=1.0
        ... )
        >>> print(charges.round(3).tolist())  # e⁻⁴ and 2e⁻¹
        [0.018, 0.736]

    References:
        [LiWangArora2022, Lemma D.13].
    """
    z = matrix("inputs", inputs)
    u, v = vector("u", u, z.shape[1]), vector("v", v, z.shape[1])
    return u * v * np.exp(-_decay_rates(z, noise_constant) * times_of(time)[..., None])


@checked_concrete
def weighted_l1_interpolant(
    inputs: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."]
) -> Float[np.ndarray, " d"]:
    """The end of the label-noise flow: argmin Σⱼ (Σᵢ zᵢⱼ²)|wⱼ| subject to Zw = y, a linear program.

    A coordinate whose column of Z is zero costs nothing and fits nothing; it is returned as 0.
    Where the minimiser is not unique this is one of its vertices, and not the one that the flow
    picks.

    Args:
        inputs: Z, shape (n, d), finite.
        targets: y, shape (n,), finite, in the range of Z.

    Returns:
        w in float64, shape (d,), with at most n non-zeros.

    Raises:
        ValueError: a wrong shape, or a value that is not finite.
        RuntimeError: the targets cannot be interpolated, or the linear program failed.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> print(theory.weighted_l1_interpolant(np.array([[1.0, 2.0]]), np.array([2.0])).tolist())
        [2.0, 0.0]

    References:
        [LiWangArora2022, Lemma 6.5].
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


@checked_concrete
def kernel_rich_interpolant(
    inputs: Num[ArrayLike, "..."], targets: Num[ArrayLike, "..."], *, scale: float
) -> Float[np.ndarray, " d"]:
    """The interpolant that gradient flow on ⟨w₊² − w₋², x⟩ picks from w₊ = w₋ = α·1.

    It minimises Q_α(θ) = α² Σⱼ q(θⱼ/α²), q′(z) = arcsinh(z/2), subject to Xθ = y, and has the form
    θ = 2α²sinh(Xᵀν). It is the interpolant of least ℓ₁ norm as α → 0 (the rich regime), and of
    least ℓ₂ norm as α → ∞ (the kernel regime).

    Args:
        inputs: X, shape (n, d), finite.
        targets: y, shape (n,), finite, in the range of X.
        scale: α > 0, finite.

    Returns:
        θ in float64, shape (d,).

    Raises:
        ValueError: a wrong shape, or a value out of range.
        RuntimeError: the targets cannot be interpolated, or the Newton iteration stalled.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> for scale in (1e-6, 1e3):
        ...     print(
        ...         theory.kernel_rich_interpolant(
        ...             np.array([[1.0, 2.0]]), np.array([1.0]), scale=scale
        ...         ).round(3)
        ...     )
        [0.  0.5]
        [0.2 0.4]

    References:
        [Woodworth2020, Theorem 1; Ma2022, chapter 9].
    """
    x, y = problem(inputs, targets)
    log_scale = np.full(x.shape[1], 2.0 * np.log(number("scale", scale, least=0.0, strict=True)))
    return _Dual(x, y, log_scale, log_scale).move_to(log_scale, log_scale)


@checked_concrete
def min_norm_interpolant(
    inputs: Num[ArrayLike, "..."],
    targets: Num[ArrayLike, "..."],
    start: Num[ArrayLike, "..."] | None = None,
) -> Float[np.ndarray, " d"]:
    """The solution X⁺y + (I − X⁺X)β₀ of linear regression at which gradient descent lands.

    It is the interpolant nearest to the start, or the nearest least-squares solution.

    Args:
        inputs: X, shape (n, d), finite, of any rank.
        targets: y, shape (n,), finite.
        start: β₀, shape (d,), finite; None for 0.

    Returns:
        β in float64, shape (d,).

    Raises:
        ValueError: a wrong shape, or a value that is not finite.

    Examples:
        >>> import numpy as np
        >>> from manifoldflow import theory
        >>> print(
        ...     theory.min_norm_interpolant(np.array([[1.0, 2.0]]), np.array([5.0]))
        ...     .round(6)
        ...     .tolist()
        ... )
        [1.0, 2.0]

    References:
        [Ma2022, chapter 9].
    """
    x, y = problem(inputs, targets)
    origin = np.zeros(x.shape[1]) if start is None else vector("start", start, x.shape[1])
    return origin + np.linalg.lstsq(x, y - x @ origin, rcond=None)[0]


class _Dual:
    """The solution ν of Z(e^{p + Zᵀν} − e^{q − Zᵀν}) = y, followed as p and q move."""

    def __init__(self, z: np.ndarray, y: np.ndarray, log_plus: np.ndarray, log_minus: np.ndarray):
        size = np.max(np.abs(np.linalg.lstsq(z, y, rcond=None)[0]))
        easy = (
            np.log(size) if size > 0.0 else 0.0
        )  # p = q = ln|w|: there the dual is nearly quadratic
        self.z, self.y, self.nu = z, y, np.zeros(z.shape[0])
        self.plus = np.where(np.isfinite(log_plus), easy, -np.inf)
        self.minus = np.where(np.isfinite(log_minus), easy, -np.inf)

    def move_to(self, log_plus: np.ndarray, log_minus: np.ndarray) -> np.ndarray:
        """Moves to new logarithms by stages, with ν predicted on a line; returns w there."""
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
        """Damped Newton for a sum of exponentials: steps of length ln(1 + m)/m, m = max|Zᵀdν|."""
        z, y = self.z, self.y
        error, best = np.inf, None
        for _ in range(max_steps):
            x = z.T @ nu
            with np.errstate(over="ignore", invalid="ignore"):
                # An overflow makes the Hessian infinite, and ends this attempt below.
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
        """The rounding error of the residual: x has relative error eps, and the size −ln p."""
        return (
            16.0
            * _EPS
            * (1.0 + np.max(np.abs(x)))
            * np.max(np.abs(self.z) @ weight + np.abs(self.y), initial=0.0)
        )


def _difference(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(old), new, 0.0) - np.where(np.isfinite(old), old, 0.0)


def _decay_rates(z: np.ndarray, noise_constant: float) -> np.ndarray:
    """The rates csⱼ, with sⱼ = (4/n)Σᵢ zᵢⱼ²."""
    return number("noise_constant", noise_constant, least=0.0) * 4.0 * np.mean(z * z, axis=0)
