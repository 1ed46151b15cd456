"""Solves from save to save: what the programs hold, and what comes out of several legs."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import at_most, close, equal

SPHERE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
FLOW = mf.RiemannianGradientFlow(SPHERE, lambda x: x[2])
START, VECTOR = jnp.array([0.6, 0.8, 0.0]), jnp.array([0.0, 0.0, 0.4])
LOSS = mf.LeastSquares(
    jnp.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]), jnp.array([1.0, 0.0]), predict=jnp.dot
)


def solved(x, **options):
    return mf.solve(FLOW, x, **{"end_time": 1.0, "throw": False, **options}).points


PROGRAMS = {
    "solve": solved,
    "solve without a manifold": lambda x: (
        mf.solve(mf.GradientFlow(LOSS), x, end_time=1.0, num_saves=3, throw=False).points
    ),
    "exponential_map": lambda x: mf.exponential_map(SPHERE, x, VECTOR, throw=False),
    "limit_map": lambda x: mf.limit_map(LOSS, x, throw=False),
    "project": lambda x: SPHERE.project(x, throw=False),
    "minimize": lambda x: mf.minimize(SPHERE, lambda y: y[2], x, throw=False).final,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_call_the_host_for_nothing(name):
    """So that JAX keeps them in its cache on disk."""
    text = jax.jit(PROGRAMS[name]).lower(START).as_text()
    equal("callbacks", text.count("callback"), 0)


def test_more_saves_are_no_larger_program():
    lowered = lambda num_saves: jax.jit(lambda x: solved(x, num_saves=num_saves)).lower(START)
    sizes = [len(lowered(num_saves).as_text()) for num_saves in (2, 50)]
    at_most("growth of the text", sizes[1] / sizes[0], 1.01)


def test_derivatives_through_several_legs():
    """In the start and the end time, by both modes, against differences."""
    weights = jnp.arange(12.0).reshape(4, 3)

    def value(x, end_time, adjoint=None):
        options = {"rtol": 1e-9, "atol": 1e-11, "num_saves": 4, "adjoint": adjoint}
        return jnp.sum(weights * solved(x, end_time=end_time, **options)[1:])

    def twice(x, end_time):
        found = value(x, end_time, dfx.ForwardMode())
        return found, found

    backward = jax.jit(jax.grad(value, argnums=(0, 1)))(START, 1.3)
    tangent, h = jnp.array([0.8, -0.6, 0.5]), 1e-5
    ahead, back = (SPHERE.retract(START, sign * h * tangent) for sign in (1, -1))
    # The values come with the derivatives, so that one program has all of them.
    pushed = jax.jit(jax.jacfwd(twice, argnums=(0, 1), has_aux=True))
    forward = pushed(START, 1.3)[0]
    along = (pushed(ahead, 1.3)[1] - pushed(back, 1.3)[1]) / (2 * h)
    in_time = (pushed(START, 1.3 + h)[1] - pushed(START, 1.3 - h)[1]) / (2 * h)
    for name, (in_start, slope) in {"reverse": backward, "forward": forward}.items():
        close(f"{name} mode, along a tangent", jnp.vdot(in_start, tangent), along, 1e-7)
        close(f"{name} mode, in the end time", slope, in_time, 1e-7)


def test_empty_legs_and_a_way_after_the_last_save():
    times = jnp.array([0.2, 0.2, 0.5])
    height = lambda x: solved(x, save_times=times)[2, 2]
    points = solved(START, save_times=times)
    close("the same save twice", points[1], points[2], 0.0)
    ahead, back = (SPHERE.retract(START, sign * VECTOR / 1000) for sign in (1, -1))
    slope = (height(ahead) - height(back)) / 2e-3
    close("its derivative", jnp.vdot(jax.grad(height)(START), VECTOR), slope, 1e-5)
    # Traced, the end may be that of the last save or beyond it.
    traced = jax.jit(lambda end: mf.solve(FLOW, START, end_time=end, save_times=times))
    for end in (0.5, 0.7):
        walk = traced(end)
        close(f"saves before {end}", walk.points, points, 1e-5)
        there = solved(START, save_times=jnp.array([0.2, 0.4, end]))[-1]  # the program from above
        close(f"the end {end}", walk.final, there, 1e-5)


def test_saves_that_are_not_come_to_are_not_shown():
    rows = []
    until = lambda x: x[2] < -0.35
    walk = mf.solve(FLOW, START, end_time=1.0, num_saves=5, until=until, progress=rows.append)
    jax.effects_barrier()
    assert walk.result == mf.RESULTS.stopped_early
    # x₂ = −tanh t, below −0.35 from t = 0.365 on: in the second of five legs.
    close("times shown", jnp.array([row["time"] for row in rows]), jnp.array([0.0, 0.2]), 1e-12)


def test_parts_are_one_program_alone_and_none_inside():
    compiled = []

    def listen(event, duration, **kwargs):
        if "backend_compile" in event:
            compiled.append(event)

    loss = mf.LeastSquares(jnp.ones((2, 7)), jnp.ones(2), predict=jnp.dot)
    point = jnp.ones(7)
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.block_until_ready(loss.trace_gauss_newton(point))
    equal("programs of a trace called alone", len(compiled), 1)
    inside = jax.jit(lambda x: loss.trace_gauss_newton(x)).lower(point).as_text()
    assert "call" not in inside, inside


def test_the_step_limit_counts_all_legs():
    """Ten steps in five legs, none of which has more than two."""
    options = {"end_time": 1.0, "num_saves": 5, "step_size": 0.1, "solver": dfx.Heun()}
    limited = lambda most: mf.solve(FLOW, START, max_steps=most, throw=False, **options)
    equal("steps", int(limited(10).stats["num_steps"]), 10)
    assert limited(10).result == mf.RESULTS.successful
    walk = limited(9)
    assert walk.result == mf.RESULTS.max_steps_reached
    equal("saves", jnp.isfinite(walk.points).all(axis=1).tolist(), [True] * 5 + [False])
    assert bool(jnp.isnan(walk.final).all())


def test_legs_go_on_with_the_step_that_the_last_one_found():
    """Were each to begin anew with a thousandth of a leg, it would take some five steps."""
    walk = mf.solve(FLOW, START, end_time=1.0, num_saves=50)
    at_most("steps", int(walk.stats["num_steps"]), 50 + 8)
