"""The structured Jacobian equals the dense one, in every product, on every kind of layer."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from manifoldflow.linalg import structured_jacobian
from manifoldflow.linalg.jacobian import _use_matrix_product
from structured_models import (
    Case,
    CASES,
    drawn,
    mlp,
    module_case,
    normal,
    normalised_weights,
    tied_embedding,
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


BOUND = 1e-10


def assert_close(name: str, value: Any, expected: Any, bound: float = BOUND) -> None:
    """Compare two PyTrees relative to the largest expected entry."""
    assert jax.tree.structure(value) == jax.tree.structure(expected), name
    for got, want in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
        got, want = np.asarray(got), np.asarray(want)
        error = float(np.max(np.abs(got - want), initial=0.0))
        scale = max(float(np.max(np.abs(want), initial=0.0)), 1e-3)
        assert error <= bound * scale, f"{name}: error {error:.3e}, bound {bound * scale:.3e}"


BATCHED = (
    "mlp scalar",
    "attention over pairs",
    "tied embedding transposed",
    "convolution",
    "recurrent",
)
"""One case per kind of block: enough for vmap, which is indifferent to the model."""


@functools.cache
def case_of(name):
    return CASES[name]()


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return case_of(request.param)


def dense_rows(case: Case, params: Any) -> Any:
    """J as a PyTree of (n·k, *leaf.shape), by reverse mode and vmap."""
    flat = lambda p, x: jnp.ravel(case.fn(p, x))
    rows = jax.vmap(jax.jacrev(flat), in_axes=(None, 0))(params, case.inputs)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def dense_matrix(case: Case, params: Any) -> jax.Array:
    return matrix_of(dense_rows(case, params))


def matrix_of(rows: Any) -> jax.Array:
    leaves = jax.tree.leaves(rows)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def like(params: Any, seed: int) -> Any:
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape)), params)


def flat(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_treatments(case):
    jac = jax.eval_shape(builder(case), case.params)
    assert tuple(jac.treatments.values()) == case.treatments, jac.treatments


def products(case: Case, params: Any, jac_fn: Callable[..., Any]) -> dict[str, Any]:
    """Every product of the operator; `jac_fn(params)` builds it."""
    jac, moved = jac_fn(params), jac_fn(jax.tree.map(lambda x: 0.9 * x + 0.1, params))
    weights = jnp.cos(jnp.arange(jac.out_size(), dtype=float))
    return {
        "mv": jac.mv(like(params, 7)),
        "transpose": jac.T.mv(weights),
        "gram": jac.gram(),
        "cross_gram": jac.cross_gram(moved),
        "row_norms_squared": jac.row_norms_squared(),
        "leaf_row_norms_squared": jac.leaf_row_norms_squared(),
        "column_norms_squared": jac.column_norms_squared(),
        "as_matrix": jac.as_matrix(),
    }


def dense_products(case: Case, params: Any) -> dict[str, Any]:
    both = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x + 0.1]), params)
    # Traced and compiled once for both points.
    both = jax.vmap(lambda params: dense_rows(case, params))(both)
    rows, moved_rows = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    matrix, moved = matrix_of(rows), matrix_of(moved_rows)
    weights = jnp.cos(jnp.arange(matrix.shape[0], dtype=float))
    squares = lambda leaf: jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim)))
    return {
        "mv": matrix @ flat(like(params, 7)),
        "transpose": jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), rows),
        "gram": matrix @ matrix.T,
        "cross_gram": matrix @ moved.T,
        "row_norms_squared": jnp.sum(matrix**2, axis=1),
        "leaf_row_norms_squared": jax.tree.map(squares, rows),
        "column_norms_squared": jax.tree.map(lambda leaf: jnp.sum(leaf**2, axis=0), rows),
        "as_matrix": matrix,
    }


def builder(case: Case) -> Callable[[Any], Any]:
    return lambda params: structured_jacobian(case.fn, params, case.inputs)


def test_products_equal_dense(case):
    got = jax.jit(lambda p: products(case, p, builder(case)))(case.params)
    expected = jax.jit(lambda p: dense_products(case, p))(case.params)
    for name, want in expected.items():
        assert_close(name, got[name], want)


@pytest.mark.parametrize("batched", BATCHED)
def test_products_under_vmap(batched):
    case = case_of(batched)
    stack = jax.tree.map(lambda x: jnp.stack([x, 0.7 * x]), case.params)
    got = jax.jit(jax.vmap(lambda p: products(case, p, builder(case))))(stack)
    expected = jax.jit(jax.vmap(lambda p: dense_products(case, p)))(stack)
    for name in expected:
        assert_close(name, got[name], expected[name])


def scalars(case: Case, params: Any, structured: bool) -> jax.Array:
    """One number that depends on the norms, one on the Gram matrix."""
    if structured:
        jac = structured_jacobian(case.fn, params, case.inputs)
        norms, gram = jac.row_norms_squared(), jac.gram()
    else:
        matrix = dense_matrix(case, params)
        norms, gram = jnp.sum(matrix**2, axis=1), matrix @ matrix.T
    return jnp.stack([norms.sum(), jnp.sum(jnp.sin(gram))])


def test_derivatives_equal_dense(case):
    direction = like(case.params, 11)

    def derivatives(structured):
        """Forward, reverse and forward-over-reverse mode at once."""
        fn = jax.value_and_grad(lambda p: scalars(case, p, structured).sum())
        (_, reverse), (forward, both) = jax.jvp(fn, (case.params,), (direction,))
        return forward, reverse, both

    got = jax.jit(lambda: derivatives(True))()
    expected = jax.jit(lambda: derivatives(False))()
    for name, value, want in zip(("jvp", "grad", "jvp of grad"), got, expected, strict=True):
        assert_close(name, value, want)


def test_lineax_sees_a_general_operator():
    case = mlp(10)
    jac = jax.jit(builder(case))(case.params)
    assert not lx.is_symmetric(jac) and not lx.is_diagonal(jac.T)
    assert jac.T.T is jac and lx.conj(jac) is jac and lx.linearise(jac) is jac

    @jax.jit
    def pairs(jac, params):
        matrix, value = jac.as_matrix(), jac.mv(params)
        solution = lx.linear_solve(jac, value, lx.LSMR(1e-13, 1e-13)).value
        return {
            "composition": ((jac @ jac.T).as_matrix(), jac.gram()),
            "materialise": (lx.materialise(jac).as_matrix(), matrix),
            "materialise T": (lx.materialise(jac.T).as_matrix(), matrix.T),
            "dense": (matrix, dense_matrix(case, params)),
        }, (jac.mv(solution), value)

    equal_pairs, least_squares = pairs(jac, case.params)
    for name, (found, expected) in equal_pairs.items():
        assert_close(name, found, expected)
    assert jac.in_size() == equal_pairs["dense"][1].shape[1]
    assert_close("least squares", *least_squares, 1e-8)


def test_no_retracing():
    """An operator is a jit argument like any other; equal models share one compilation."""
    case, traces = mlp("scalar"), []

    @jax.jit
    def gram(jac):
        traces.append("gram")
        return jac.gram()

    @jax.jit
    def build(params, inputs):
        traces.append("build")
        return structured_jacobian(case.fn, params, inputs)

    for shift in (0.0, 0.1, 0.2):
        params = jax.tree.map(lambda x, shift=shift: x + shift, case.params)
        gram(build(params, case.inputs + shift))
        gram(structured_jacobian(case.fn, params, case.inputs))
    assert traces == ["build", "gram"], traces


def test_custom_backward_rules_are_kept():
    """A model with its own vjp has no forward mode, but has rows."""

    @jax.custom_vjp
    def reversed_gradient(x):
        return x

    reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    fn = lambda p, x: p["b"] @ jnp.tanh(reversed_gradient(p["a"] @ x))
    params = {"a": normal(0, 4, 3), "b": normal(1, 2, 4)}
    case = Case(fn, params, normal(2, 5, 3), ("rank one",) * 2)

    @jax.jit
    def found_and_expected(params):
        jac, matrix = structured_jacobian(fn, params, case.inputs), dense_matrix(case, params)
        return {"rows": (jac.as_matrix(), matrix), "gram": (jac.gram(), matrix @ matrix.T)}

    for name, (found, expected) in found_and_expected(params).items():
        assert_close(name, found, expected)


def equations(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """All equations of a function's jaxpr and of the bodies inside."""
    found, stack = [], [jax.make_jaxpr(fn)(*args).jaxpr]
    while stack:
        body = stack.pop()
        found += body.eqns
        values = [x for eqn in body.eqns for v in eqn.params.values() for x in jax.tree.leaves(v)]
        bodies = [getattr(value, "jaxpr", value) for value in values]
        stack += [body for body in bodies if hasattr(body, "eqns")]
    return found


@pytest.mark.parametrize("name", ["mlp ten outputs", "attention", "convolution", "embedding"])
def test_every_product_asks_for_full_precision(name):
    case = case_of(name)
    gradient = jax.grad(lambda p: scalars(case, p, True).sum())
    for fn in (gradient, lambda p: products(case, p, builder(case))):
        found = [e for e in equations(fn, case.params) if "precision" in e.params]
        asked = {
            str(e.params["precision"])
            for e in found
            if e.primitive.name in ("dot_general", "conv_general_dilated")
        }
        highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
        # JAX cuts patches by a convolution with zeros and ones, which need no precision.
        allowed = {str((highest, highest)), str((highest, default))}
        dots = {str(e.params["precision"]) for e in found if e.primitive.name == "dot_general"}
        assert asked <= allowed and dots == {str((highest, highest))}, (asked, dots)


def test_covered_leaves_have_no_explicit_rows():
    """No array of n·D numbers anywhere in value, gradient and Gram matrix."""
    module = drawn(eqx.nn.MLP, 8, "scalar", 64, 2, jnp.tanh)
    case = module_case(module, normal(1, 16, 8), ())
    build = builder(case)

    bound = 16 * 64 * 64 // 4  # a quarter of the rows of one hidden weight
    for name, fn in {
        "gradient of norms": jax.grad(lambda p: build(p).row_norms_squared().sum()),
        "gram": lambda p: build(p).gram(),
        "gradient of gram": jax.grad(lambda p: jnp.sin(build(p).gram()).sum()),
    }.items():
        size = max(var.aval.size for e in equations(fn, case.params) for var in e.outvars)
        assert size <= bound, f"{name}: an array of {size} numbers, bound {bound}"


def test_pieces_and_large_dense_rows(monkeypatch):
    """Rows that are formed in pieces give the same numbers."""
    monkeypatch.setattr(_use_matrix_product, "PIECE", 4)
    for case in (case_of("attention in pieces"), tied_embedding(True), normalised_weights()):
        fn = lambda p, structured, case=case: scalars(case, p, structured).sum()
        both = jax.jit(jax.value_and_grad(fn), static_argnums=1)
        assert_close("value and gradient", both(case.params, True), both(case.params, False))


HIDDEN = {
    "added": (lambda p, h: h + p["b"], ((0, 2),)),
    "subtracted": (lambda p, h: h - p["b"], ()),
    "scaled": (lambda p, h: h + 2 * p["b"], ()),
    "added to the output as well": (lambda p, h: h + p["b"], ()),
    "broadcast": (lambda p, h: h + p["b"][:1], ()),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_bias_shares_the_factor_of_its_weight(name):
    add, twins = HIDDEN[name]
    more = 1.0 if "output" in name else 0.0

    def fn(params, x):
        hidden = jnp.tanh(add(params, params["w"] @ x))
        return params["v"] @ (hidden + (more * params["b"] if more else 0.0))

    params = {"b": normal(0, 4), "v": normal(1, 2, 4), "w": normal(2, 4, 3)}

    @jax.jit
    def operator_and_grams(params, inputs, others):
        found, other = (structured_jacobian(fn, params, x) for x in (inputs, others))
        matrix, other_matrix = found.as_matrix(), other.as_matrix()
        return found, {
            "gram": (found.gram(), matrix @ matrix.T),
            "cross gram": (found.cross_gram(other), matrix @ other_matrix.T),
        }

    found, grams = operator_and_grams(params, normal(3, 5, 3), normal(4, 6, 3))
    assert found.twins == twins
    for what, (got, expected) in grams.items():
        assert_close(what, got, expected)


def test_dtype_follows_the_parameters():
    case = mlp(10)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), case.params)

    @jax.jit
    def results(params, inputs):
        jac = structured_jacobian(case.fn, params, inputs)
        value, matrix = jac.mv(params), jac.as_matrix()
        found = jac.gram(), jac.row_norms_squared(), value, jac.T.mv(value)
        return found, matrix @ matrix.T

    found, expected = results(single, case.inputs.astype(jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert_close("gram", found[0], expected, 1e-5)


def test_wrong_arguments_are_named():
    fn, x = (lambda p, x: p["w"] @ x), normal(0, 4, 3)
    with pytest.raises(ValueError, match="eqx.partition"):
        structured_jacobian(fn, {"w": jnp.arange(3)}, x)
    with pytest.raises(ValueError, match="leading axis"):
        structured_jacobian(fn, {"w": normal(1, 2, 3)}, (x, x[:2]))
    with pytest.raises(ValueError, match="one real floating-point array"):
        structured_jacobian(lambda p, x: (p["w"] @ x, x), {"w": normal(1, 2, 3)}, x)
    jac = jax.jit(lambda w: structured_jacobian(fn, {"w": w}, x))(normal(1, 2, 3))
    with pytest.raises(ValueError, match="shapes of the parameters"):
        jac.mv({"w": normal(1, 3, 2)})
