"""What failed is NaN, and so are its derivatives; the other members of a batch never notice."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.tree_util import Partial

import manifoldflow as mf
from checks import at_most
from manifoldflow import geometry, symmetry

SPHERE = mf.LevelSet(lambda x: jnp.sum(x**2) - 1)
TANGENT = jnp.array([0.3, -0.2])
CENTRE, LOST, START = jnp.zeros(2), jnp.array([jnp.nan, 0.9]), jnp.array([0.6, 0.9])
OTHER = jnp.array([0.8, 0.6])
FORWARD, REVERSE = dfx.ForwardMode(), dfx.RecursiveCheckpointAdjoint()


def circle(square):
    """The circle of this squared radius, which has no normal space at its centre."""
    return mf.LevelSet(Partial(lambda square, x: jnp.sum(x**2) - square, square))


def height(slope, x):
    return slope * x[0] + x[1] ** 2


def geodesics(adjoint):
    return geometry.GeodesicOptions(solver=dfx.Heun(), step_size=0.5, adjoint=adjoint)


def rotated(x, angle):
    """On the circle for a start beside its centre, at the centre for one there."""
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return turn @ x / jnp.linalg.norm(START)


def solved(x, slope, adjoint, fn=height, **options):
    flow = mf.RiemannianGradientFlow(SPHERE, Partial(fn, slope))
    options = {"end_time": 0.5, "step_size": 0.25, "solver": dfx.Heun(), **options}
    observe = {"sum": jnp.sum}
    solution = mf.solve(flow, x, throw=False, observe=observe, adjoint=adjoint, **options)
    return of_solution(solution)


def of_solution(solution):
    observed = {name: values[-1] for name, values in solution.observables.items()}
    return {"final": solution.final, "points": solution.points[-1], **observed}


def pole(slope, x):
    """Whose gradient is no number beyond a line that only the first member comes to."""
    return slope * x[0] + 1e-3 * jnp.sqrt(x[0] + 0.7)


def cliff(slope, x):
    """For which the first member needs many more steps."""
    return slope * x[0] + 1e6 * jax.nn.relu(-x[0]) ** 3 * x[1]


def diffused(x, std, adjoint, **options):
    flow = mf.SGDDiffusion(mf.FunctionLoss(lambda p: jnp.sum(p**4)), mf.IsotropicNoise(std), 0.1)
    return walked(flow, x, adjoint, **options)


def wandered(x, square, adjoint, **options):
    return walked(mf.BrownianMotion(circle(square)), x, adjoint, **options)


def walked(flow, x, adjoint, **options):
    options = {"end_time": 0.1, "step_size": 0.05, "key": jr.key(0), **options}
    return of_solution(mf.solve(flow, x, throw=False, adjoint=adjoint, **options))


def simulated(x, target, adjoint):
    del adjoint
    loss = mf.LeastSquares(jnp.array([[1.0, 0.5]]), target[None], predict=lambda p, z: (p**3) @ z)
    run = mf.simulate(
        loss, mf.IsotropicNoise(0.0), optax.sgd, x, learning_rate=0.1, num_steps=6,
        key=jr.key(0), observe={"sum": jnp.sum}, throw=False,
    )  # fmt: skip
    return of_solution(run)


def product(p, example):
    return (p[0] * p[1] * example[0] - example[1]) ** 2


def equilibrium(find, x, target, adjoint):
    del adjoint
    one = symmetry.ExponentialSymmetry(jnp.array([1.0, -1.0]))
    data = jnp.array([1.0, 2.0]), target * jnp.array([1.0, 3.0])
    return find(one, x, data)


def minimised(x, slope, adjoint):
    del adjoint
    return mf.minimize(SPHERE, Partial(height, slope), x, throw=False).final


class Case(NamedTuple):
    """A function of a start, a number and the adjoint, and starts from which it fails."""

    fn: Callable
    starts: tuple
    modes: tuple = ("reverse", "forward")


def on_circle(fn):
    """A function of manifold and start."""
    return lambda x, square, adjoint: fn(circle(square), x)


NOWHERE = CENTRE, LOST
OTHER_OUTPUTS = "saves, reverse", "observed, reverse"
RETRACTION = mf.ProjectionRetraction()
CASES = {
    "project": Case(on_circle(lambda m, x: m.project(x, throw=False)), NOWHERE),
    "retract": Case(on_circle(lambda m, x: m.retract(x, TANGENT, throw=False)), NOWHERE),
    "tangent_projection": Case(
        lambda x, scale, adjoint: SPHERE.tangent_projection(x, scale * TANGENT, throw=False),
        NOWHERE,
    ),
    "normal_projection": Case(
        lambda x, scale, adjoint: SPHERE.normal_projection(x, scale * TANGENT, throw=False),
        NOWHERE,
    ),
    "tangent_projection, of a manifold that moves": Case(
        on_circle(lambda m, x: m.tangent_projection(x, TANGENT, throw=False)), NOWHERE
    ),
    "limit_map": Case(
        on_circle(lambda m, x: mf.limit_map(m, x, max_steps=10, throw=False)),
        (*NOWHERE, 1e9 * START),
    ),
    "closest_point": Case(
        lambda x, square, adjoint: mf.closest_point(SPHERE, square * x, throw=False), NOWHERE
    ),
    "inverse_retract": Case(
        lambda x, scale, adjoint: mf.inverse_retract(
            mf.NewtonRetraction(), SPHERE, x, scale * OTHER, throw=False
        ),
        (LOST, -OTHER),
    ),
    "logarithm_map": Case(
        lambda x, square, adjoint: mf.logarithm_map(
            circle(square), x, OTHER, walk=geodesics(adjoint), throw=False
        ),
        NOWHERE,
        ("reverse",),
    ),
    "exponential_map": Case(
        lambda x, square, adjoint: mf.exponential_map(
            circle(square), x, TANGENT, walk=geodesics(adjoint), throw=False
        ),
        NOWHERE,
    ),
    "geodesic": Case(
        lambda x, square, adjoint: mf.geodesic(
            circle(square), x, TANGENT, jnp.array([0.5, 1.0]), walk=geodesics(adjoint), throw=False
        ),
        NOWHERE,
    ),
    "transport_along_geodesic": Case(
        lambda x, square, adjoint: mf.transport_along_geodesic(
            circle(square), x, TANGENT, OTHER, 1.0, walk=geodesics(adjoint), throw=False
        ),
        NOWHERE,
    ),
    "parallel_transport": Case(
        lambda x, square, adjoint: mf.parallel_transport(
            circle(square), Partial(rotated, x), TANGENT, walk=geodesics(adjoint), throw=False
        ),
        NOWHERE,
    ),
    "solve": Case(solved, NOWHERE),
    "solve, adaptive": Case(functools.partial(solved, step_size=None, solver=None), NOWHERE),
    "solve, a pole on the way": Case(
        functools.partial(solved, fn=pole, num_saves=2, step_size=0.05), (jnp.array([-0.6, 0.8]),)
    ),
    "solve, too many steps": Case(
        functools.partial(
            solved, fn=cliff, step_size=None, solver=None, max_steps=40, end_time=0.1
        ),
        (jnp.array([-0.6, 0.8]),),
    ),
    "solve, noise in a scan": Case(wandered, NOWHERE),
    "solve, noise off a manifold": Case(diffused, (LOST, jnp.array([1e200, 0.0]))),
    "solve, noise by Diffrax": Case(
        functools.partial(diffused, solver=dfx.Euler(), num_saves=2), (LOST,)
    ),
    "simulate": Case(simulated, (LOST, 1e3 * START)),
    "minimize": Case(minimised, NOWHERE, ("forward",)),
    "noise_equilibrium": Case(
        functools.partial(
            equilibrium,
            lambda one, x, data: symmetry.noise_equilibrium(
                one, product, x, data, noise_scale=0.1, throw=False
            ),
        ),
        (LOST,),
    ),
    "balance": Case(
        functools.partial(
            equilibrium,
            lambda one, x, data: symmetry.balance(
                x, (product, data), noise_scale=0.1, symmetries=[one], throw=False
            ),
        ),
        (LOST, jnp.array([0.0, 1.0])),
    ),
    "solve, its other outputs": Case(solved, NOWHERE, OTHER_OUTPUTS),
    "simulate, its other outputs": Case(simulated, (LOST, 1e3 * START), OTHER_OUTPUTS),
}  # fmt: skip


def forward(fn, x, number):
    """The values, and their derivatives along ones in the start and in the number."""
    along = lambda *directions: jax.jvp(lambda *at: fn(*at, FORWARD), (x, number), directions)
    starts = jnp.stack([jnp.ones_like(x), jnp.zeros_like(x)])
    numbers = jnp.stack([jnp.zeros_like(number), jnp.ones_like(number)])
    # Once for both directions: each push of `jax.linearize` would hold all loops again.
    values, slopes = jax.vmap(along)(starts, numbers)
    member = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    return member(values, 0), member(slopes, 0), member(slopes, 1)


def reverse(fn, x, number, told="final"):
    """The values of one output, and its derivatives: NaN in another must not hide what is not."""
    output = lambda value: value[told] if isinstance(value, dict) else value
    value, pull = jax.vjp(lambda *at: output(fn(*at, REVERSE)), x, number)
    return value, *pull(jax.tree.map(jnp.ones_like, value))


MODES = {
    "reverse": reverse,
    "forward": forward,
    "saves, reverse": functools.partial(reverse, told="points"),
    "observed, reverse": functools.partial(reverse, told="sum"),
}
WHAT = "value", "derivative in the start", "derivative in the number"


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, case in CASES.items() for mode in case.modes]
)
def test_values_and_derivatives(name, mode):
    case = CASES[name]
    # One program for the batch with failed members and for one without.
    both = jax.jit(jax.vmap(functools.partial(MODES[mode], case.fn)))
    numbers = jnp.ones(len(case.starts) + 1)
    together = both(jnp.stack([*case.starts, START]), numbers)
    healthy = both(jnp.stack([START] * len(numbers)), numbers)
    wrong = []
    for what, members, others in zip(WHAT, together, healthy):
        for leaf, expected in zip(jax.tree.leaves(members), jax.tree.leaves(others)):
            for start, member in zip(case.starts, leaf):
                if not bool(jnp.all(jnp.isnan(member))):
                    wrong.append(f"{what} of what failed from {start}: {member}")
            assert bool(jnp.all(jnp.isfinite(expected))), f"{what} of the other: {expected[-1]}"
            at_most(f"{what} of the other", jnp.max(jnp.abs(leaf[-1] - expected[-1])), 1e-14)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_search_from_no_number_says_so(dtype):
    """NaN, and numbers whose squares are none: not a point that is merely off the manifold."""
    far = 1e30 if dtype == "float32" else 1e200
    starts = jnp.array([[jnp.nan, 0.5], [far, far], [0.6, 0.9]], dtype)
    searches = {
        "project": lambda x: SPHERE.project_with_info(x)[1].result,
        "retract": lambda x: SPHERE.retract_with_info(x, TANGENT.astype(dtype))[1].result,
    }
    for name, search in searches.items():
        lost, beyond, found = (search(start) for start in starts)
        assert lost == mf.RESULTS.nonfinite, (name, lost)
        assert beyond == mf.RESULTS.nonfinite, (name, beyond)
        assert found == mf.RESULTS.successful, (name, found)
