"""Manifolds whose geometry has closed forms: points of them, tangents, and what is known there."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import manifoldflow as mf
from checks import flat

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


def place(name, dtype=jnp.float64, seed=SEED):
    """A model, a random point of it in this precision, and two tangents there."""
    model = MODELS[name]
    one, two, three = jr.split(jr.key(seed), 3)
    point = jax.tree.map(lambda x: x.astype(dtype), model.point(one))
    tangents = (model.manifold.random_tangent(point, key) for key in (two, three))
    return model, point, *tangents


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
    units = np.eye(rank**2).reshape(-1, rank, rank)
    tangents = jax.jit(jax.vmap(lambda unit: flat(model.tangent(point, unit)), out_axes=1))
    columns = np.asarray(tangents(units))
    triangle = np.linalg.cholesky(columns.T @ columns)
    basis = np.einsum("ij,jab->iab", np.linalg.inv(triangle), units)
    vector = jax.jit(lambda x, y: flat(model.second_fundamental_form(point, x, y)))
    form = lambda x, y: np.asarray(vector(x, y))
    square = lambda x: float(np.sum(np.square(x)))
    gauss = lambda x, y: form(x, x) @ form(y, y) - square(form(x, y))
    u, v = numbers(u), numbers(v)
    x, y = (np.linalg.lstsq(columns, w, rcond=None)[0].reshape(rank, rank) for w in (u, v))
    return {
        "K": gauss(x, y) / (square(u) * square(v) - (u @ v) ** 2),
        "Ric": sum(gauss(x, e) for e in basis),
        "scal": sum(gauss(d, e) for d in basis for e in basis),
        "tr II": sum(form(e, e) for e in basis),
    }


def numbers(tensor):
    """All of them as one vector of NumPy's."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tensor)])


def unit_of(tensor):
    return max(1.0, float(np.max(np.abs(numbers(tensor)))))
