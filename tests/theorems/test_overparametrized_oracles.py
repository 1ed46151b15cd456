"""The closed forms of the overparametrised linear model against brute force.

The brute force shares no code with them. [LiWangArora2022, Lemmas 6.3, 6.5, D.13]: gradient
flow of L = (1/2n) sum_i (<z_i, u*u - v*v> - y_i)^2 and then dY/dt = -(c/4) P grad R,
R = (4/n) sum_j (sum_i z_ij^2)(u_j^2 + v_j^2), on the zero set of the residual.
[Woodworth2020, Theorem 1]: gradient flow from alpha 1 picks argmin Q_alpha. The oracles are
NumPy in float64 and must not depend on how JAX is configured.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import linprog

from manifoldflow import theory

TIMES = (0.0, 0.05, 0.3, 1.0, 2.0)
CASES = ((0, 3, 6, 1.0), (1, 4, 8, 0.5), (2, 3, 10, 2.5))  # seed, n, d, c


def _problem(seed, n, d):
    rng = np.random.default_rng(seed)
    inputs, target = rng.normal(size=(n, d)), rng.normal(size=d)
    u, v = rng.uniform(0.4, 1.4, size=(2, d)) * rng.choice([-1.0, 1.0], size=(2, d))
    return inputs, inputs @ target, u, v


def _integrate_gradient_flow(inputs, targets, u, v):
    n = len(inputs)

    def field(_, point):
        a, b = np.split(point, 2)
        pull = 2.0 / n * inputs.T @ (inputs @ (a**2 - b**2) - targets)
        return np.r_[-pull * a, pull * b]

    return solve_ivp(field, (0.0, 2e3), np.r_[u, v], method="Radau", rtol=1e-11, atol=1e-13).y[
        :, -1
    ]


def _integrate_limit_flow(inputs, point, noise_constant):
    n = len(inputs)
    weights = 4.0 / n * np.sum(inputs**2, axis=0)

    def field(_, point):
        a, b = np.split(point, 2)
        jacobian = 2.0 * np.hstack([inputs * a, -inputs * b])
        gradient = 2.0 * np.r_[weights * a, weights * b]
        tangent = gradient - np.linalg.pinv(jacobian) @ (jacobian @ gradient)
        return -noise_constant / 4.0 * tangent

    path = solve_ivp(
        field, (0.0, TIMES[-1]), point, method="DOP853", t_eval=TIMES, rtol=1e-11, atol=1e-13
    )
    return np.split(path.y.T, 2, axis=1)


@functools.cache
def _brute_force(seed, n, d, noise_constant):
    inputs, targets, u, v = _problem(seed, n, d)
    landing = _integrate_gradient_flow(inputs, targets, u, v)
    return landing, *_integrate_limit_flow(inputs, landing, noise_constant)


def _assert_close(got, expected, bound, label):
    error = np.max(np.abs(got - expected))
    assert error <= bound, f"{label}: error {error:.3e}, bound {bound:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_flow_at_time_zero_is_the_limit_of_gradient_flow(case):
    seed, n, d, _ = case
    inputs, targets, u, v = _problem(seed, n, d)
    a, b = np.split(_brute_force(*case)[0], 2)
    _assert_close(
        theory.overparametrized_linear_flow(inputs, targets, u, v, time=0.0),
        a**2 - b**2,
        1e-7,
        case,
    )
    _assert_close(theory.overparametrized_linear_charges(inputs, u, v, time=0.0), a * b, 1e-7, case)


@pytest.mark.parametrize("case", CASES)
def test_flow_and_charges_follow_the_integrated_limit_flow(case):
    seed, n, d, noise_constant = case
    inputs, targets, u, v = _problem(seed, n, d)
    _, a, b = _brute_force(*case)
    options = {"time": np.array(TIMES), "noise_constant": noise_constant}
    flow = theory.overparametrized_linear_flow(inputs, targets, u, v, **options)
    charges = theory.overparametrized_linear_charges(inputs, u, v, **options)
    assert flow.shape == charges.shape == (len(TIMES), d)
    _assert_close(flow, a**2 - b**2, 1e-6, f"w(t), {case}")
    _assert_close(charges, a * b, 1e-6, f"uv(t), {case}")
    _assert_close(np.sqrt(flow**2 + 4.0 * charges**2), a**2 + b**2, 1e-6, f"u^2 + v^2, {case}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrong_clock", [0.5, 2.0])
def test_a_wrong_clock_is_rejected(case, wrong_clock):
    seed, n, d, noise_constant = case
    inputs, targets, u, v = _problem(seed, n, d)
    _, a, b = _brute_force(*case)
    options = {"time": np.array(TIMES), "noise_constant": wrong_clock * noise_constant}
    mutant = theory.overparametrized_linear_flow(inputs, targets, u, v, **options)
    assert np.max(np.abs(mutant - (a**2 - b**2))) > 1e-2, (
        f"a clock {wrong_clock} times too fast passed on {case}"
    )
    mutant = theory.overparametrized_linear_charges(inputs, u, v, **options)
    assert np.max(np.abs(mutant - a * b)) > 1e-2, (
        f"a clock {wrong_clock} times too fast passed on {case}"
    )


def test_the_printed_flow_without_a_quarter_is_rejected():
    """The poster's dY/dt = -P grad R is four times too fast."""
    inputs, targets, u, v = _problem(0, 3, 6)
    landing = _brute_force(*CASES[0])[0]
    a, b = _integrate_limit_flow(inputs, landing, 4.0)
    flow = theory.overparametrized_linear_flow(inputs, targets, u, v, time=np.array(TIMES))
    assert np.max(np.abs(flow - (a**2 - b**2))) > 1e-2


def test_time_is_a_semigroup_and_may_come_in_any_order():
    inputs, targets, u, v = _problem(4, 4, 9)
    times = np.array([3.0, 0.0, 1.0])
    together = theory.overparametrized_linear_flow(inputs, targets, u, v, time=times)
    alone = [theory.overparametrized_linear_flow(inputs, targets, u, v, time=t) for t in times]
    _assert_close(together, np.stack(alone), 1e-11, "vector of times against one by one")
    middle = together[2]
    product = theory.overparametrized_linear_charges(inputs, u, v, time=1.0)
    total = np.sqrt(middle**2 + 4.0 * product**2)
    restart = np.sqrt((total + middle) / 2.0), np.sqrt((total - middle) / 2.0)
    _assert_close(
        theory.overparametrized_linear_flow(inputs, targets, *restart, time=2.0),
        together[0],
        1e-9,
        "restart",
    )


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_flow_meets_the_linear_program_at_time_200(scale):
    """d = 100 and s_j about 4: |uv| has decayed to e^{-800}, and the Gram matrix has lost rank (3
    < n).
    """
    rng = np.random.default_rng(7)
    inputs, target = rng.normal(size=(30, 100)), np.zeros(100)
    target[[5, 17, 60]] = 1.0, -2.0, 0.5
    u, v = scale * rng.normal(size=(2, 100))
    end = theory.overparametrized_linear_flow(inputs, inputs @ target, u, v, time=200.0)
    program = theory.weighted_l1_interpolant(inputs, inputs @ target)
    charges = theory.overparametrized_linear_charges(inputs, u, v, time=200.0)
    assert np.median(np.abs(charges)) < 1e-300, "the case must underflow"
    _assert_close(inputs @ end, inputs @ target, 1e-10, "residual")
    _assert_close(end, program, 1e-9, f"flow against linear program, scale {scale}")
    _assert_close(program, target, 1e-9, "recovery of the planted vector")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_program_is_optimal_by_its_dual(seed):
    """max <y, nu> subject to |Z' nu|_j <= cost_j bounds the cost from below; the two must meet."""
    inputs, targets, _, _ = _problem(seed, 5, 12)
    got = theory.weighted_l1_interpolant(inputs, targets)
    cost = np.sum(inputs**2, axis=0)
    dual = linprog(
        -targets,
        A_ub=np.vstack([inputs.T, -inputs.T]),
        b_ub=np.r_[cost, cost],
        bounds=(None, None),
        method="highs",
    )
    slack = cost - np.abs(inputs.T @ dual.x)
    assert np.min(slack) > -1e-8
    _assert_close(inputs @ got, targets, 1e-9, "feasible")
    _assert_close(cost @ np.abs(got), targets @ dual.x, 1e-8, "duality gap")
    _assert_close(np.abs(got) * slack, 0.0, 1e-8, "complementary slackness")


def test_linear_program_uses_the_squared_column_norms():
    """Plain l1 would take w = (0, 1): cost 1 against 2. The weights are 1 and 4: (2, 0) costs 2
    against 4.
    """
    _assert_close(
        theory.weighted_l1_interpolant(np.array([[1.0, 2.0]]), np.array([2.0])),
        [2.0, 0.0],
        1e-9,
        "weights",
    )
    _assert_close(
        theory.overparametrized_linear_flow(
            np.array([[1.0, 2.0]]), np.array([2.0]), *np.ones((2, 2)), time=50.0
        ),
        [2.0, 0.0],
        1e-9,
        "the end of the flow",
    )


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 30.0])
def test_kernel_rich_interpolant_is_stationary(scale):
    """grad Q_alpha = arcsinh(theta / 2 alpha^2) lies in the row space of X; Q_alpha is convex, so
    that suffices.
    """
    inputs, targets, _, _ = _problem(3, 4, 9)
    theta = theory.kernel_rich_interpolant(inputs, targets, scale=scale)
    gradient = np.arcsinh(theta / (2.0 * scale**2))
    tangent = gradient - np.linalg.pinv(inputs) @ (inputs @ gradient)
    _assert_close(inputs @ theta, targets, 1e-11, "interpolates")
    _assert_close(
        tangent, 0.0, 1e-9 * max(1.0, np.max(np.abs(gradient))), f"stationary at scale {scale}"
    )


def test_kernel_rich_interpolant_is_where_gradient_flow_lands():
    inputs, targets, _, _ = _problem(5, 3, 7)
    a, b = np.split(_integrate_gradient_flow(inputs, targets, np.full(7, 0.7), np.full(7, 0.7)), 2)
    _assert_close(
        theory.kernel_rich_interpolant(inputs, targets, scale=0.7), a**2 - b**2, 1e-7, "Q_alpha"
    )


def test_kernel_rich_interpolant_runs_from_l1_to_l2():
    inputs, targets, _, _ = _problem(6, 4, 10)
    unit = inputs / np.sqrt(np.sum(inputs**2, axis=0))  # equal weights: the plain l1 norm
    rich = theory.kernel_rich_interpolant(unit, targets, scale=1e-60)
    kernel = theory.kernel_rich_interpolant(unit, targets, scale=1e6)
    _assert_close(rich, theory.weighted_l1_interpolant(unit, targets), 1e-9, "alpha -> 0")
    _assert_close(kernel, np.linalg.pinv(unit) @ targets, 1e-7, "alpha -> infinity")
    middle = theory.kernel_rich_interpolant(unit, targets, scale=0.5)
    assert np.sum(np.abs(rich)) < np.sum(np.abs(middle)) < np.sum(np.abs(kernel))
    assert np.linalg.norm(rich) > np.linalg.norm(middle) > np.linalg.norm(kernel)


def test_min_norm_interpolant_is_where_gradient_descent_lands():
    inputs, targets, start, _ = _problem(8, 3, 6)
    for origin in (None, start):
        point = np.zeros(6) if origin is None else origin
        rate = 1.0 / np.linalg.norm(inputs, 2) ** 2
        for _ in range(5000):
            point = point - rate * inputs.T @ (inputs @ point - targets)
        _assert_close(
            theory.min_norm_interpolant(inputs, targets, origin), point, 1e-10, "gradient descent"
        )


def test_zero_coordinates_stay_absent():
    inputs, targets, u, v = _problem(9, 3, 8)
    v[0], u[1], u[2], v[2] = 0.0, 0.0, 0.0, 0.0
    w = theory.overparametrized_linear_flow(inputs, targets, u, v, time=1.5)
    _assert_close(inputs @ w, targets, 1e-12, "interpolates")
    assert w[0] >= 0.0 and w[1] <= 0.0 and w[2] == 0.0
    tiny = theory.overparametrized_linear_flow(
        inputs, targets, np.where(u == 0.0, 1e-150, u), np.where(v == 0.0, 1e-150, v), time=1.5
    )
    _assert_close(w, tiny, 1e-9, "the limit of small coordinates")


def test_dependent_rows_and_narrow_dtypes():
    inputs, targets, u, v = _problem(10, 3, 8)
    once = theory.overparametrized_linear_flow(inputs, targets, u, v, time=1.0)
    # Each example twice: n and the column sums double together, so the rates stay.
    twice = theory.overparametrized_linear_flow(
        np.r_[inputs, inputs], np.r_[targets, targets], u, v, time=1.0
    )
    _assert_close(twice, once, 1e-9, "duplicated examples")
    narrow = theory.overparametrized_linear_flow(
        *map(jnp.asarray, (inputs, targets, u, v)), time=jnp.asarray(1.0)
    )
    assert narrow.dtype == np.float64
    _assert_close(narrow, once, 1e-4, "JAX arrays in")


def test_extreme_scales_converge():
    inputs, targets, u, v = _problem(11, 4, 10)
    for scale, time in ((1e-100, 0.0), (1e8, 0.0), (1.0, 1e5), (1e-100, 1e4)):
        w = theory.overparametrized_linear_flow(inputs, targets, scale * u, scale * v, time=time)
        bound = 1e-12 * max(20.0, scale**2, 40.0 * time)
        _assert_close(inputs @ w, targets, bound, f"scale {scale}, time {time}")


def test_refusals_say_what_to_mend():
    inputs, targets, u, v = _problem(12, 3, 6)
    flow = theory.overparametrized_linear_flow
    for match, call in {
        "inputs: got shape": lambda: flow(inputs[0], targets, u, v, time=1.0),
        "targets: got shape": lambda: flow(inputs, targets[:, None], u, v, time=1.0),
        "u: got shape": lambda: flow(inputs, targets, u[:-1], v, time=1.0),
        "v: got shape": lambda: theory.overparametrized_linear_charges(inputs, u, v[:-1], time=1.0),
        "time: got": lambda: flow(inputs, targets, u, v, time=-1.0),
        "noise_constant: got": lambda: flow(inputs, targets, u, v, time=1.0, noise_constant=-1.0),
        "scale: got": lambda: theory.kernel_rich_interpolant(inputs, targets, scale=0.0),
        "start: got shape": lambda: theory.min_norm_interpolant(inputs, targets, u[:-1]),
        "NaN": lambda: theory.weighted_l1_interpolant(inputs * np.nan, targets),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_targets_out_of_reach_raise():
    inputs, targets, u, v = _problem(13, 3, 6)
    dependent, inconsistent = np.r_[inputs, inputs[:1]], np.r_[targets, targets[0] + 1.0]
    with pytest.raises(RuntimeError, match="interpolant"):
        theory.overparametrized_linear_flow(dependent, inconsistent, u, v, time=1.0)
    with pytest.raises(RuntimeError, match="range of the inputs"):
        theory.weighted_l1_interpolant(dependent, inconsistent)
    with pytest.raises(
        RuntimeError, match="signs"
    ):  # v = 0: w >= 0 cannot produce negative outputs of positive inputs
        theory.overparametrized_linear_flow(np.abs(inputs), -np.ones(3), u, 0.0 * v, time=1.0)
    with pytest.raises(RuntimeError, match="signs"):
        theory.overparametrized_linear_flow(inputs, targets, 0.0 * u, 0.0 * v, time=1.0)
