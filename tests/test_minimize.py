"""`minimize`: to the minimum that is known, at the rate that is known, and honest where not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import manifoldflow as mf
import zoo
from checks import at_least, at_most, close, equal, flat, in_window, norm, refused
from manifoldflow import linalg
from manifoldflow.optimize import (
    AbstractMethod,
    Attempt,
    Iterate,
    minimize,
    Problem,
    RiemannianGradientDescent,
    RiemannianOptax,
    RiemannianTrustRegion,
    Work,
)
from manifoldflow.optimize._conjugate_gradients import truncated_cg

SPHERE = zoo.SPHERE
MATRIX = np.diag([-3.0, -1.0, 0.5, 1.0, 2.0, 4.0]) + 0.5
START = jnp.array([0.3, -0.8, 0.5, 0.4, -0.6, 0.9])
heavy_ball = optax.sgd(0.05, momentum=0.8)
METHODS = {
    "trust region": RiemannianTrustRegion(),
    "gradient descent": RiemannianGradientDescent(),
    "momentum": RiemannianOptax(heavy_ball),
    "adam": RiemannianOptax(optax.adam(0.03)),
}


class Quadratic(eqx.Module):
    matrix: jax.Array = eqx.field(converter=jnp.asarray)

    def __call__(self, x):
        return x @ self.matrix @ x


RAYLEIGH = Quadratic(MATRIX)


def cubic(x):
    return RAYLEIGH(x) + jnp.sum(x**3)


# --- known minima --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_rayleigh_quotient_has_its_minimum_at_the_smallest_eigenvalue(method):
    solution = minimize(SPHERE, RAYLEIGH, START, method=method, observe={"f": RAYLEIGH})
    smallest = float(np.linalg.eigvalsh(MATRIX)[0])
    assert solution.result == mf.RESULTS.successful and bool(solution.is_successful)
    at_most("value", abs(float(RAYLEIGH(solution.final)) - smallest), 1e-13)
    stats = {name: float(value) for name, value in solution.stats.items()}
    gradient = mf.riemannian_gradient(SPHERE, RAYLEIGH, solution.final)
    at_most("gradient", norm(gradient), 1e-9)
    at_most("gradient as stated", abs(norm(gradient) - stats["gradient_norm"]), 1e-13)
    at_most("defect", stats["max_defect"], 1e-10)
    at_most("defect at the end", SPHERE.defect(solution.final), 1e-14)
    equal("gradients", stats["num_gradients"], 1 + stats["num_steps"] + stats["num_rejected"])
    equal("times", solution.times.tolist(), [0, stats["num_steps"]])
    equal("Hessians", stats["num_hessian_products"] > 0, method is METHODS["trust region"])
    at_least("factorisations", stats["num_factorizations"], 3 * stats["num_steps"])
    close("start", solution.point(0), START / jnp.linalg.norm(START), 1e-13)
    close("end", solution.point(-1), solution.final, 1e-15)
    ends = jnp.array([RAYLEIGH(solution.point(0)), RAYLEIGH(solution.final)])
    close("observed", solution.observables["f"], ends, 1e-13)


def orthonormal(x):
    return (x.T @ x - jnp.eye(3))[jnp.triu_indices(3)]


def test_brocketts_function_sorts_the_eigenvectors():
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0]
    matrix = rotation @ np.diag([-2.0, -0.5, 1.0, 2.0, 4.0]) @ rotation.T
    brockett = lambda x: jnp.sum(x * (matrix @ x) * jnp.array([3.0, 2.0, 1.0]))
    start = jr.normal(jr.key(1), (5, 3))
    solution = minimize(mf.LevelSet(orthonormal), brockett, start)
    close("value", brockett(solution.final), 3 * -2.0 + 2 * -0.5 + 1.0, 1e-13)
    cosines = jnp.abs(rotation[:, :3].T @ solution.final)
    close("eigenvectors", cosines, jnp.eye(3), 1e-9)


def test_minimisers_of_a_loss():
    motor = mf.models.KPhaseMotor(3)
    height = lambda x: x[1] + jnp.sum(x[2:] ** 2)
    solution = minimize(motor.manifold, height, motor.point(0.3))
    close("the lowest point of the circle", solution.final, motor.point(-np.pi / 2), 1e-10)


def test_any_model_goes_down():
    loss = mf.LeastSquares(*zoo.data(num_outputs=1))
    manifold, model = mf.ZeroLossManifold(loss), zoo.mlp(jr.key(6), 1)
    sharpness = {
        "tr H": loss.trace_gauss_newton,
        "λ_max": lambda p: loss.scale * linalg.gram_largest_eigenvalue(loss.jacobian(p)),
        "ln det": lambda p: linalg.gram_log_determinant(loss.jacobian(p)),
    }
    for name, fn in sharpness.items():
        solution = minimize(
            manifold, fn, model, max_steps=12, observe={"it": fn, "loss": loss}, throw=False
        )
        before, after = (float(x) for x in solution.observables["it"])
        at_least(f"{name} falls from {before} to {after}, by", before - after, 0.1 * abs(before))
        at_most(f"{name}: loss", jnp.max(solution.observables["loss"]), 1e-20)
        assert solution.point(-1).activation is model.activation
        slope = mf.riemannian_gradient(manifold, fn, solution.point(-1))
        at_most(f"{name}: gradient", abs(norm(slope) - solution.stats["gradient_norm"]), 1e-9)


# --- the trust region ----------------------------------------------------------------------


ROWS = []


def recorded(**options):
    """A search, and the rows that it showed on its way."""
    ROWS.clear()
    solution = minimize(SPHERE, cubic, START, progress=ROWS.append, **options)
    jax.effects_barrier()
    return solution, list(ROWS)


def gradient_norms(rows):
    return [float(row["gradient_norm"]) for row in rows]


def test_newtons_rate():
    norms = gradient_norms(recorded(gradient_tolerance=1e-11)[1])
    tail = sorted({x for x in norms if 1e-13 < x < 0.5}, reverse=True)
    orders = [np.log(c / b) / np.log(b / a) for a, b, c in zip(tail, tail[1:], tail[2:])]
    in_window(f"order of convergence of {norms}", orders[-1], 1.7, 4.0)
    at_most("gradient at the end", norms[-1], 1e-11)
    at_most("attempts", len(norms), 15)


def test_it_leaves_saddles():
    """Near the second eigenvector the gradient is 10⁻⁶, and the way down is curvature alone."""
    saddle = jnp.eye(6)[1] + 1e-6 * jnp.eye(6)[0]
    form = Quadratic(np.diag([-3.0, -1.0, 0.5, 1.0, 2.0, 4.0]))
    solution = minimize(SPHERE, form, saddle)
    close("minimum", form(solution.final), -3.0, 1e-13)
    at_most("attempts", solution.stats["num_steps"] + solution.stats["num_rejected"], 15)


def test_the_hessian_is_the_covariant_one():
    place = zoo.place("codimension 3")
    fn = lambda x: jnp.sum(jnp.sin(x))
    problem = Problem(place.manifold, fn, None)
    vector = place.manifold.random_tangent(place.point, jr.key(2))
    found = eqx.filter_jit(lambda p, x, v: p.hessian(p.at(x))(v))(problem, place.point, vector)
    expected = mf.covariant_hessian(place.manifold, fn, place.point).mv(vector)
    close("Hv", found, expected, 1e-9)


@pytest.mark.parametrize("radius, curvature", [(1e3, 1.0), (0.1, 1.0), (0.5, -1.0)])
def test_truncated_conjugate_gradients(radius, curvature):
    """Against the exact step where that is inside; else on the boundary, and downhill."""
    values = jnp.array([1.0, 2.0, 3.0, 5.0]) * jnp.array([curvature, 1, 1, 1])
    gradient = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([0.3, 0.2])}
    product = lambda v: {"a": values[:2] * v["a"], "b": values[2:] * v["b"]}
    step = truncated_cg(product, gradient, jnp.asarray(radius), jnp.asarray(1e-12), 10)
    v, g = flat(step.vector), flat(gradient)
    close("decrease", step.decrease, -(g @ v + v @ (values * v) / 2), 1e-12)
    at_least("decrease", step.decrease, float(g @ g) / 20 * min(1, radius))
    is_inside = radius > 10
    equal("at the boundary", bool(step.is_at_boundary), not is_inside)
    if is_inside:
        close("Newton's step", v, -g / values, 1e-12)
        equal("products", int(step.num_products), 4)
    else:
        close("length", jnp.linalg.norm(v), radius, 1e-12)


# --- when it ends --------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", ["trust region", "gradient descent"])
def test_it_stops_at_the_tolerance(name):
    method = METHODS[name] if name != "trust region" else None
    solution, rows = recorded(method=method, gradient_tolerance=1e-3)
    norms = gradient_norms(rows)
    assert norms[-1] <= 1e-3 < min(norms[:-1]), norms
    attempts = int(solution.stats["num_steps"] + solution.stats["num_rejected"])
    equal("rows", len(rows), attempts + 1)
    close("last row", rows[-1]["coordinates"], solution.final, 1e-15)
    close("last value", rows[-1]["value"], cubic(solution.final), 1e-13)
    equal("steps", float(rows[-1]["time"]), float(solution.times[-1]))


def test_stationary_starts_stay():
    pole = jnp.eye(6)[0]
    solution = minimize(SPHERE, lambda x: x[0], pole)
    equal("steps", solution.times.tolist(), [0, 0])
    close("the point", solution.final, pole, 1e-15)
    points = mf.LevelSet(lambda x: x**2 - 1)
    close(
        "dimension 0", minimize(points, jnp.sum, jnp.array([0.9, -1.2])).final, [1.0, -1.0], 1e-13
    )


@pytest.mark.parametrize("name", ["trust region", "gradient descent"])
def test_rounding_ends_the_search(name):
    solution = minimize(
        SPHERE, cubic, START, method=METHODS[name], gradient_tolerance=0, throw=False
    )
    assert solution.result == mf.RESULTS.stalled, solution.result
    at_most("gradient", solution.stats["gradient_norm"], 1e-13)
    assert np.isfinite(solution.points).all() and np.isnan(solution.final).all()
    at_most("steps", solution.times[-1], 200)


def test_too_few_steps():
    ask = lambda throw: minimize(SPHERE, cubic, START, max_steps=2, throw=throw)
    solution = ask(False)
    assert solution.result == mf.RESULTS.max_steps_reached, solution.result
    assert np.isnan(solution.final).all() and np.isfinite(solution.points).all()
    attempts = int(solution.stats["num_steps"] + solution.stats["num_rejected"])
    equal("attempts", attempts, 2)
    with refused(eqx.EquinoxRuntimeError, "max_steps"):
        ask(True)


def _shell(radius, x):
    return jnp.sum(x**2) - radius * jnp.abs(radius)


def test_one_member_without_a_manifold():
    """It is NaN, and the others do not notice."""

    @jax.jit
    @jax.vmap
    def run(radius):
        manifold = mf.LevelSet(jax.tree_util.Partial(_shell, radius))
        return minimize(manifold, RAYLEIGH, START, throw=False)

    many = run(jnp.array([1.0, -1.0, 2.0]))
    equal("successful", many.is_successful.tolist(), [True, False, True])
    equal("NaN", jnp.isnan(many.final).all(axis=1).tolist(), [False, True, False])
    assert np.isnan(many.points[1]).all()
    missing = jax.vmap(lambda result: result == mf.RESULTS.not_on_manifold)(many.result)
    equal("not on a manifold", missing.tolist(), [False, True, False])
    values = jax.vmap(RAYLEIGH)(many.final)[jnp.array([0, 2])]
    smallest = np.linalg.eigvalsh(MATRIX)[0]
    close("values", values, smallest * jnp.array([1.0, 4.0]), 1e-13)
    equal("steps of a member that fails", int(many.stats["num_steps"][1]), 0)


@pytest.mark.parametrize("name", ["trust region", "momentum"])
def test_values_that_are_not_finite(name):
    start = -jnp.eye(6)[0] - 0.1
    broken = minimize(SPHERE, lambda x: jnp.log(x[0]), start, method=METHODS[name], throw=False)
    assert broken.result == mf.RESULTS.nonfinite and np.isnan(broken.final).all()


def edged(x):
    """Without a value beyond x₀ = 0, near its minimum on the sphere."""
    return x[0] - jnp.sqrt(x[0]) / 4


@pytest.mark.parametrize("name", ["trust region", "gradient descent"])
def test_steps_to_where_there_is_no_value_are_taken_back(name):
    solution = minimize(SPHERE, edged, jnp.eye(6)[0] + 0.1, method=METHODS[name])
    close("minimum at x₀ = 1/64", solution.final[0], 1 / 64, 1e-8)


# --- another method ------------------------------------------------------------------------


class FixedSteps(AbstractMethod):
    """What a newcomer writes."""

    rate: float

    @property
    def patience(self) -> int:
        return 10

    def init(self, problem: Problem, iterate: Iterate):
        return jnp.asarray(0)

    def step(self, problem: Problem, iterate: Iterate, state) -> Attempt:
        vector = jax.tree.map(lambda g: -self.rate * g, iterate.gradient)
        trial = problem.moved(mf.NewtonRetraction(), iterate, vector)
        spent = trial.work + Work()
        return Attempt(trial.iterate, state + 1, trial.is_fine, trial.result, spent, trial.defect)


def test_another_method():
    solution = minimize(SPHERE, cubic, START, method=FixedSteps(0.1))
    close("the same minimum", solution.final, minimize(SPHERE, cubic, START).final, 1e-8)
    by_limit = RiemannianTrustRegion(mf.LimitMapRetraction(), initial_radius=0.2)
    solution = minimize(SPHERE, cubic, START, method=by_limit)
    close("another retraction", solution.final, minimize(SPHERE, cubic, START).final, 1e-8)


# --- transformations, precision, what is shown, what is refused ------------------------------

num_traces = 0


class Counted(eqx.Module):
    matrix: jax.Array

    def __call__(self, x):
        global num_traces
        num_traces += 1
        return x @ self.matrix @ x


def test_new_values_do_not_retrace():
    def one(seed, radius, tolerance, point):
        fn = Counted(jnp.asarray(MATRIX) + seed * jnp.eye(6)[2])
        manifold = mf.LevelSet(jax.tree_util.Partial(_shell, jnp.asarray(radius)))
        method = RiemannianTrustRegion()
        return minimize(manifold, fn, point, method=method, gradient_tolerance=tolerance)

    first = one(0.0, 1.0, 1e-8, START)
    before = num_traces
    second = one(1.0, 2.0, 1e-9, 2 * START)
    # Once, to look at the shape of its value.
    at_most("traces in the second call", num_traces - before, 1)
    at_least("with its own answer", norm(first.final - second.final), 0.1)
    assert before > 2, "the counter does not count"


@pytest.mark.parametrize("name", ["trust region", "adam"])
def test_single_precision(name):
    single = Quadratic(jnp.asarray(MATRIX, jnp.float32))
    solution = minimize(SPHERE, single, START.astype(jnp.float32), method=METHODS[name])
    leaves = solution.points, solution.times, solution.final, solution.stats["gradient_norm"]
    equal("dtypes", {leaf.dtype for leaf in leaves}, {jnp.dtype("float32")})
    smallest = np.linalg.eigvalsh(MATRIX)[0]
    close("value", RAYLEIGH(solution.final.astype(float)), smallest, 1e-5)


def test_inside_jit():
    solution = jax.jit(lambda x: minimize(SPHERE, cubic, x))(START)
    close("as outside", solution.final, minimize(SPHERE, cubic, START).final, 1e-9)


def test_progress_is_printed(capsys):
    minimize(SPHERE, cubic, START, progress=True)
    jax.effects_barrier()
    lines = capsys.readouterr().out.split()
    assert lines[0] == "0.00%" and lines[-1] == "100.00%" and len(lines) > 4, lines
    jax.vmap(lambda x: minimize(SPHERE, cubic, x, progress=True).times)(jnp.stack([START, -START]))
    jax.effects_barrier()
    equal("under vmap", capsys.readouterr().out.split()[-1], "100.00%")


def test_what_is_refused():
    with refused(ValueError, "minimize goes along a manifold", "Quadratic", wrong_type=True):
        minimize(RAYLEIGH, RAYLEIGH, START)
    with refused(ValueError, "method", "RiemannianTrustRegion()", wrong_type=True):
        minimize(SPHERE, RAYLEIGH, START, method=RiemannianTrustRegion)
    with refused(ValueError, "method", "RiemannianOptax", wrong_type=True):
        minimize(SPHERE, RAYLEIGH, START, method=optax.sgd(0.1))
    with refused(ValueError, "function", wrong_type=True):
        minimize(SPHERE, 3.0, START)
    for fn, words in (
        (lambda x: x, "shape (6,)"),
        (lambda x: {"a": x[0]}, "a dict"),
        (lambda x: jnp.argmax(x), "int"),
    ):
        with refused(ValueError, "scalar", words):
            minimize(SPHERE, fn, START)
    with refused(ValueError, "gradient_tolerance"):
        minimize(SPHERE, RAYLEIGH, START, gradient_tolerance=-1.0)
    with refused(ValueError, "max_steps"):
        minimize(SPHERE, RAYLEIGH, START, max_steps=0)
    with refused(ValueError, "observe", wrong_type=True):
        minimize(SPHERE, RAYLEIGH, START, observe=RAYLEIGH)
    for wrong in (optax.sgd, 0.1):
        with refused(ValueError, "RiemannianOptax", "optax.adam(1e-2)"):
            RiemannianOptax(wrong)
