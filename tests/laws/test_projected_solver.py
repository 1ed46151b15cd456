"""`Projected`: the order of the wrapped solver is kept, and every hook of Diffrax is forwarded."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, at_most, central_difference, close, in_window, slope
from zoo import descent, height, SPHERE

START = jnp.asarray(zoo.START)
FLOW = zoo.descent_flow()


@pytest.mark.parametrize(
    ("solver", "coarsest", "low", "high"),
    [
        (dfx.Euler(), 128, 0.9, 1.1),
        (dfx.Heun(), 64, 1.9, 2.1),
        (dfx.Bosh3(), 64, 2.9, 3.1),
        (dfx.Tsit5(), 16, 4.5, 6.1),
    ],
    ids=["Euler", "Heun", "Bosh3", "Tsit5"],
)
def test_order_is_kept(solver, coarsest, low, high):
    steps = [1 / coarsest, 1 / (2 * coarsest), 1 / (4 * coarsest)]
    errors = []
    for h in steps:
        walk = mf.solve(FLOW, START, end_time=0.5, solver=solver, step_size=h)
        errors.append(float(jnp.linalg.norm(walk.final - descent(START, 0.5))))
        at_most(f"defect at h = {h}", SPHERE.defect(walk.final), 1e-12)
        assert int(walk.stats["num_steps"]) == round(0.5 / h), walk.stats
    in_window(f"order, errors {errors}", slope(steps, errors), low, high)


def test_a_field_that_is_not_tangent_drops_to_first_order():
    """Why flows hand solvers a tangent field: projecting alone is not enough."""
    field = dfx.ODETerm(lambda t, y, args: -jax.grad(height)(y))
    errors, steps = [], [1 / 16, 1 / 64]
    for h in steps:
        solution = dfx.diffeqsolve(field, mf.Projected(dfx.Tsit5(), SPHERE), 0.0, 0.5, h, START)
        errors.append(float(jnp.linalg.norm(solution.ys[0] - descent(START, 0.5))))
    in_window(f"order without a tangent field, errors {errors}", slope(steps, errors), 0.8, 1.2)


@pytest.mark.parametrize(
    "solver",
    [dfx.Kvaerno3(), dfx.Dopri5(), dfx.Dopri8(), dfx.Ralston()],
    ids=lambda s: type(s).__name__,
)
def test_adaptive_solvers(solver):
    """Kvaerno3 is implicit: it needs the forwarded root finder."""
    walk = mf.solve(FLOW, START, end_time=0.5, solver=solver, num_saves=2)
    close(f"{type(solver).__name__} against the closed form", walk.final, descent(START, 0.5), 1e-5)
    at_most("defect", walk.stats["max_defect"], 1e-12)


def end_point(x, adjoint):
    return mf.solve(
        FLOW, SPHERE.project(x), end_time=0.5, adjoint=adjoint, rtol=1e-9, atol=1e-11
    ).final


V, W = jr.normal(jr.key(1), (2, 3))


def finite_difference():
    return central_difference(
        lambda t: descent((y := START + t * V) / jnp.linalg.norm(y), 0.5), 1e-3
    )


@pytest.mark.parametrize(
    "adjoint", [dfx.ForwardMode(), dfx.DirectAdjoint()], ids=["ForwardMode", "DirectAdjoint"]
)
def test_forward_mode(adjoint):
    """Both adjoints set the forwarded `scan_kind`."""
    _, tangent = jax.jit(lambda x: jax.jvp(lambda y: end_point(y, adjoint), (x,), (V,)))(START)
    close("jvp through solve", tangent, finite_difference(), 1e-6)


@pytest.mark.parametrize("adjoint", [None, dfx.DirectAdjoint()], ids=["default", "DirectAdjoint"])
def test_reverse_mode(adjoint):
    gradient = jax.jit(jax.grad(lambda x: jnp.dot(W, end_point(x, adjoint))))(START)
    expected = float(finite_difference() @ W)
    at_most("vjp through solve", abs(float(gradient @ V) - expected), 1e-6 * abs(expected))


def test_half_solver_around_a_projected_solver():
    """Step doubling gives Euler an error estimate, so adaptive steps."""
    solver = dfx.HalfSolver(mf.Projected(dfx.Euler(), SPHERE))
    solution = dfx.diffeqsolve(
        FLOW.terms(START), solver, 0.0, 0.5, None, START,
        stepsize_controller=dfx.PIDController(1e-4, 1e-6), max_steps=4096,
    )  # fmt: skip
    close("HalfSolver(Projected(Euler))", solution.ys[0], descent(START, 0.5), 5e-3)
    at_most("defect", SPHERE.defect(solution.ys[0]), 1e-12)
    at_least("steps of unequal size", solution.stats["num_accepted_steps"], 5)


def brownian_mean(solver, levy_area, num_paths=400, h=0.02):
    """E x_1 of Brownian motion on the sphere (Stratonovich, dx = P∘dW), and its standard error."""

    def path(key):
        noise = dfx.VirtualBrownianTree(0.0, 1.0, h / 4, (3,), key, levy_area=levy_area)
        field = lambda t, y, args: jnp.eye(3) - jnp.outer(y, y) / (y @ y)
        drift = dfx.ODETerm(lambda t, y, args: jnp.zeros_like(y))
        solution = dfx.diffeqsolve(
            dfx.MultiTerm(drift, dfx.ControlTerm(field, noise)),
            mf.Projected(solver, SPHERE), 0.0, 1.0, h, START,
        )  # fmt: skip
        return solution.ys[0]

    ends = np.asarray(jax.jit(jax.vmap(path))(jr.split(jr.key(5), num_paths)))
    return ends, ends.mean(axis=0), ends.std(axis=0) / np.sqrt(num_paths)


@pytest.mark.parametrize(
    ("solver", "levy_area"),
    [(dfx.SPaRK(), dfx.SpaceTimeLevyArea), (dfx.Heun(), dfx.BrownianIncrement)],
    ids=["SPaRK", "Heun"],
)
def test_stochastic_solvers(solver, levy_area):
    """SPaRK asks for more than increments: the forwarded `term_compatible_contr_kwargs`."""
    ends, mean, error = brownian_mean(solver, levy_area)
    at_most("off the sphere", np.max(np.abs(np.linalg.norm(ends, axis=1) - 1)), 1e-12)
    bias = 2.5 * 0.02 * np.exp(-1.0)  # of projected steps of size h, relative 2.5·h
    for i in range(3):
        off = abs(mean[i] - np.exp(-1.0) * START[i])
        at_most(f"mean of coordinate {i}, seed 5", off, 4 * error[i] + bias)


def test_equinox_models_keep_their_static_leaves():
    """`like` gives the projection what the state lacks: activations and sizes."""
    place = zoo.place("mlp")
    manifold, flow = place.manifold, mf.LimitDiffusion(place.manifold, mf.LabelNoise(1.0))
    solver = mf.Projected(dfx.Euler(), manifold, like=place.point)
    solution = dfx.diffeqsolve(flow.terms(place.point), solver, 0.0, 0.1, 0.05, place.coordinates)
    final = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    final = eqx.combine(final, place.point)
    at_most("defect of the network", manifold.defect(final), 1e-9)
