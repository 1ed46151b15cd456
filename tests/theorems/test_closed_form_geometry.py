"""Curvature, calculus and geodesics against manifolds whose geometry has closed forms."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_least, at_most, close, distance, equal, flat, refused

SEED = 11
TARGET = np.array([[2.0, 0.5, -1.0], [0.3, 1.5, 0.7], [2.3, 2.0, -0.3]])  # of rank 2

MODELS: dict[str, Any] = {
    "sphere": mf.models.Sphere(3, 1.7),
    "ellipsoid": mf.models.Ellipsoid([1.0, 2.0, 0.7, 1.4]),
    "torus": mf.models.Torus(2.0, 0.8),
    "flat torus": mf.models.FlatTorus([0.5, 1.0, 2.0]),
    "hyperboloid": mf.models.Hyperboloid(3),
    "Stiefel(4, 2)": mf.models.Stiefel(4, 2),
    "SO(4)": mf.models.SpecialOrthogonal(4),
    "product": mf.models.FixedProduct(TARGET, 2),
}
every_model = pytest.mark.parametrize("name", MODELS)


def place(name, dtype=jnp.float64, seed=SEED):
    """A model, a random point of it in this precision, and two tangents there."""
    model = MODELS[name]
    one, two, three = jr.split(jr.key(seed), 3)
    point = jax.tree.map(lambda x: x.astype(dtype), model.point(one))
    tangents = (model.manifold.random_tangent(point, key) for key in (two, three))
    return model, point, *tangents


@eqx.filter_jit
def measured(manifold, point, u, v):
    """What the library says."""
    return {
        "K": mf.sectional_curvature(manifold, point, u, v),
        "Ric": mf.ricci_curvature(manifold, point, u),
        "scal": mf.scalar_curvature(manifold, point),
        "tr II": mf.mean_curvature(manifold, point),
    }


def expected(model, point, u, v):
    """What the model says, in float64."""
    point, u, v = jax.tree.map(lambda x: x.astype(jnp.float64), (point, u, v))
    if isinstance(model, mf.models.FixedProduct):
        return from_forms(model, point, u, v)
    tensors = {"tr II": model.mean_curvature(point)}
    if isinstance(model, mf.models.Torus):
        gauss = model.gauss_curvature(point)
        return tensors | {"K": gauss, "Ric": gauss * jnp.sum(u**2), "scal": 2 * gauss}
    if isinstance(model, mf.models.FlatTorus):
        return tensors | {"K": 0.0, "Ric": 0.0, "scal": 0.0}
    return tensors | {
        "K": model.sectional_curvature(point, u, v),
        "Ric": model.ricci_curvature(point, u),
        "scal": model.scalar_curvature(point),
    }


def from_forms(model, point, u, v):
    """The equation of Gauss in generators of GL(r), with a basis that is orthonormal."""
    rank = model.rank
    units = jnp.eye(rank**2).reshape(-1, rank, rank)
    columns = jnp.stack([flat(model.tangent(point, unit)) for unit in units], axis=1)
    triangle = np.linalg.cholesky(columns.T @ columns)
    basis = jnp.einsum("ij,jab->iab", np.linalg.inv(triangle), units)
    form = lambda x, y: np.asarray(flat(model.second_fundamental_form(point, x, y)))
    square = lambda x: float(np.sum(np.square(x)))
    gauss = lambda x, y: form(x, x) @ form(y, y) - square(form(x, y))
    x, y = (jnp.linalg.lstsq(columns, flat(w))[0].reshape(rank, rank) for w in (u, v))
    u, v = np.asarray(flat(u)), np.asarray(flat(v))
    return {
        "K": gauss(x, y) / (square(u) * square(v) - (u @ v) ** 2),
        "Ric": sum(gauss(x, e) for e in basis),
        "scal": sum(gauss(d, e) for d in basis for e in basis),
        "tr II": sum(form(e, e) for e in basis),
    }


def agree(what, found, wanted, tol):
    """Every quantity within tol, in units of the largest of its kind or of 1."""
    for kind in wanted:
        unit = max(1.0, float(jnp.max(jnp.abs(flat(wanted[kind])))))
        close(f"{what}: {kind}", found[kind], wanted[kind], tol, scale=unit)


# --- Curvature --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float64) for name in MODELS]
    + [(name, jnp.float32) for name in ("ellipsoid", "Stiefel(4, 2)")],
)
def test_curvatures_are_the_closed_forms(name, dtype):
    """To 100 roundings of either precision, 2e-14 and 1e-5, at three points."""
    for seed in range(SEED, SEED + 3):
        model, point, u, v = place(name, dtype, seed)
        found = measured(model.manifold, point, u, v)
        tol = 100 * float(jnp.finfo(dtype).eps)
        agree(f"{name}, seed {seed}", found, expected(model, point, u, v), tol)


@every_model
def test_points_are_on_the_manifolds(name):
    model, point, _, _ = place(name)
    assert bool(model.manifold.is_on(point, tol=1e-12))
    equal("dimension", model.manifold.dimension(point), model.dimension)
    equal("rank", int(model.manifold.rank(point)), flat(point).size - model.dimension)


class Changed(eqx.Module):
    """A(x)·f with its values in another order, and as many of them again as is asked for."""

    fn: Any
    amplitude: Any
    factor: Any
    order: Any
    num_repeated: int = eqx.field(static=True)

    def __call__(self, point):
        value = flat(self.fn(point))[self.order]
        size, x = value.size, flat(point)
        where = jnp.sum(jnp.sin(jnp.arange(1.0, x.size + 1) * x))
        turn = jnp.sin(jnp.arange(size**2).reshape(size, size) + where)
        value = self.factor * (value + self.amplitude * turn @ value / size)
        return {"once": value, "again": 2 * value[: self.num_repeated]}


def changes(size):
    """Name → amplitude, factor, order, number of repetitions, tolerance."""
    order = jnp.arange(size)
    return {
        "field of matrices": (0.5, 1.0, order, 0, 1e-9),
        "other order": (0.0, 1.0, order[::-1], 0, 1e-9),
        "times 1e6": (0.0, 1e6, order, 0, 1e-9),
        "times 1e-6": (0.0, 1e-6, order, 0, 1e-9),
        # By rank: a cutoff and not an inverse decides what is normal.
        "repeated": (0.5, 1.0, order, 1, 1e-6),
    }


@pytest.mark.parametrize("name", ["ellipsoid", "flat torus", "Stiefel(4, 2)", "product"])
def test_curvatures_do_not_know_the_constraint(name):
    model, point, u, v = place(name)
    wanted = expected(model, point, u, v)
    fn = model.manifold.fn
    for how, (amplitude, factor, order, again, tol) in changes(fn(point).size).items():
        fresh = Changed(fn, jnp.asarray(amplitude), jnp.asarray(factor), order, again)
        agree(f"{name}, {how}", measured(mf.LevelSet(fresh), point, u, v), wanted, tol)


def full_product(point):
    return point["left"] @ point["right"] - TARGET


def test_deficient_constraints_are_handled_by_rank():
    """UV − T is of rank 8 with its 9 equations."""
    model, point, u, v = place("product")
    naive = mf.LevelSet(full_product)
    equal("rank", int(naive.rank(point)), 8)
    agree("UV − T", measured(naive, point, u, v), expected(model, point, u, v), 1e-6)


@pytest.mark.parametrize("name", ["ellipsoid", "Stiefel(4, 2)", "product"])
def test_estimates(name):
    """Within 5 standard errors, and not by having large ones."""
    model, point, u, v = place(name)
    wanted = expected(model, point, u, v)
    key = jr.key(SEED)
    options = {"key": key, "num_samples": 400}
    found = {
        "Ric": mf.ricci_curvature(model.manifold, point, u, **options),
        "scal": mf.scalar_curvature(model.manifold, point, **options),
        "tr II": mf.mean_curvature(model.manifold, point, **options),
    }
    for kind, estimate in found.items():
        gap = jnp.abs(flat(estimate.value) - flat(wanted[kind]))
        error = flat(estimate.standard_error)
        at_most(f"{name}: {kind}, seed {SEED}", jnp.max(gap - 5 * error), 1e-9)
        unit = max(1.0, float(jnp.max(jnp.abs(flat(wanted[kind])))))
        at_most(f"{name}: standard error of {kind}", jnp.max(error), 0.5 * unit)


def principal_curvatures(model, point):
    """Of a convex hypersurface to its inner normal, ascending."""
    bend = mf.mean_curvature(model.manifold, point)
    inner = bend / jnp.linalg.norm(bend)
    found = mf.shape_operator(model.manifold, point, inner).as_matrix()
    # The normal is an eigenvector with eigenvalue 0; lift it out of the way.
    return np.linalg.eigvalsh(found + 1e3 * jnp.outer(inner, inner))[:-1]


def test_principal_curvatures():
    model, point, _, _ = place("ellipsoid")
    product = np.prod(principal_curvatures(model, point))
    close("Gauss-Kronecker", product, model.gauss_kronecker(point), 1e-9)

    model, point, u, _ = place("hyperboloid")
    wanted = model.principal_curvatures(point)
    close("hyperboloid", principal_curvatures(model, point), jnp.sort(wanted), 1e-9)
    pairs = jnp.sum(wanted) ** 2 - jnp.sum(wanted**2)
    close("Σ κᵢκⱼ", model.scalar_curvature(point), pairs, 1e-12)


# --- The assertions can fail ------------------------------------------------------------


def by_hand(manifold, point, u, v, *, sign=-1.0, per=1.0):
    """K and tr II out of the second fundamental form; right for sign = −1 and per = 1."""
    form = lambda a, b: mf.second_fundamental_form(manifold, point, a, b)
    inner = lambda a, b: jnp.vdot(a, b)
    top = inner(form(u, u), form(v, v)) + sign * inner(form(u, v), form(u, v))
    area = inner(u, u) * inner(v, v) - inner(u, v) ** 2
    return {"K": top / area, "tr II": mf.mean_curvature(manifold, point) / per}


@pytest.mark.parametrize(
    ("mutation", "fails"),
    [({}, None), ({"sign": 1.0}, ": K"), ({"per": 3.0}, ": tr II")],
    ids=["as it is", "sign of |II(u, v)|²", "mean over the dimension"],
)
def test_mutants_are_caught(mutation, fails):
    model, point, u, v = place("ellipsoid")
    wanted = expected(model, point, u, v)
    wanted = {kind: wanted[kind] for kind in ("K", "tr II")}
    found = by_hand(model.manifold, point, u, v, **mutation)
    if fails is None:
        return agree("by hand", found, wanted, 1e-9)
    with pytest.raises(AssertionError, match=fails):
        agree("by hand", found, wanted, 1e-9)


# --- Calculus ---------------------------------------------------------------------------


def test_functions_on_the_sphere():
    """∇ = Pc, ∇² = −⟨c, x⟩P/r² and Δ = −d⟨c, x⟩/r² for x ↦ ⟨c, x⟩."""
    sphere, point, u, v = place("sphere")
    slope = jnp.array([0.3, -1.2, 0.7, 2.0])
    linear = jax.tree_util.Partial(jnp.vdot, slope)
    normal = point / sphere.radius
    projection = jnp.eye(4) - jnp.outer(normal, normal)
    value = linear(point) / sphere.radius**2
    manifold = sphere.manifold
    gradient = mf.riemannian_gradient(manifold, linear, point)
    close("gradient", gradient, projection @ slope, 1e-12)
    hessian = mf.covariant_hessian(manifold, linear, point)
    close("Hessian", hessian.as_matrix(), -value * projection, 1e-12)
    close("Laplacian", mf.laplace_beltrami(manifold, linear, point), -3 * value, 1e-12)
    found = mf.laplace_beltrami(manifold, linear, point, key=jr.key(SEED), num_samples=300)
    error = jnp.abs(found.value + 3 * value) / found.standard_error
    at_most(f"Laplacian, standard errors, seed {SEED}", error, 5)
    # ∇_u of the gradient field is the Hessian.
    field = lambda x: mf.riemannian_gradient(manifold, linear, x)
    along = mf.covariant_derivative(manifold, field, point, u)
    close("derivative of the gradient", along, hessian.mv(u), 1e-12)


@every_model
def test_coordinates_have_the_mean_curvature_as_laplacian(name):
    """Δx = tr II for the inclusion x of any submanifold, here for a linear function of it."""
    model, point, u, v = place(name)
    slope = jax.tree.map(jnp.cos, point)
    linear = jax.tree_util.Partial(lambda c, x: jnp.vdot(flat(c), flat(x)), slope)
    found = mf.laplace_beltrami(model.manifold, linear, point)
    wanted = jnp.vdot(flat(slope), flat(expected(model, point, u, v)["tr II"]))
    close(name, found, wanted, 1e-9, scale=max(1.0, float(jnp.abs(wanted))))


def test_divergence():
    """Of the part Pa of a constant field −d⟨a, x⟩/r² on the sphere; of a rotation 0; of the
    field of angles f ∂_φ/r on the torus −f sin φ/ρ + f′/r."""
    sphere, point, _, _ = place("sphere")
    constant = jnp.array([1.0, 0.4, -0.3, 0.2])
    part = lambda x: constant - x * jnp.vdot(x, constant) / jnp.vdot(x, x)
    wanted = -3 * jnp.vdot(point, constant) / sphere.radius**2
    close("P a", mf.divergence(sphere.manifold, part, point), wanted, 1e-12)
    skew = jnp.diag(jnp.array([1.0, 2.0, 3.0]), 1)
    turn = lambda x: (skew - skew.T) @ x
    at_most("rotation", jnp.abs(mf.divergence(sphere.manifold, turn, point)), 1e-12)

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
    close("sin φ ∂_φ/r", mf.divergence(torus.manifold, up, at), wanted, 1e-10)
    found = mf.divergence(torus.manifold, up, at, key=jr.key(SEED), num_samples=300)
    error = jnp.abs(found.value - wanted) / found.standard_error
    at_most(f"sin φ ∂_φ/r, standard errors, seed {SEED}", error, 5)


# --- Geodesics --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sphere", "flat torus", "SO(4)"])
def test_closed_forms_are_geodesics(name):
    """γ″ = II(γ′, γ′), here without a solver."""
    model, point, u, _ = place(name)
    line = lambda t: model.exponential(point, t * u)
    velocity = lambda t: jax.jvp(line, (t,), (1.0,))[1]
    there, going, turning = line(0.7), velocity(0.7), jax.jvp(velocity, (0.7,), (1.0,))[1]
    assert bool(model.manifold.is_on(there, tol=1e-11))
    form = mf.second_fundamental_form(model.manifold, there, going, going)
    close("γ″", turning, form, 1e-10)
    short = model.exponential(point, 0.4 * u / jnp.linalg.norm(u))
    close("distance", model.distance(point, short), 0.4, 1e-12)


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
