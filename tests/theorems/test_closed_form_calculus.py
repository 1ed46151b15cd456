"""Calculus and geodesics against manifolds whose geometry has closed forms."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, distance, equal, flat, refused
from closed_forms import expected, MODELS, numbers, place, SEED, TARGET

every_model = pytest.mark.parametrize("name", MODELS)


# --- Calculus ---------------------------------------------------------------------------


def test_functions_on_the_sphere():
    """∇ = Pc, ∇² = −⟨c, x⟩P/r² and Δ = −d⟨c, x⟩/r² for x ↦ ⟨c, x⟩."""
    sphere, point, u, v = place("sphere")
    slope = np.array([0.3, -1.2, 0.7, 2.0])
    linear = jax.tree_util.Partial(jnp.vdot, jnp.asarray(slope))
    normal = np.asarray(point) / sphere.radius
    projection = np.eye(4) - np.outer(normal, normal)
    value = slope @ np.asarray(point) / sphere.radius**2
    manifold = sphere.manifold
    # ∇_u of the gradient field is the Hessian.
    field = lambda x: mf.riemannian_gradient(manifold, linear, x)
    options = {"key": jr.key(SEED), "num_samples": 300}

    @jax.jit
    def found(point, u):
        hessian = mf.covariant_hessian(manifold, linear, point)
        estimate = mf.laplace_beltrami(manifold, linear, point, **options)
        exact = mf.laplace_beltrami(manifold, linear, point)
        along = mf.covariant_derivative(manifold, field, point, u)
        return field(point), hessian.as_matrix(), exact, estimate, along, hessian.mv(u)

    gradient, hessian, exact, estimate, along, hessian_u = found(point, u)
    close("gradient", gradient, projection @ slope, 1e-12)
    close("Hessian", hessian, -value * projection, 1e-12)
    close("Laplacian", exact, -3 * value, 1e-12)
    error = abs(estimate.value + 3 * value) / estimate.standard_error
    at_most(f"Laplacian, standard errors, seed {SEED}", error, 5)
    close("derivative of the gradient", along, hessian_u, 1e-12)


@every_model
def test_coordinates_have_the_mean_curvature_as_laplacian(name):
    """Δx = tr II for the inclusion x of any submanifold, here for a linear function of it."""
    model, point, u, v = place(name)
    slope = jax.tree.map(jnp.cos, point)
    linear = jax.tree_util.Partial(lambda c, x: jnp.vdot(flat(c), flat(x)), slope)
    found = mf.laplace_beltrami(model.manifold, linear, point)
    wanted = float(numbers(slope) @ numbers(expected(model, point, u, v)["tr II"]))
    close(name, found, wanted, 1e-9, scale=max(1.0, abs(wanted)))


def test_divergence():
    """Of the part Pa of a constant field −d⟨a, x⟩/r² on the sphere; of a rotation 0; of the
    field of angles f ∂_φ/r on the torus −f sin φ/ρ + f′/r."""
    sphere, point, _, _ = place("sphere")
    constant = jnp.array([1.0, 0.4, -0.3, 0.2])
    part = lambda x: constant - x * jnp.vdot(x, constant) / jnp.vdot(x, x)
    wanted = -3 * np.vdot(point, constant) / sphere.radius**2
    skew = jnp.diag(jnp.array([1.0, 2.0, 3.0]), 1)
    turn = lambda x: (skew - skew.T) @ x
    both = jax.jit(lambda x: [mf.divergence(sphere.manifold, field, x) for field in (part, turn)])
    of_part, of_turn = both(point)
    close("P a", of_part, wanted, 1e-12)
    at_most("rotation", abs(of_turn), 1e-12)

    torus = MODELS["torus"]
    longitude, latitude = 0.4, 1.1

    def up(x):
        """∂_φ/r times sin φ."""
        rho = jnp.linalg.norm(x[:2])
        cos, sin = (rho - torus.major) / torus.minor, x[2] / torus.minor
        return sin * jnp.concatenate([-sin * x[:2] / rho, cos[None]])

    rho = torus.major + torus.minor * np.cos(latitude)
    wanted = -(np.sin(latitude) ** 2) / rho + np.cos(latitude) / torus.minor
    at = torus.at(longitude, latitude)
    options = {"key": jr.key(SEED), "num_samples": 300}
    exactly_or_not = lambda x: [mf.divergence(torus.manifold, up, x, **o) for o in ({}, options)]
    exact, found = jax.jit(exactly_or_not)(at)
    close("sin φ ∂_φ/r", exact, wanted, 1e-10)
    error = abs(found.value - wanted) / found.standard_error
    at_most(f"sin φ ∂_φ/r, standard errors, seed {SEED}", error, 5)


# --- Geodesics --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sphere", "flat torus", "SO(4)"])
def test_closed_forms_are_geodesics(name):
    """γ″ = II(γ′, γ′), here without a solver."""
    model, point, u, _ = place(name)

    @jax.jit
    def at(t):
        line = lambda t: model.exponential(point, t * u)
        with_velocity = lambda t: jax.jvp(line, (t,), (1.0,))
        (there, going), (_, turning) = jax.jvp(with_velocity, (t,), (1.0,))
        form = mf.second_fundamental_form(model.manifold, there, going, going)
        return there, turning, form, model.distance(point, there)

    there, turning, form, _ = at(0.7)
    assert bool(model.manifold.is_on(there, tol=1e-11))
    close("γ″", turning, form, 1e-10)
    *_, short = at(0.4 / np.linalg.norm(u))
    close("distance", short, 0.4, 1e-12)


@pytest.mark.parametrize("name", ["sphere", "Stiefel(4, 2)"])
def test_exponential_maps(name):
    model, point, u, _ = place(name)
    found = mf.exponential_map(model.manifold, point, u)
    close(name, found, model.exponential(point, u), 1e-7)


@pytest.mark.parametrize(
    ("name", "invariant"), [("ellipsoid", "joachimsthal"), ("torus", "clairaut")]
)
def test_invariants_of_geodesics(name, invariant):
    """After a way of length 5; the velocity there is a difference, good to 1e-7."""
    model, point, u, _ = place(name)
    step, speed = 0.01, jnp.linalg.norm(u)
    times = 5.0 + step * jnp.arange(-2.0, 3.0)
    a, b, there, c, d = mf.geodesic(model.manifold, point, u / speed, times)
    velocity = (8 * (c - b) - (d - a)) / (12 * step)
    close("speed", jnp.linalg.norm(velocity), 1.0, 1e-6)
    of = getattr(model, invariant)
    close(invariant, of(there, velocity), of(point, u / speed), 1e-6)
    at_least("way", distance(there, point), 0.3)


def test_factorisations():
    """The balanced point is the shortest, twice the nuclear norm; tangents are tangent."""
    model, point, u, _ = place("product")
    balanced = model.balanced_point()
    close("UV", balanced["left"] @ balanced["right"], TARGET, 1e-12)
    nuclear = np.sum(np.linalg.svd(TARGET, compute_uv=False))
    close("|U|² + |V|²", jnp.sum(flat(balanced) ** 2), 2 * nuclear, 1e-12)
    at_most("UᵀU − VVᵀ", jnp.max(jnp.abs(model.balance(balanced))), 1e-12)
    length = lambda p: jnp.sum(p["left"] ** 2) + jnp.sum(p["right"] ** 2)
    for at, small in ((balanced, True), (point, False)):
        gradient = flat(mf.riemannian_gradient(model.manifold, length, at))
        equal("stationary", bool(jnp.linalg.norm(gradient) < 1e-9), small)
    generator = jnp.array([[0.2, 1.0], [-0.7, 0.5]])
    assert bool(model.manifold.is_tangent(point, model.tangent(point, generator), tol=1e-10))
    vector = jax.tree.map(jnp.cos, point)
    found = model.manifold.normal_projection(point, vector)
    close("normal part", model.normal_part(point, vector), found, 1e-10)


def test_parameters_can_be_differentiated_in():
    """d/dr of K = 1/r² is −2/r³, through constraint and projection."""
    direction = jnp.array([0.6, 0.0, 0.8])
    plane = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.8, 0.0, -0.6])

    def gauss(radius):
        sphere = mf.models.Sphere(2, radius)
        return mf.sectional_curvature(sphere.manifold, radius * direction, *plane)

    close("dK/dr", jax.jit(jax.grad(gauss))(1.3), -2 / 1.3**3, 1e-9)


WRONG = {
    ("Sphere", 2, -1.0): ("radius", "positive", "-1"),
    ("Hyperboloid", 0): ("dimension", "positive integer"),
    ("FlatTorus", 1.0): ("a list of numbers",),
    ("Ellipsoid", (1.0,)): ("two axes",),
    ("Torus", 1.0, 1.0): ("minor < major",),
    ("Stiefel", 2, 3): ("3 columns", "2 rows"),
    ("SpecialOrthogonal", 1): ("size of at least 2",),
    ("FixedProduct", ((1.0, 0.0), (0.0, 1.0)), 1): ("rank=1", "rank 2"),
    ("FixedProduct", (1.0, 2.0), 1): ("matrix", "(2,)"),
}


def test_wrong_sizes_are_refused():
    for (name, *arguments), words in WRONG.items():
        with refused(ValueError, *words):
            getattr(mf.models, name)(*arguments)
