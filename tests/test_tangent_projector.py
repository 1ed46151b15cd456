"""The projector from products: tangent to all outputs, and the part of the vector that is."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, refused
from manifoldflow import _tree, linalg


def loss_of(kind, dtype=jnp.float64):
    inputs = jr.normal(jr.key(1), (12, 3), dtype)
    if kind == "outputs":
        cross_entropy = lambda f, y: jax.nn.logsumexp(f) - f[y]
        return mf.PerExampleLoss(inputs, jnp.arange(12) % 2, cross_entropy, predict=predict)
    return mf.LeastSquares(inputs, jnp.ones((12, 2), dtype), predict=predict)


def predict(weights, x):
    return weights["out"] @ jnp.tanh(weights["in"] @ x)


def weights_of(dtype=jnp.float64):
    return {"in": jr.normal(jr.key(2), (9, 3), dtype), "out": jr.normal(jr.key(3), (2, 9), dtype)}


def vector_of(dtype=jnp.float64):
    return _tree.random_normal_like(jr.key(4), weights_of(dtype))


def expected_tangent(loss, weights, vector):
    """By a QR factorisation of all rows, in double precision."""
    wide = _tree.cast_floats(weights, jnp.float64)
    rows = np.asarray(
        jax.jacobian(lambda w: jax.vmap(lambda x: predict(w, x))(loss.inputs))(wide)["in"]
    ).reshape(24, -1)
    other = jax.jacobian(lambda w: jax.vmap(lambda x: predict(w, x))(loss.inputs))(wide)["out"]
    rows = np.concatenate([rows, np.asarray(other).reshape(24, -1)], axis=1)
    normal = np.linalg.qr(rows.T.astype(float))[0]
    flat = np.asarray(_tree.ravel(vector)[0], float)
    return flat - normal @ (normal.T @ flat), rows


GRAMS = {
    "factorised": None,
    "sketched": linalg.IterativeGram(preconditioner_rank=12),
    "plain": linalg.IterativeGram(),
}


@pytest.mark.parametrize(
    ("gram", "kind", "dtype"),
    [
        ("factorised", "outputs", jnp.float64),
        ("factorised", "residuals", jnp.float32),
        ("sketched", "residuals", jnp.float64),
        ("plain", "outputs", jnp.float32),
    ],
)
def test_what_is_left_is_tangent(gram, kind, dtype):
    loss, weights, vector = loss_of(kind, dtype), weights_of(dtype), vector_of(dtype)
    projector = linalg.tangent_projector(loss, weights, batch_size=5, gram=GRAMS[gram])
    tangent, certificate = projector.project(vector)
    eps = float(jnp.finfo(dtype).eps)
    at_most("certificate", certificate, 20 * eps)
    expected, rows = expected_tangent(loss, weights, vector)
    found = np.asarray(_tree.ravel(tangent)[0], float)
    condition = np.linalg.cond(rows)
    gap = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    at_most("relative difference from QR", gap, 20 * condition * eps)
    cosines = rows @ found / np.linalg.norm(rows, axis=1) / np.linalg.norm(found)
    at_most("certificate, of its own", np.linalg.norm(cosines), 20 * eps)


def test_the_certificate_is_the_length_of_all_cosines():
    loss, weights, vector = loss_of("outputs"), weights_of(), vector_of()
    projector = linalg.tangent_projector(loss, weights)
    _, rows = expected_tangent(loss, weights, vector)
    flat = np.asarray(_tree.ravel(vector)[0])
    cosines = rows @ flat / np.linalg.norm(rows, axis=1) / np.linalg.norm(flat)
    expected = np.linalg.norm(cosines)
    for scale in (1.0, 1e-200, 1e200):
        found = projector.certificate(_tree.scale(scale, vector))
        at_most(f"in units of {scale}", abs(found / expected - 1), 1e-12)
    zero, certificate = projector.project(_tree.zeros_like(vector))
    assert certificate == 0 and not any(jnp.any(leaf) for leaf in jax.tree.leaves(zero))


def test_a_step_along_it_leaves_the_outputs_alone():
    """To first order: half the step changes them by a quarter, and a gradient's by half."""
    loss, weights, vector = loss_of("outputs"), weights_of(), vector_of()
    tangent, _ = linalg.tangent_projector(loss, weights, batch_size=4).project(vector)
    changes = {}
    for name, direction in ("tangent", tangent), ("vector", vector):
        step = lambda size: _tree.add(weights, _tree.scale(size, direction))
        change = lambda size: jnp.linalg.norm(loss.outputs(step(size)) - loss.outputs(weights))
        changes[name] = float(change(1e-4) / change(5e-5))
    at_most("tangent: |ratio − 4|", abs(changes["tangent"] - 4), 0.01)
    at_most("vector: |ratio − 2|", abs(changes["vector"] - 2), 0.01)


def test_derivatives_and_batches():
    """P is linear and its own transpose."""
    loss, weights, vector = loss_of("outputs"), weights_of(), vector_of()
    projector = linalg.tangent_projector(loss, weights, batch_size=4)
    energy = lambda v: _tree.inner(projector.project(v)[0], vector)
    value, gradient = jax.jit(jax.value_and_grad(energy))(vector)
    tangent, _ = projector.project(vector)
    gap = _tree.norm(_tree.subtract(gradient, tangent)) / _tree.norm(tangent)
    at_most("gradient of ⟨Pv, u⟩ is Pu", gap, 1e-12)
    at_most("⟨Pv, v⟩ = |Pv|²", abs(value / _tree.norm(tangent) ** 2 - 1), 1e-12)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, -3 * leaf]), vector)
    found, certificates = jax.vmap(projector.project)(both)
    at_most("certificates", jnp.max(certificates), 1e-14)
    other = jax.tree.map(lambda leaf: leaf[1], found)
    gap = _tree.norm(_tree.add(other, _tree.scale(3, tangent))) / _tree.norm(tangent)
    at_most("of a batch", gap, 1e-12)


def test_failures_say_so():
    loss, vector = loss_of("outputs"), vector_of()
    broken = {**weights_of(), "out": jnp.full((2, 9), jnp.nan)}
    tangent, certificate = linalg.tangent_projector(loss, broken).project(vector)
    assert jnp.isnan(certificate)
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tangent))
    short = linalg.tangent_projector(loss, weights_of(), gram=linalg.IterativeGram(), max_steps=1)
    assert short.project(vector)[1] > 1e-3, "one step without a preconditioner was enough"


def test_no_more_memory_than_batches_need():
    """The rows of all examples would be 40 MB."""
    inputs = jr.normal(jr.key(1), (256, 100))
    loss = mf.LeastSquares(inputs, jnp.ones(256), predict=lambda w, x: jnp.sum(jnp.tanh(w @ x)))
    weights = jr.normal(jr.key(2), (200, 100))

    def temporary(batch_size):
        fn = lambda w, v: linalg.tangent_projector(loss, w, batch_size=batch_size).project(v)
        program = jax.jit(fn).lower(weights, weights).compile()
        return program.memory_analysis().temp_size_in_bytes / 2**20

    at_most("MB in batches of 16", temporary(16), 6)


def test_bad_input():
    loss, weights = loss_of("outputs"), weights_of()
    with refused(ValueError, "tangent_projector: loss", "outputs or residuals", "LeastSquares"):
        linalg.tangent_projector(lambda w: 0.0, weights)
    with refused(ValueError, "batch_size", "positive"):
        linalg.tangent_projector(loss, weights, batch_size=0)
    with refused(ValueError, "tolerance"):
        linalg.tangent_projector(loss, weights, tolerance=-1.0)
    with refused(ValueError, "max_steps"):
        linalg.tangent_projector(loss, weights, max_steps=0)
    with refused(ValueError, "vector", "structure and shapes"):
        linalg.tangent_projector(loss, weights).project(jnp.ones(3))
