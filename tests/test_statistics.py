"""Statistics of ensembles against NumPy's, exact fits, and the coverage of the error bars."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from checks import at_least, at_most, close, equal, in_window, refused
from manifoldflow.ensembles import (
    Estimate,
    extrapolate,
    Statistics,
    statistics,
    weak_error,
    weak_order,
    WeakError,
)

LEVELS = (0.0, 0.1, 0.5, 0.77, 1.0)


def values_of(seed, shape):
    return jr.normal(jr.key(seed), shape)


def against_numpy(found, values, axis):
    close("mean", found.mean, np.mean(values, axis), 1e-13)
    deviation = np.std(values, axis, ddof=1)
    close("standard deviation", found.standard_deviation, deviation, 1e-13)
    error = deviation / np.sqrt(np.shape(values)[axis])
    close("standard error", found.standard_error, error, 1e-13)
    close("quantiles", found.quantiles, np.quantile(values, LEVELS, axis=axis), 1e-13)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_against_numpy(axis):
    values = values_of(0, (5, 6, 7))
    found = jax.jit(lambda x: statistics(x, axis, levels=LEVELS))(values)
    assert isinstance(found, Statistics)
    against_numpy(found, values, axis)
    equal("members", (int(found.count), int(found.num_failed)), (values.shape[axis], 0))
    close("levels", found.levels, jnp.array(LEVELS), 1e-15)


def test_failed_members_are_left_out_and_counted():
    """NaN in one array takes the member out of all of them."""
    values = {"a": values_of(1, (9, 2)), "steps": jnp.arange(9), "b": values_of(2, (9,))}
    values["a"] = values["a"].at[2, 1].set(jnp.nan)
    values["b"] = values["b"].at[jnp.array([4, 7])].set(jnp.array([jnp.inf, -jnp.inf]))
    found = statistics(values, levels=LEVELS)
    equal("members", (int(found.count), int(found.num_failed)), (6, 3))
    kept = np.array([0, 1, 3, 5, 6, 8])
    for name, leaf in values.items():
        parts = [getattr(found, part)[name] for part in ("mean", "standard_deviation")]
        parts += [found.standard_error[name], found.quantiles[name]]
        alone = Statistics(*parts, found.levels, found.count, found.num_failed)
        against_numpy(alone, np.asarray(leaf)[kept], 0)
    slope = jax.grad(lambda x: statistics(x).mean)(values["b"])
    expected = np.isfinite(np.asarray(values["b"])) / 7
    close("derivative of the mean", slope, expected, 1e-14)


def test_too_few_members_for_an_error_bar():
    """One member has no spread that could be known; none has no mean."""
    one = statistics(jnp.array([3.0, jnp.nan]))
    equal("one member", (float(one.mean), float(one.standard_error)), (3.0, np.inf))
    assert not bool(weak_error(jnp.array([3.0, jnp.nan]), 3.0).agrees()), "nobody can know"
    none = statistics(jnp.array([jnp.inf, jnp.nan]))
    equal("members", (int(none.count), int(none.num_failed)), (0, 2))
    assert np.isnan(none.mean) and np.isinf(none.standard_error)
    assert bool(jnp.all(jnp.isnan(none.quantiles)))
    assert not bool(weak_error(jnp.array([jnp.inf, jnp.nan]), 3.0).agrees())


def test_a_large_mean_does_not_drown_the_spread():
    values = 1e8 + values_of(3, (1000,))
    close("standard deviation", statistics(values).standard_deviation, np.std(values, ddof=1), 1e-7)
    narrow = statistics(values_of(3, (1000,)).astype(jnp.float32))
    assert narrow.mean.dtype == narrow.quantiles.dtype == jnp.float32


# --- weak errors ---------------------------------------------------------------------------


def test_weak_error():
    """The difference of two means, and both of their uncertainties."""
    values = {"x": values_of(4, (50,)), "y": values_of(5, (50, 2)).at[3].set(jnp.nan)}
    reference = {"x": 0.25, "y": jnp.array([0.5, 1.0])}
    found = weak_error(values, reference, {"x": 0.3, "y": jnp.array([0.4, 0.0])})
    assert isinstance(found, WeakError)
    equal("members", (int(found.count), int(found.num_failed)), (49, 1))
    kept = np.delete(np.asarray(values["y"]), 3, axis=0)
    close("error", found.error["y"], kept.mean(axis=0) - reference["y"], 1e-13)
    squares = kept.std(axis=0, ddof=1) ** 2 / 49 + np.array([0.16, 0.0])
    close("standard error", found.standard_error["y"], np.sqrt(squares), 1e-13)
    alone = weak_error(values["x"], 0.25, 0.3)
    spread = np.hypot(0.3, np.std(values["x"], ddof=1) / np.sqrt(50))
    close("standard error of one array", alone.standard_error, spread, 1e-13)


def test_agreement_covers_what_it_says():
    """Means within two standard errors in 95% of ensembles, never so ten errors away."""
    values = values_of(6, (400, 1000))
    agrees = lambda x, reference: weak_error(x, reference).agrees(2.0)
    covered = jax.vmap(agrees, (1, None))(values, 0.0)
    in_window("share within two standard errors", float(jnp.mean(covered)), 0.93, 0.97)
    assert not bool(jnp.any(jax.vmap(agrees, (1, None))(values, 0.5)))
    found = weak_error(values[:, 0] + 0.5, 0.0)
    assert not bool(found.agrees()) and bool(found.agrees(bias=0.5))


def test_order_of_exact_powers():
    steps = np.array([0.1, 0.05, 0.025, 0.0125])
    for order in (1.0, 2.0, 0.5):
        found = weak_order(steps, -3 * steps**order)
        assert isinstance(found, Estimate)
        close("order", found.value, order, 1e-12)
        at_most("standard error from residuals", found.standard_error, 1e-12)
        weighted = weak_order(steps, 3 * steps**order, 0.01 * steps**order)
        close("order, weighted", weighted.value, order, 1e-12)
        at_most("χ²", weighted.chi_squared, 1e-12)
        # Of the slope of a line through points with one standard error s: s/√Σ(x − x̄)².
        x = np.log(steps)
        spread = 0.01 / 3 / np.sqrt(np.sum((x - x.mean()) ** 2))
        close("standard error", weighted.standard_error, spread, 1e-12)
    two = weak_order(steps[:2], steps[:2])
    assert np.isinf(two.standard_error), "two points leave nothing to judge the slope by"
    equal("spare points", (two.num_excess, found.num_excess), (0, 2))


def test_error_bar_from_residuals():
    """Without standard errors, those of ordinary regression; SciPy's as the witness."""
    steps = np.array([0.4, 0.2, 0.1, 0.05, 0.025])
    errors = 0.3 * steps * np.exp(0.1 * np.asarray(values_of(8, (5,))))
    found, line = weak_order(steps, errors), scipy.stats.linregress(np.log(steps), np.log(errors))
    close("order", found.value, line.slope, 1e-12)
    close("standard error of the order", found.standard_error, line.stderr, 1e-12)
    found, line = extrapolate(steps, errors), scipy.stats.linregress(steps, errors)
    close("limit", found.value, line.intercept, 1e-12)
    close("standard error of the limit", found.standard_error, line.intercept_stderr, 1e-12)


def test_richardson():
    """Exact for the powers it removes; two levels give 2 v(h/2) − v(h)."""
    steps = np.array([0.4, 0.2, 0.1, 0.05])
    sigmas = np.array([0.1, 0.2, 0.3, 0.4])
    found = extrapolate(steps[:2], np.array([5.0, 7.0]), sigmas[:2])
    close("value", found.value, 9.0, 1e-12)
    close("standard error", found.standard_error, np.sqrt((2 * 0.2) ** 2 + 0.1**2), 1e-12)
    close("second order", extrapolate(steps, 2 - steps**2, order=2).value, 2.0, 1e-12)
    cubic = 2 + steps - 3 * steps**2 + 4 * steps**3
    for weights in (None, sigmas):
        close("three terms", extrapolate(steps, cubic, weights, num_terms=3).value, 2.0, 1e-11)
    at_least("one term", abs(float(extrapolate(steps, cubic, sigmas).value) - 2), 0.01)
    off = extrapolate(steps, cubic, np.full(4, 1e-3))
    at_least("χ² of a formula that does not hold", off.chi_squared, 100)


def test_error_bars_of_fits():
    """Over many noisy measurements the estimates scatter as they say they do."""
    steps = jnp.array([0.4, 0.2, 0.1, 0.05])
    sigmas = jnp.array([0.002, 0.002, 0.001, 0.001])
    noise = sigmas * values_of(7, (4000, 4))
    orders = jax.vmap(lambda e: weak_order(steps, 0.3 * steps + e, sigmas))(noise)
    limits = jax.vmap(lambda e: extrapolate(steps, 1 + 0.3 * steps + e, sigmas))(noise)
    for name, found, true, window in (
        ("order", orders, 1.0, (0.9, 1.1)),
        ("limit", limits, 1.0, (0.95, 1.05)),
    ):
        scores = np.asarray((found.value - true) / found.standard_error)
        in_window(f"scatter of the {name} in standard errors", float(scores.std()), *window)
        at_most(f"bias of the {name} in standard errors", abs(scores.mean()), 0.15)
        in_window(f"mean χ² of the {name}", float(found.chi_squared.mean()), 1.85, 2.15)


# --- what goes wrong is said ---------------------------------------------------------------


def test_values_without_members():
    for wrong in (jnp.float64(1.0), jnp.ones((0, 2)), {"a": jnp.ones(3), "b": jnp.ones(4)}):
        with refused(ValueError, "common, non-empty axis 0 of members"):
            statistics(wrong)
    with refused(ValueError, "axis 2 of members", "f64[3,2]"):
        statistics(jnp.ones((3, 2)), axis=2)
    for wrong in (jnp.ones(3) + 1j, jr.split(jr.key(0), 3), {}):
        with refused(ValueError, "values must be real arrays"):
            statistics(wrong)
    for wrong in ((0.5, 1.5), (jnp.nan,), 0.5):
        with refused(ValueError, "levels must be a sequence", "[0, 1]", wrong_type=True):
            statistics(jnp.ones(3), levels=wrong)


def test_references_of_other_shapes():
    values = jnp.ones((5, 2))
    for wrong in (0.0, jnp.ones(1), jnp.ones((5, 2)), {"a": jnp.ones(2)}):
        with refused(ValueError, "reference must have the structure and shapes", "f64[2]"):
            weak_error(values, wrong)
    with refused(ValueError, "reference_standard_error must have", "f64[3]"):
        weak_error(values, jnp.ones(2), jnp.ones(3))


def test_levels_that_cannot_be_fitted():
    steps, errors = jnp.array([0.2, 0.1]), jnp.array([0.02, 0.01])
    for wrong in ((steps, errors[:1]), (steps[:1], errors[:1]), (steps[None], errors[None])):
        with refused(ValueError, "vectors of one length, at least 2"):
            weak_order(*wrong)
    with refused(ValueError, "vectors of one length, at least 3"):
        extrapolate(steps, errors, num_terms=2)
    for wrong in ([0.1, 0.1], [0.1, -0.1], [0.1, 0.0], [0.1, jnp.nan]):
        with refused(ValueError, "step_sizes must be positive", "2 different ones"):
            weak_order(wrong, errors)
    for wrong in ([0.0, 0.1], [jnp.inf, 0.1], [jnp.nan, 0.1]):
        with refused(ValueError, "standard_errors must be positive and finite"):
            extrapolate(steps, errors, wrong)
    with refused(ValueError, "must be finite", "nan"):
        extrapolate(steps, [1.0, jnp.nan])
    for sigmas in (None, [0.001, 0.001]):
        with refused(ValueError, "other than zero", "two standard errors"):
            weak_order(steps, [0.1, 0.0], sigmas)
    with refused(ValueError, "one of noise", "0.006", "more members"):
        weak_order(steps, errors, [0.001, 0.006])
    with refused(ValueError, "order must be positive"):
        extrapolate(steps, errors, order=0)
    with refused(ValueError, "num_terms must be a positive integer", wrong_type=True):
        extrapolate(steps, errors, num_terms=0)
