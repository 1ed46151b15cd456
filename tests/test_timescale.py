"""Steps, kη and kη²: sums by integer arithmetic, closed forms, and the way back."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checks import at_most, close, refused
from manifoldflow._clock import gradient_flow_times, limit_times, num_steps_for

CLOCKS = {gradient_flow_times: 1, limit_times: 2}


def exact_times(rates, power, momentum=0.0):
    """Σ (η/(1−β))ᵖ in rational arithmetic: not one rounding error."""
    total, times = Fraction(0), [Fraction(0)]
    for rate in np.asarray(rates):
        total += (Fraction(float(rate)) / (1 - Fraction(momentum))) ** power
        times.append(total)
    return np.array([float(time) for time in times])


def schedules():
    return {
        "constant": optax.constant_schedule(0.3),
        "cosine": optax.cosine_decay_schedule(0.1, 200),
        "warm-up": optax.warmup_cosine_decay_schedule(0.0, 0.2, 20, 200),
        "staircase": optax.piecewise_constant_schedule(0.5, {30: 0.1, 100: 0.5}),
        "written by hand": lambda step: 0.1 / (1 + 0.1 * step),
        "a Python number": lambda step: 0.1,
    }


@pytest.mark.quick
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.875])
@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_of_a_constant_rate(clock, momentum):
    power = CLOCKS[clock]
    expected = np.arange(1001) * (0.03 / (1 - momentum)) ** power
    close("times", clock(0.03, 1000, momentum), expected, 1e-15)
    assert clock(0.03, 1000, momentum).dtype == jnp.float64


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("clock", CLOCKS)
def test_clocks_of_schedules(clock, name):
    schedule = schedules()[name]
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(250, dtype=jnp.int32))
    times = np.asarray(clock(schedule, 250, 0.75))
    worst = np.max(np.abs(times - exact_times(rates, CLOCKS[clock], 0.75)))
    at_most(f"{name}: times against rational arithmetic", worst, 1e-15 * times[-1])


def test_a_million_steps_in_single_precision():
    """Summed naively in float32, a million steps of η = 0.01 lose a tenth of the limit clock."""
    num_steps = 1_200_000
    rate = np.float32(0.01)
    expected = float(rate) ** 2 * np.arange(num_steps + 1)

    def worst(times):
        assert times.dtype == jnp.float32, times.dtype
        return np.max(np.abs(np.asarray(times, float)[1:] / expected[1:] - 1))

    naive = np.add.accumulate(np.full(num_steps, rate**2), dtype=np.float32)
    assert abs(naive[-1] / expected[-1] - 1) > 1e-3, "the test could not see a loss"
    schedule = optax.constant_schedule(rate)
    with jax.enable_x64(False):
        at_most("constant", worst(limit_times(rate, num_steps)), 1e-7)
        at_most("schedule", worst(limit_times(schedule, num_steps)), 1e-7)
        inside = jax.jit(lambda: limit_times(schedule, num_steps))()
        at_most("schedule inside jit", worst(inside), 1e-7)
        traced = jax.jit(lambda eta: limit_times(optax.constant_schedule(eta), num_steps))(rate)
        at_most("traced schedule", worst(traced), 1e-6)
        traced = jax.jit(lambda eta: limit_times(eta, num_steps))(rate)
        at_most("traced rate", worst(traced), 4e-7)
        end_time = float(expected[-1])
        for learning_rate in (rate, schedule):
            assert num_steps_for(learning_rate, end_time) == num_steps
            slow = num_steps_for(learning_rate, end_time / 2, max_steps=num_steps)
            assert slow == num_steps // 2, slow


@pytest.mark.parametrize("as_number", [float, np.float32, np.float64, jnp.asarray, jnp.float32])
@pytest.mark.parametrize("rate", [0.7, 0.3, 0.1, 1e-3])
@pytest.mark.parametrize("clock", CLOCKS)
def test_there_and_back_with_a_constant_rate(clock, rate, as_number):
    """End times that are a whole number of steps on paper take just so many."""
    for count in (1, 7, 10, 1000, 10**6):
        end_time = count * rate ** CLOCKS[clock]
        found = num_steps_for(as_number(rate), end_time, clock=clock)
        assert found == count, f"{as_number.__name__}({rate}): {found} steps, expected {count}"
    again = num_steps_for(optax.constant_schedule(as_number(rate)), end_time / 100, clock=clock)
    assert again == 10**4, f"constant schedule: {again}"


@pytest.mark.quick
def test_steps_are_rounded_up():
    assert num_steps_for(0.1, 0.995) == 100
    assert num_steps_for(0.1, 1.001) == 101
    assert num_steps_for(1.0, 1e-9) == 1, "there is no walk without a step"


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("clock", CLOCKS)
def test_there_and_back_with_schedules(clock, name):
    schedule = schedules()[name]
    times = np.asarray(clock(schedule, 150, 0.5))
    for count in (3, 50, 149):
        between = (times[count - 1] + times[count]) / 2
        for end_time in (between, times[count]):
            found = num_steps_for(schedule, end_time, 0.5, clock=clock)
            assert found == count, f"{name}: {found} steps to {end_time}, expected {count}"


def test_momentum_takes_fewer_steps():
    """The limit clock runs (1−β)⁻² faster, the gradient flow's (1−β)⁻¹."""
    assert num_steps_for(0.1, 1.0, 0.9) == 1
    assert num_steps_for(0.1, 100.0, 0.9) == 100
    assert num_steps_for(0.1, 100.0, 0.9, clock=gradient_flow_times) == 100
    assert num_steps_for(0.1, 100.0, clock=gradient_flow_times) == 1000


def test_traced_rates_are_mapped_and_differentiated():
    rates = jnp.array([0.1, 0.2])
    together = jax.vmap(lambda eta: limit_times(eta, 10, momentum=eta))(rates)
    alone = jnp.stack([limit_times(float(eta), 10, momentum=float(eta)) for eta in rates])
    close("vmap over rates", together, alone, 1e-15)
    slope = jax.grad(lambda eta: limit_times(optax.cosine_decay_schedule(eta, 20), 20)[-1])(0.1)
    close("Σηₖ² is quadratic in η", slope, 20 * limit_times(schedule_of(1.0), 20)[-1] * 0.01, 1e-14)


def schedule_of(rate):
    return optax.cosine_decay_schedule(rate, 20)


def test_traced_values_out_of_range_give_nan():
    """One bad member of a batch is marked, the others go on."""
    times = jax.vmap(lambda eta: limit_times(eta, 3))(jnp.array([0.1, -0.1, jnp.nan, jnp.inf]))
    assert jnp.isfinite(times).all(axis=1).tolist() == [True, False, False, False]
    times = jax.vmap(lambda beta: limit_times(0.1, 3, beta))(jnp.array([0.0, 1.0, -0.1, 0.5]))
    assert jnp.isfinite(times).all(axis=1).tolist() == [True, False, False, True]
    times = jax.vmap(lambda eta: limit_times(lambda k: eta, 3))(jnp.array([0.1, -0.1]))
    assert jnp.isfinite(times).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("wrong", [0.0, -0.1, jnp.nan, jnp.inf, "0.1", None, True, jnp.ones(2)])
@pytest.mark.parametrize("fn", [limit_times, gradient_flow_times, num_steps_for])
def test_learning_rates_out_of_range(fn, wrong):
    with refused(ValueError, "learning_rate must be a positive, finite number or a schedule"):
        fn(wrong, 10)


@pytest.mark.parametrize("wrong", [1.0, -0.1, jnp.nan, "heavy", jnp.zeros(1)])
@pytest.mark.parametrize("fn", [limit_times, gradient_flow_times, num_steps_for])
def test_momentum_out_of_range(fn, wrong):
    with refused(ValueError, "momentum must be a number in [0, 1)"):
        fn(0.1, 10, wrong)


@pytest.mark.parametrize("fn", [limit_times, num_steps_for])
def test_schedules_out_of_range(fn):
    with refused(ValueError, "not negative", "-0.25 at step 5"):
        fn(lambda step: 1.0 - 0.25 * step, 100)
    with refused(ValueError, "finite", "inf at step 0"):
        fn(lambda step: 1.0 / step, 100)
    with refused(ValueError, "one number", "(2,)"):
        fn(lambda step: jnp.ones(2), 100)


def test_ends_that_are_not_reached():
    with refused(ValueError, "only 0.1 after max_steps=10", "end_time=1.0", "max_steps"):
        num_steps_for(0.1, 1.0, max_steps=10)
    decaying = lambda step: 0.5 ** (step + 1.0)
    with refused(ValueError, "only 0.333333", "never gets there"):
        num_steps_for(decaying, 1.0, max_steps=20_000)
    with refused(ValueError, "only 1.33333", "end_time=4"):
        num_steps_for(decaying, 4, momentum=0.5, max_steps=20_000)
    for wrong in (0.0, -1.0, jnp.nan, jnp.inf, jnp.ones(2)):
        with refused(ValueError, "end_time must be one positive, finite number"):
            num_steps_for(0.1, wrong)
    for wrong in (0, -1, True, 1.5):
        with refused(ValueError, "num_steps must be a positive integer", wrong_type=True):
            limit_times(0.1, wrong)


@pytest.mark.parametrize("name", ["learning_rate", "schedule", "end_time", "momentum"])
def test_the_number_of_steps_is_static(name):
    def count(value):
        arguments = {"learning_rate": 0.1, "end_time": 1.0}
        if name == "schedule":
            arguments["learning_rate"] = optax.constant_schedule(value)
        else:
            arguments[name] = value
        return num_steps_for(**arguments) * value

    with refused(ValueError, "traced", "Give num_steps instead"):
        jax.jit(count)(0.1)
    inside = jax.jit(lambda x: num_steps_for(schedule_of(0.1), 0.03) * x)
    assert inside(1) == num_steps_for(schedule_of(0.1), 0.03)


def test_clocks_are_compiled_once():
    compiled = []

    @functools.partial(jax.jit, static_argnums=1)
    def times(eta, num_steps):
        compiled.append(eta)
        return limit_times(eta, num_steps)

    for eta in (0.1, 0.2, 0.3):
        times(eta, 5)
    assert len(compiled) == 1, "a new rate is a new value, not a new program"
