"""Losses of linearised models, and how much the kernel of a model changes between two points."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import manifoldflow as mf
from checks import at_most, central_difference, close, equal, flat, in_window, norm, refused, slope
from manifoldflow import diagnostics, linalg

INPUTS = jr.normal(jr.key(1), (12, 4))
TARGETS = jr.normal(jr.key(2), (12, 2))
MLP = eqx.nn.MLP(4, 2, 6, 1, activation=jnp.tanh, key=jr.key(0))
LOSS = mf.LeastSquares(INPUTS, TARGETS)


def moved(point, size):
    """The point, moved by a fixed vector with entries of this size."""
    random = np.random.default_rng(3)
    step = lambda x: x + size * random.normal(size=x.shape) if eqx.is_inexact_array(x) else x
    return jax.tree.map(step, point)


@eqx.filter_jit
def dense_kernel(loss, point):
    coordinates, remainder = loss.split(point)
    outputs = lambda x: jnp.ravel(loss.outputs(eqx.combine(x, remainder)))
    leaves = jax.tree.leaves(jax.jacrev(outputs)(coordinates))
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
    return rows @ rows.T


@pytest.fixture(scope="module")
def lazy():
    return mf.linearized(LOSS, MLP)


def test_it_is_the_model_to_first_order(lazy):
    equal("kind", type(lazy), mf.LeastSquares)
    close("residuals at the point", lazy.residual(MLP), LOSS.residual(MLP), 1e-15)
    close("gradient at the point", flat(lazy.gradient(MLP)), flat(LOSS.gradient(MLP)), 1e-14)
    steps = [0.04, 0.02, 0.01]
    errors = [norm(lazy.residual(moved(MLP, s)) - LOSS.residual(moved(MLP, s))) for s in steps]
    in_window("order of the rest", slope(steps, errors), 1.9, 2.1)


def test_it_is_linear_with_the_kernel_of_the_point(lazy):
    here = lambda s: lazy.residual(moved(MLP, s))
    close("f(2) − f(1) = f(1) − f(0)", here(2.0) - here(1.0), here(1.0) - here(0.0), 1e-12)
    kernel = lazy.jacobian(moved(MLP, 1.0)).gram()
    close("K anywhere", kernel, dense_kernel(LOSS, MLP), 1e-12)
    found = diagnostics.kernel_change(lazy, MLP, moved(MLP, 1.0))
    equal("change of K", float(found.relative_change), 0.0)


def test_no_leaf_of_a_network_has_explicit_rows():
    wide = eqx.nn.MLP(4, 2, 300, 2, activation=jnp.tanh, key=jr.key(0))
    rows = {str(row): row.treatment for row in mf.explain(mf.linearized(LOSS, wide), wide)}
    assert rows and all("dense" not in treatment for treatment in rows.values()), rows
    theirs = [row.treatment for row in mf.explain(LOSS, wide)]
    equal("as of the model itself", list(rows.values()), theirs)


def test_structured_rows_are_the_explicit_ones(lazy):
    """Of a model that is used under its own name: it must not be taken for a shift, nor for w."""
    coordinates, remainder = LOSS.split(moved(MLP, 0.5))
    residual = lambda x, example: lazy.example_residual(eqx.combine(x, remainder), example)
    structured = linalg.structured_jacobian(residual, coordinates, LOSS.data)
    dense = linalg.dense_jacobian(residual, coordinates, LOSS.data)
    close("rows", structured.as_matrix(), dense.as_matrix(), 1e-13)
    shifted = {"w": jnp.arange(3.0)}
    fn = lambda p, x: p["w"] @ linalg.displacement(p["w"], x)
    close(
        "a leaf and its displacement in one product",
        linalg.structured_jacobian(fn, shifted, jnp.ones((2, 3))).as_matrix(),
        linalg.dense_jacobian(fn, shifted, jnp.ones((2, 3))).as_matrix(),
        1e-15,
    )
    close("a displacement", linalg.displacement(shifted, {"w": jnp.ones(3)})["w"], [-1, 0, 1], 0)


def test_all_that_takes_a_loss_takes_it():
    """Gradient flow ends at the nearest fit, which a projection finds too."""
    lazy = mf.linearized(mf.LeastSquares(INPUTS[:4], TARGETS[:4]), MLP)
    manifold = mf.ZeroLossManifold(lazy)
    nearest = manifold.project(MLP)
    at_most("loss at the projection", lazy(nearest), 1e-24)
    landed = mf.limit_map(lazy, MLP, rtol=1e-10)
    close("limit map", flat(mf.split(landed)[0]), flat(mf.split(nearest)[0]), 1e-8)
    batch = lazy.select(jnp.array([1, 3]))
    some = lazy.outputs(landed)[jnp.array([1, 3])]
    close("some of the examples", batch.outputs(landed), some, 1e-14)


def test_derivatives_in_the_point_of_linearisation():
    """∂f_lin/∂θ₀ = ∂²f(θ₀)[·, θ − θ₀]: it is an argument like any other."""
    start, end, v = jnp.array([1.0, 0.5, 2.0]), jnp.array([0.3, 1.0, 1.0]), jnp.arange(3.0)
    loss = mf.LeastSquares(jnp.eye(3), jnp.ones(3), predict=lambda w, x: jnp.sum(jnp.sin(x * w)))
    value = lambda t: mf.linearized(loss, start + t * v).outputs(end)
    _, tangent = jax.jit(lambda: jax.jvp(value, (0.0,), (1.0,)))()
    close("∂f_lin/∂θ₀", tangent, central_difference(value, 1e-3), 1e-9)
    close("by hand", tangent, -jnp.sin(start) * (end - start) * v, 1e-14)
    many = jax.vmap(lambda s: mf.linearized(loss, s * start)(end))(jnp.array([1.0, 2.0]))
    close("vmap", many[1], mf.linearized(loss, 2 * start)(end), 1e-14)


def test_other_losses_frozen_leaves_and_dtypes():
    point = {"w": jnp.ones((3, 4), jnp.float32), "frozen": jnp.float32(2)}
    predict = lambda p, x: p["frozen"] * jnp.tanh(p["w"] @ x)
    classes = jnp.arange(12) % 3
    loss = mf.PerExampleLoss(
        INPUTS, classes, lambda f, y: jax.nn.logsumexp(f) - f[y], predict=predict,
        trainable={"w": True, "frozen": False},
    )  # fmt: skip
    lazy = mf.linearized(loss, point)
    equal("kind", type(lazy), mf.PerExampleLoss)
    equal("structure of the gradient", lazy.gradient(point)["frozen"], None)
    equal("dtype", lazy(point).dtype, jnp.float32)
    close("value", lazy(point), loss(point), 1e-6)
    other = {"w": 1.1 * point["w"], "frozen": jnp.float32(100)}
    close("frozen leaves are those of the point", lazy(other), lazy({**point, "w": other["w"]}), 0)


def test_what_it_refuses(lazy):
    with refused(ValueError, "linearized", "LeastSquares or a PerExampleLoss", wrong_type=True):
        mf.linearized(mf.FunctionLoss(jnp.sum), jnp.ones(3))
    with refused(ValueError, "A linearized loss got a point", "the same model"):
        lazy(eqx.nn.MLP(4, 2, 5, 2, key=jr.key(0)))
    rounded = mf.LeastSquares(INPUTS, TARGETS[:, 0], predict=lambda w, x: x @ jnp.round(w))
    with refused(ValueError, "no derivative"):
        mf.linearized(rounded, jnp.ones(4))


# --- How much the kernel changes -----------------------------------------------------------


def test_change_of_the_kernel_by_hand():
    other = moved(MLP, 0.3)
    kernel, new = dense_kernel(LOSS, MLP), dense_kernel(LOSS, other)
    found = eqx.filter_jit(diagnostics.kernel_change)(LOSS, MLP, other)
    size = np.linalg.norm(kernel)
    close("relative change", found.relative_change, np.linalg.norm(new - kernel) / size, 1e-12)
    close("alignment", found.alignment, np.sum(new * kernel) / size / np.linalg.norm(new), 1e-12)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_units_of_the_kernel_change_nothing(scale):
    """In float32, where squares of entries of K would vanish or overflow."""
    loss = mf.LeastSquares(
        jnp.eye(3, dtype=jnp.float32), jnp.ones(3), predict=lambda w, x: scale * jnp.sum(x * w**2)
    )
    start, end = jnp.array([1.0, 2, 3], jnp.float32), jnp.array([2.0, 2, 3], jnp.float32)
    found = diagnostics.kernel_change(loss, start, end)
    # K = 4 diag(w²) in units of its own.
    close("change", found.relative_change, 3 / np.sqrt(1 + 16 + 81), 1e-6)
    close("alignment", found.alignment, 101 / np.sqrt(98 * 113), 1e-6)


def test_kernels_that_vanish():
    loss = mf.LeastSquares(jnp.eye(3), jnp.ones(3), predict=lambda w, x: jnp.sum(x * w**2))
    zero, one = jnp.zeros(3), jnp.ones(3)
    changes = [
        diagnostics.kernel_change(loss, a, b) for a, b in ((zero, one), (zero, zero), (one, zero))
    ]
    equal("0 → K, 0 → 0, K → 0", [float(c.relative_change) for c in changes], [np.inf, 0.0, 1.0])
    equal("alignments", [float(c.alignment) for c in changes], [0.0, 0.0, 0.0])
    assert isinstance(changes[0], diagnostics.KernelChange)


def test_kernels_of_other_losses():
    classes = jnp.arange(12) % 2
    loss = mf.PerExampleLoss(INPUTS, classes, lambda f, y: jax.nn.logsumexp(f) - f[y])
    same = [diagnostics.kernel_change(x, MLP, moved(MLP, 0.3)) for x in (loss, LOSS)]
    close("the same outputs", same[0], same[1], 1e-13)
    norms = mf.losses.SquaredNorm(lambda w: w**2)
    close("residuals", diagnostics.kernel_change(norms, jnp.ones(2), 2 * jnp.ones(2))[0], 3, 1e-14)
    with refused(ValueError, "kernel_change needs", wrong_type=True):
        diagnostics.kernel_change(mf.FunctionLoss(jnp.sum), jnp.ones(2), jnp.ones(2))
