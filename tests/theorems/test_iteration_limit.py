"""[Katzenberger1991]: any iteration along the zeros of its mean field, in the limit η → 0.

θ ← θ − η(F + ξ) + η²G follows ½∂²Φ[Σ] + ΠG and Πσ, Φ the limit of θ' = −F, which the oracle
of `iteration_laws` integrates.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import lawbook
import manifoldflow as mf
from checks import at_least, at_most, close, equal, flat, norm, refused
from iteration_laws import CASES, drift_law, iteration
from limit_laws import problem
from manifoldflow import flows

SMALL = "six by two"


def limit(here, **options):
    return mf.IterationLimit(here.field, here.covariance, here.slow, **options)


@pytest.mark.parametrize("name", CASES)
def test_the_drift_against_the_integrated_mean_field(name):
    drift_law(lambda here: limit(here).drift(here.point), name)


def test_the_mean_field_is_no_gradient():
    for name in CASES:
        here = iteration(name)
        matrix = np.asarray(jax.jit(jax.jacfwd(here.field))(here.point))
        at_least(f"A − Aᵀ of {name}", norm(matrix - matrix.T) / norm(matrix), 0.3)


@pytest.mark.parametrize("name", ["least squares", "function"])
def test_a_gradient_gives_the_limit_of_sgd(name):
    here = problem(name)
    sigma = here.factor @ here.factor.T
    flow = mf.IterationLimit(here.loss.gradient, lambda x: sigma, rank=2)
    sgd = mf.LimitDiffusion(here.manifold, mf.CustomNoise(lambda x: here.factor))
    close("drift", flow.drift(here.point), sgd.drift(here.point), 1e-10)
    operator = lx.MatrixLinearOperator(sigma, lx.symmetric_tag)
    half = mf.limit_map_second_derivative(here.manifold, here.point, operator) / 2
    close("½∂²Φ[Σ]", flow.drift(here.point), half, 1e-10)
    roots = [jax.jit(lambda x, f=f: f.diffusion(x).as_matrix())(here.point) for f in (flow, sgd)]
    close("σσᵀ", roots[0] @ roots[0].T, roots[1] @ roots[1].T, 1e-10)


def oblique(here):
    """1 − Bᵀ(JBᵀ)⁻¹J, by the rows of the field and not by its derivative."""
    rows = np.asarray(jax.jit(here.rows)(here.point))
    jacobian = np.asarray(jax.jit(jax.jacfwd(here.residual))(here.point))
    return np.eye(here.size) - rows.T @ np.linalg.solve(jacobian @ rows.T, jacobian)


@pytest.mark.parametrize("name", CASES)
def test_the_diffusion_is_the_oblique_part_of_the_noise(name):
    here = iteration(name)
    flow, projector = limit(here), oblique(here)
    matrix = np.asarray(jax.jit(lambda x: flow.diffusion(x).as_matrix())(here.point))
    expected = projector @ here.covariance(here.point) @ projector.T
    close("σσᵀ = ΠΣΠᵀ", matrix @ matrix.T, expected, 1e-11)
    jacobian = jax.jit(jax.jacfwd(here.residual))(here.point)
    at_most("σ across Γ", norm(jacobian @ matrix), 1e-7)
    still = mf.IterationLimit(here.field, lambda x: 0 * here.covariance(x), here.slow)
    slow = projector @ np.asarray(here.slow(here.point))
    close("without noise the drift is ΠG", still.drift(here.point), slow, 1e-11)


def test_forms_of_points_and_covariances():
    """PyTrees, operators, ranks and Γ itself make no difference; nor do jit and vmap."""
    here = iteration(SMALL)
    expected = limit(here).drift(here.point)
    tree = lambda x: {"a": x[:4].reshape(2, 2), "b": x[4:], "name": "net"}
    whole = lambda p: jnp.concatenate([p["a"].reshape(-1), p["b"]])
    tangent = lambda x: {"a": x[:4].reshape(2, 2), "b": x[4:], "name": None}

    def operator(point):
        structure = jax.eval_shape(lambda: eqx.filter(tree(here.point), eqx.is_array))
        sigma = here.covariance(whole(point))
        return lx.FunctionLinearOperator(
            lambda v: tangent(sigma @ whole(v)), structure, lx.symmetric_tag
        )

    of_trees = mf.IterationLimit(
        lambda p: tangent(here.field(whole(p))), operator, lambda p: tangent(here.slow(whole(p)))
    )
    close("a PyTree", flat(of_trees.drift(tree(here.point))), expected, 1e-12)
    on_it = limit(here, rank=2, manifold=mf.LevelSet(here.residual))
    close("an integer rank, and Γ", on_it.drift(here.point), expected, 1e-12)
    close("a share", limit(here, rank=1e-3).drift(here.point), expected, 1e-12)
    close("jit", jax.jit(limit(here).drift)(here.point), expected, 1e-12)
    points = here.point + 1e-3 * jnp.arange(3.0)[:, None]
    several = jax.jit(jax.vmap(limit(here, rank=2).drift))(points)
    for x, found in zip(points, several):
        close("vmap", found, limit(here, rank=2).drift(x), 1e-11)


def test_derivatives_of_drift_and_diffusion():
    here = iteration(SMALL)
    flow = limit(here, rank=2)
    lawbook.derivative_law("drift", flow.drift, here.point, 3, bound=1e-7, step=1e-3)
    root = lambda x: flow.diffusion(x).mv(jnp.ones(here.size))
    lawbook.derivative_law("diffusion", root, here.point, 4, bound=1e-7, step=1e-3)


def test_single_precision():
    here = iteration(SMALL)
    found = limit(here, rank=2).drift(here.point.astype(jnp.float32))
    equal("dtype", found.dtype, jnp.dtype("float32"))
    close("drift", found, limit(here).drift(here.point), 1e-4)


# --- solving -------------------------------------------------------------------------------


def test_a_solve_stays_on_the_manifold():
    """Euler's mean in small time is the drift, and every save is a zero of the field."""
    here = iteration(SMALL)
    flow = limit(here, rank=2, manifold=mf.LevelSet(here.residual))
    options = {"end_time": 0.01, "step_size": 0.005, "throw": False}
    end = lambda key: mf.solve(flow, here.point, key=key, **options).final
    ends = np.asarray(jax.jit(jax.vmap(end))(jr.split(jr.key(3), 1000)))
    residuals = jax.jit(jax.vmap(here.residual))(ends)
    at_most("residuals at the end", np.max(np.abs(residuals)), 1e-7)
    mean, error = ends.mean(0) - here.point, ends.std(0) / np.sqrt(len(ends))
    gap = np.abs(mean - 0.01 * np.asarray(flow.drift(here.point)))
    at_most("mean motion in standard errors, seed 3", np.max((gap - 1e-4) / error), 4)


def test_without_its_manifold_it_is_solved_too():
    here = iteration(SMALL)
    walk = mf.solve(limit(here), here.point, end_time=1e-3, key=jr.key(0))
    at_most("residuals at the end", norm(here.residual(walk.final)), 1e-2)
    with refused(ValueError, "key"):
        mf.solve(limit(here), here.point, end_time=1e-3)


# --- where a hypothesis fails --------------------------------------------------------------

IDENTITY = lambda x: jnp.eye(3)
FAILURES = {
    "not semisimple": lambda x: jnp.stack([x[1], 0 * x[1], x[2]]),
    "real part": lambda x: jnp.stack([0 * x[0], x[1], -x[2]]),
    "real part is not": lambda x: jnp.stack([0 * x[0], x[2], -x[1]]),
}


@pytest.mark.parametrize("words", FAILURES)
def test_a_failed_hypothesis_says_so(words):
    flow = mf.IterationLimit(FAILURES[words], IDENTITY)
    check = flow.check(jnp.zeros(3))
    assert isinstance(check, flows.IterationCheck)
    assert not check.is_fine and words in check.problem and check.problem in str(check)
    with refused(ValueError, "has no drift", words):
        flow.drift(jnp.zeros(3))
    assert np.all(np.isnan(jax.jit(flow.drift)(jnp.zeros(3)))), "no NaN under jit"


def test_where_the_hypotheses_hold():
    here = iteration(SMALL)
    check = limit(here).check(here.point)
    assert check.is_fine, check
    equal("rank", check.rank, 2)
    off = np.linalg.eigvals(np.asarray(jax.jit(jax.jacfwd(here.field))(here.point)))
    slowest = np.sort(np.abs(off))[-2:].min()
    at_most("slowest rate", abs(check.slowest_rate - slowest), 1e-12)
    at_most("defect", check.defect, 1e-14)
    beside = limit(here, rank=2).check(here.point + 1e-3)
    distance = norm(mf.LevelSet(here.residual).project(here.point + 1e-3) - here.point - 1e-3)
    close("distance", beside.defect, distance, 0.5)
    spinning = lambda x: jnp.stack([0 * x[0], 0.1 * x[1] + x[2], 0.1 * x[2] - x[1]])
    flow = mf.IterationLimit(spinning, IDENTITY)
    at_most("a slow spiral", abs(flow.check(jnp.zeros(3)).slowest_rate - 0.1), 1e-12)
    close("its linear field has no drift", flow.drift(jnp.zeros(3)), jnp.zeros(3), 0.0, scale=1)
    with refused(ValueError, "outside of jit"):
        jax.jit(lambda x: flow.check(x).defect)(jnp.zeros(3))


def test_what_is_refused():
    zero = lambda x: 0 * x
    for rank in (-1, 1.5, True, "two"):
        with refused(ValueError, "rank must be", repr(rank), wrong_type=True):
            mf.IterationLimit(zero, IDENTITY, rank=rank)
    with refused(ValueError, "manifold must be", wrong_type=True):
        mf.IterationLimit(zero, IDENTITY, manifold="sphere")
    with refused(ValueError, "mean_field", wrong_type=True):
        mf.IterationLimit(jnp.ones(3), IDENTITY)
    with refused(ValueError, "rank 4 exceeds the 3"):
        mf.IterationLimit(zero, IDENTITY, rank=4).drift(jnp.zeros(3))
    with refused(ValueError, "value of mean_field"):
        mf.IterationLimit(lambda x: x[:2], IDENTITY).drift(jnp.zeros(3))
    with refused(ValueError, "value of slow_drift"):
        mf.IterationLimit(zero, IDENTITY, lambda x: x[:2]).drift(jnp.zeros(3))
    with refused(ValueError, "value of covariance", "(3, 3)", "(2, 2)"):
        mf.IterationLimit(zero, lambda x: jnp.eye(2)).drift(jnp.zeros(3))
    with refused(ValueError, "value of covariance must map tangents"):
        wrong = lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2,), jnp.dtype("float64")))
        mf.IterationLimit(zero, lambda x: wrong).drift(jnp.zeros(3))
