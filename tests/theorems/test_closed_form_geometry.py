"""Curvature against manifolds whose geometry has closed forms."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, close, equal, flat
from closed_forms import expected, MODELS, numbers, place, SEED, TARGET, unit_of

every_model = pytest.mark.parametrize("name", MODELS)


@eqx.filter_jit
def measured(manifold, point, u, v):
    """What the library says."""
    return {
        "K": mf.sectional_curvature(manifold, point, u, v),
        "Ric": mf.ricci_curvature(manifold, point, u),
        "scal": mf.scalar_curvature(manifold, point),
        "tr II": mf.mean_curvature(manifold, point),
    }


def agree(what, found, wanted, tol):
    """Every quantity within tol, in units of the largest of its kind or of 1."""
    for kind in wanted:
        close(f"{what}: {kind}", found[kind], wanted[kind], tol, scale=unit_of(wanted[kind]))


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

    @jax.jit
    def estimates(point, u, key):
        options = {"key": key, "num_samples": 400}
        return {
            "Ric": mf.ricci_curvature(model.manifold, point, u, **options),
            "scal": mf.scalar_curvature(model.manifold, point, **options),
            "tr II": mf.mean_curvature(model.manifold, point, **options),
        }

    for kind, estimate in estimates(point, u, jr.key(SEED)).items():
        gap = np.abs(numbers(estimate.value) - numbers(wanted[kind]))
        error = numbers(estimate.standard_error)
        at_most(f"{name}: {kind}, seed {SEED}", np.max(gap - 5 * error), 1e-9)
        largest = 0.5 * unit_of(wanted[kind])
        at_most(f"{name}: standard error of {kind}", np.max(error), largest)


def principal_curvatures(model, point):
    """Of a convex hypersurface to its inner normal, ascending."""

    @jax.jit
    def inner_and_shape(point):
        bend = mf.mean_curvature(model.manifold, point)
        inner = bend / jnp.linalg.norm(bend)
        return inner, mf.shape_operator(model.manifold, point, inner).as_matrix()

    inner, found = map(np.asarray, inner_and_shape(point))
    # The normal is an eigenvector with eigenvalue 0; lift it out of the way.
    return np.linalg.eigvalsh(found + 1e3 * np.outer(inner, inner))[:-1]


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
    found = jax.jit(lambda *at: by_hand(model.manifold, *at, **mutation))(point, u, v)
    if fails is None:
        return agree("by hand", found, wanted, 1e-9)
    with pytest.raises(AssertionError, match=fails):
        agree("by hand", found, wanted, 1e-9)
