"""Functions that compute with NumPy say so within jit, vmap and grad, in one sentence."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import manifoldflow as mf
from checks import close, refused
from manifoldflow import diagnostics, symmetry, theory

FUNCTIONS = {
    f"{room.__name__.rpartition('.')[2]}.{name}": fn
    for room in (theory, diagnostics, symmetry)
    for name, fn in vars(room).items()
    if inspect.isfunction(fn)
}
# What runs within jit: by JAX alone, or from shapes.
TRACEABLE = {
    "diagnostics.explain",
    "diagnostics.kernel_change",
    "diagnostics.largest_stable_learning_rate",
    "diagnostics.plan",
    "diagnostics.stationary_covariance",
    "symmetry.act_together",
    "symmetry.attention_products",
    "symmetry.balance",
    "symmetry.balance_with_info",
    "symmetry.charge_drift",
    "symmetry.discrete_noether_drift",
    "symmetry.double_rotation",
    "symmetry.examples_of",
    "symmetry.low_rank",
    "symmetry.mlp_rescaling",
    "symmetry.noether_charge",
    "symmetry.noether_drift",
    "symmetry.noise_equilibrium",
    "symmetry.noise_equilibrium_with_info",
    "symmetry.orbit_velocity",
    "symmetry.product_drift",
    "symmetry.product_symmetry",
    "symmetry.query_key_rotation",
    "symmetry.rescaling",
    "symmetry.scaling",
    "symmetry.symmetries_of",
}


def called_with(fn, value):
    """With this value for every argument that must be given."""
    needed = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    places = [value for p in needed if p.kind is not p.KEYWORD_ONLY]
    return fn(*places, **{p.name: value for p in needed if p.kind is p.KEYWORD_ONLY})


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - TRACEABLE))
def test_traced_values_are_refused(name):
    with refused(ValueError, f"{name.rpartition('.')[2]} needs concrete numbers", "outside"):
        jax.jit(lambda x: called_with(FUNCTIONS[name], x))(jnp.ones(2))
    with refused(ValueError, "needs concrete numbers", "outside"):
        jax.grad(lambda x: called_with(FUNCTIONS[name], x))(1.0)


def test_there_is_no_name_too_many():
    assert TRACEABLE <= set(FUNCTIONS)


def test_constants_within_jit_are_refused_where_they_are_computed_with():
    """They are not traced themselves, but what JAX makes of them is."""
    with refused(ValueError, "activation_constants needs concrete numbers"):
        jax.jit(lambda x: x + theory.activation_constants(jnp.sinh, -1.0, 1.0).slope)(1.0)


def test_constants_within_jit_are_checked_without_jax():
    """The kind of `bool(jnp.all(labels == 1))`, which ends in a tracer's error."""
    labels, inputs, eye = jnp.array([1.0, -1.0]), jnp.eye(2), jnp.eye(2)
    phi = lambda z: jnp.exp(-z)

    def of_probability(p):
        loss = mf.losses.flipped_labels_loss(inputs, labels, phi, probability=p, predict=jnp.dot)
        return loss(jnp.array([0.3, 0.2]))

    close("flipped labels", jax.jit(of_probability)(0.1), of_probability(0.1), 1e-12)
    point = {"U": jnp.ones((2, 2)), "W": jnp.ones((2, 2))}

    def charge(scale):
        pick = lambda name: lambda p: p[name]
        rotation = symmetry.double_rotation(point, pick("U"), pick("W"), eye)
        return symmetry.noether_charge(rotation, jax.tree.map(lambda x: scale * x, point))

    close("a constant generator", jax.jit(charge)(2.0), charge(2.0), 1e-12)
    model = jax.jit(lambda t: t * mf.models.FixedProduct(eye, 2).target)(1.0)
    close("a constant target", model, eye, 0)
    levels = jnp.array([0.1, 0.2, 0.4])
    order = jax.jit(lambda t: t * mf.ensembles.weak_order(levels, levels, levels / 9).value)
    close("constant errors", order(1.0), 1.0, 1e-6)
    stream = jax.jit(lambda t: t * mf.models.LinearStream(eye, eye, eye).noise_covariance)
    close("a constant covariance", stream(1.0), eye, 1e-12)
