"""A user's own use of a leaf gives the numbers of explicit rows, or is replaced by them."""

import functools

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from checks import at_most, close, equal, refused
from manifoldflow import linalg
from structured_models import normal
from test_extending import Circulant, circulant, correlation
from test_structured_jacobian import equations


def products(jacobian, other):
    """Everything that a Jacobian of six rows is asked for."""
    ones = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) + 1.0).reshape(x.shape), other)
    return {
        "J v": jacobian.mv(ones),
        "Jᵀw": jacobian.transpose_mv(jnp.sin(1.0 + jnp.arange(jacobian.out_size()))),
        "K": jacobian.gram(),
        "norms": jacobian.row_norms_squared(),
        "rows": jacobian.rows(),
    }


def assert_equals_dense(fn, params, inputs, treatments, bound=1e-13):
    """All products, the Gram matrix between two points, and derivatives of two modes."""
    found = {}

    def of(kind, is_first):
        def build(params):
            jacobian = kind(fn, params, inputs)
            if is_first:
                found.update(jacobian.treatments)
            return jacobian

        def number(params):
            jacobian = build(params)
            return jnp.sum(jnp.sin(jacobian.gram())) + jnp.sum(jacobian.row_norms_squared() ** 2)

        moved = jax.tree.map(lambda x: 0.9 * x + 0.1, params)
        gradient, hessian = jax.jvp(jax.grad(number), (params,), (moved,))
        cross = build(params).cross_gram(build(moved))
        return products(build(params), params) | {"cross": cross, "∇": gradient, "∇²": hessian}

    got = jax.jit(lambda: of(linalg.structured_jacobian, True))()
    expected = jax.jit(lambda: of(linalg.dense_jacobian, False))()
    equal("treatments", found, treatments)
    for name in expected:
        close(name, got[name], expected[name], bound)


WEIGHT, SIGNALS = normal(0, 6, 5, 7), normal(1, 6, 5, 7)


def test_steps_and_repeated_uses_are_positions():
    """One weight in every step of a scan, and once more after it."""

    def fn(p, x):
        step = lambda h, gain: (jnp.tanh(circulant(p["w"], h * gain)), None)
        last, _ = jax.lax.scan(step, x, jnp.array([1.0, 0.5]))
        return jnp.sin(circulant(-p["w"], last)).sum(1)[:2]

    params = {"w": normal(0, 12, 12, 5)}
    assert_equals_dense(fn, params, normal(1, 3, 12, 5), {"['w']": "Circulant"}, 1e-12)


def test_rows_that_are_smaller_are_kept():
    fn = lambda p, x: jnp.tanh(circulant(p["w"], x)).sum(1)[:1]
    assert_equals_dense(
        fn, {"w": normal(0, 1, 1, 7)}, normal(1, 4, 1, 7), {"['w']": "Circulant, summed"}
    )


ALIASED = {
    "elementwise": lambda w, x: circulant(w, x).sum(1) + (w[:, 0] * x[0]).sum(1),
    "overlapping": lambda w, x: circulant(w[:4], x).sum(0) * circulant(w[2:], x).sum(0),
    "of another form": lambda w, x: circulant(w, x) @ (w[0, 0] * (w[:, 0] @ x[0])[0]),
    "repeated": lambda w, x: circulant(jnp.broadcast_to(w[:1, :1], w.shape), x).sum(0),
    "as the signal": lambda w, x: circulant(normal(3, 4, 5, 7), w[0]).sum(0) * x[0],
    "both": lambda w, x: circulant(w, w[0]).sum(0) * x[0],
}
APART = {
    "two parts": lambda w, x: circulant(w[:3], x).sum(0) * circulant(w[3:], x).sum(0),
    "scaled": lambda w, x: circulant(-2 * w, x).sum(0),
}


def test_shared_entries_have_explicit_rows():
    """Where two uses share entries of a leaf, products of their rows would be missed."""

    def all_rows():
        found = {}
        for name, fn in (ALIASED | APART).items():
            dense = linalg.dense_jacobian(fn, WEIGHT, SIGNALS)
            structured = linalg.structured_jacobian(fn, WEIGHT, SIGNALS)
            expected = "dense rows" if name in ALIASED else "Circulant"
            equal(name, list(structured.treatments.values()), [expected])
            found[name] = structured.gram(), dense.gram()
        return found

    for name, (value, expected) in jax.jit(all_rows)().items():
        close(name, value, expected, 1e-13)


def named_circulant():
    @jax.jit
    def circulant(weight, signal):
        return 2 * jnp.fft.irfft(jnp.fft.rfft(weight) * jnp.fft.rfft(signal)).sum(1)

    return circulant


def test_a_function_is_known_by_its_program():
    """Another function of this name, and this one under vmap, are what is inside them."""
    twin = named_circulant()
    for fn in (
        lambda w, x: twin(w[..., :6], x[..., :6]),
        lambda w, x: jax.vmap(lambda x: circulant(w, x))(jnp.stack([x, 2 * x])).sum(0),
    ):
        structured = linalg.structured_jacobian(fn, WEIGHT, SIGNALS)
        equal("treatment", structured.treatments[""], "dense rows")
        dense = linalg.dense_jacobian(fn, WEIGHT, SIGNALS)
        close("K", structured.gram(), dense.gram(), 1e-13)


@jax.jit
def fragile(weight, signal):
    return jnp.einsum("fcm,cm->fm", weight, jnp.sort(signal))


def raising(error):
    def fn(*_):
        raise error

    return fn


FAULTS = {
    "recognise refuses": (0, raising(NotImplementedError("a form")), ""),
    "recognise raises": (0, raising(KeyError("axis")), " (Fragile: KeyError: 'axis')"),
    "another kind of answer": (0, lambda *_: 3.0, " (Fragile: TypeError: recognise gave 3.0"),
    "the map raises": (1, raising(TypeError("no map")), " (Fragile: TypeError: no map)"),
    "the map has another shape": (1, lambda weight, signal: weight, " (Fragile: "),
    "inner refuses": (2, raising(NotImplementedError), ""),
    "inner raises": (2, raising(IndexError("f")), " (Fragile: IndexError: f)"),
    "inner is no number": (2, lambda *factors: factors[0], " (Fragile: "),
}


def fragile_use(place, fault):
    """The right use of `fragile`, but for one of its three functions."""
    right = [
        lambda kind, equation, index: linalg.Recognised(kind(), equation.operands[1]),
        fragile,
        lambda d, a, e, b: jnp.sum((d.T @ e) * (a.T @ b)),
    ]
    recognise, apply, inner = (fault if i == place else fn for i, fn in enumerate(right))

    @linalg.register_use(fragile)
    class Fragile(linalg.AbstractPairUse):
        @classmethod
        def recognise(cls, equation, index):
            return recognise(cls, equation, index)

        def apply(self, weight, factor):
            return apply(weight, factor)

        def inner(self, delta, factor, other_delta, other_factor):
            return inner(delta, factor, other_delta, other_factor)

    return Fragile


def test_whatever_fails_has_explicit_rows():
    """The leaf alone loses its structure, and `treatments` says which error it was."""
    params = {"w": WEIGHT, "v": normal(2, 4, 6)}

    def fn(p, x):
        return p["v"] @ jnp.tanh(fragile(p["w"], x).sum(1))

    def grams():
        found = {}
        for name, (place, fault, reason) in FAULTS.items():
            assert issubclass(fragile_use(place, fault), linalg.AbstractUse)
            structured = linalg.structured_jacobian(fn, params, SIGNALS)
            weight, other = structured.treatments["['w']"], structured.treatments["['v']"]
            assert weight.startswith("dense rows" + reason), f"{name}: {weight}"
            assert reason or weight == "dense rows", f"{name}: {weight}"
            equal(f"{name}: the other leaf", other, "rank one")
            found[name] = structured.gram()
        return found, linalg.dense_jacobian(fn, params, SIGNALS).gram()

    found, expected = jax.jit(grams)()
    for name, value in found.items():
        close(name, value, expected, 1e-13)


# A primitive of the user's own, of which two operands may be leaves.

kronecker_p = jex.Primitive("kronecker_product")


def kronecker(a, x, b):
    """(A ⊗ B) x, for x as a matrix."""
    return kronecker_p.bind(a, x, b)


@kronecker_p.def_impl
def plain_kronecker(a, x, b):
    return a @ x @ b.T


def kronecker_jvp(primals, tangents):
    return jax.jvp(plain_kronecker, primals, tuple(map(ad.instantiate_zeros, tangents)))


kronecker_p.def_abstract_eval(lambda a, x, b: a.update(shape=(a.shape[0], b.shape[0])))
ad.primitive_jvps[kronecker_p] = kronecker_jvp
batching.primitive_batchers[kronecker_p] = lambda args, axes: (
    jax.vmap(plain_kronecker, axes)(*args),
    0,
)
mlir.register_lowering(kronecker_p, mlir.lower_fun(plain_kronecker, multiple_results=False))


@linalg.register_use("kronecker_product")
class Kronecker(linalg.AbstractPairUse):
    """Z = A Y with Y = X Bᵀ, or Zᵀ = B Y with Y = (A X)ᵀ; rows δ Yᵀ."""

    is_first: bool = eqx.field(static=True)

    @classmethod
    def recognise(cls, equation, index):
        assert isinstance(equation, linalg.Equation)
        a, x, b = equation.operands
        if index == 1:
            raise NotImplementedError("a leaf as the vector")
        return linalg.Recognised(cls(index == 0), x @ b.T if index == 0 else (a @ x).T)

    def apply(self, weight, factor):
        return self.turned(weight @ factor)

    def inner(self, delta, factor, other_delta, other_factor):
        deltas = self.turned(delta).T @ self.turned(other_delta)
        return jnp.sum(deltas * (factor.T @ other_factor))

    def turned(self, z):
        return z if self.is_first else z.T


def test_a_primitive_of_ones_own():
    """In either of two operands, transposed and scaled; not in the third."""
    params = {"a": normal(0, 25, 24), "b": normal(1, 3, 4), "x": normal(2, 25, 4)}
    uses = {"['a']": "Kronecker", "['b']": "Kronecker, summed", "['x']": "unused"}
    fn = lambda p, x: jnp.sin(kronecker(p["a"].T / 5, x, p["b"])).sum(0)
    assert_equals_dense(fn, params, normal(3, 4, 25, 4), uses, 1e-12)
    fn = lambda p, x: jnp.sin(kronecker(p["a"].T / 5, p["x"], p["b"]) * x).sum(0)
    uses["['x']"] = "dense rows"
    assert_equals_dense(fn, params, normal(3, 4, 24, 1), uses, 1e-12)


# A use with a block of its own: of a sum over all columns, δ alone is kept.


@jax.jit
def row_sums(weight):
    return weight.sum(1)


class ConstantRows(linalg.AbstractBlock):
    """Rows δ ⊗ (1, …, 1) of a leaf seen as (F, C)."""

    delta: jax.Array  # (n, k, F)
    leaf: linalg.LeafView = eqx.field(static=True)
    num_columns: int = eqx.field(static=True)

    def mv(self, leaf):
        return self.delta @ self.leaf.apply(leaf).sum(1)

    def transpose_mv(self, weights):
        return self.leaf.pull(self._wide(jnp.einsum("nk,nkf->f", weights, self.delta)))

    def rows(self):
        return jax.vmap(jax.vmap(lambda d: self.leaf.pull(self._wide(d))))(self.delta)

    def cross_gram(self, other):
        if not isinstance(other, ConstantRows):
            raise NotImplementedError
        return jnp.einsum("nkf,mlf->nkml", self.delta, other.delta) * self.num_columns

    def norms(self):
        return jnp.sum(self.delta**2, 2) * self.num_columns

    def column_norms(self):
        return jnp.sum(self.rows() ** 2, (0, 1))

    def _wide(self, d):
        return jnp.broadcast_to(d[:, None], (len(d), self.num_columns))


@linalg.register_use(row_sums)
class RowSums(linalg.AbstractUse):
    num_columns: int = eqx.field(static=True)

    @classmethod
    def recognise(cls, equation, index):
        return linalg.Recognised(cls(equation.operands[0].shape[1]))

    def block(self, delta, factor, leaf):
        return ConstantRows(delta, leaf, self.num_columns)


def test_a_block_of_ones_own():
    params, inputs = {"w": normal(0, 4, 9)}, normal(1, 5, 4)
    fn = lambda p, x: jnp.sin(x * row_sums(p["w"])[::-1])[:2]
    assert_equals_dense(fn, params, inputs, {"['w']": "RowSums"})

    def in_scan(p, x):
        step = lambda h, gain: (jnp.sin(gain * h + row_sums(p["w"])), None)
        return jax.lax.scan(step, x, jnp.array([1.0, 0.5, 0.2]))[0]

    assert_equals_dense(in_scan, params, inputs, {"['w']": "RowSums, summed"})
    twice = lambda p, x: jnp.sin(row_sums(p["w"]) * x) + row_sums(p["w"])[0] * x
    assert_equals_dense(twice, params, inputs, {"['w']": "dense rows"})


def test_no_rows_of_positions_in_single_precision():
    """Five positions in a scan: rows, of 4·24·24·5 numbers, are in no program."""
    single = functools.partial(jnp.asarray, dtype=jnp.float32)
    params, inputs = {"w": single(normal(0, 24, 24, 5))}, single(normal(1, 4, 24, 5))

    def fn(p, x):
        step = lambda h, _: (jnp.tanh(circulant(p["w"], h) / 10), None)
        return jax.lax.scan(step, x, length=2)[0][0, :1]

    def gram(params):
        jacobian = linalg.structured_jacobian(fn, params, inputs)
        return jacobian.gram(), jacobian.row_norms_squared(), jacobian.transpose_mv(jnp.ones(4))

    sizes = [var.aval.size for eqn in equations(gram, params) for var in eqn.outvars]
    at_most("numbers of the largest array", max(sizes), 4 * 24 * 24 * 5 - 1)
    found = jax.jit(gram)(params)
    equal("dtypes", {str(x.dtype) for x in jax.tree.leaves(found)}, {"float32"})
    dense = linalg.dense_jacobian(fn, params, inputs)
    close("K", found[0], dense.gram(), 1e-5)


def test_what_is_no_use_is_refused():
    for operation in (3.0, None, lambda x: x):
        with refused(ValueError, "register_use: operation", "jax.jit", wrong_type=True):
            linalg.register_use(operation)
    for kind in (circulant, int, Circulant()):
        with refused(ValueError, "subclass of AbstractUse", "AbstractPairUse", wrong_type=True):
            linalg.register_use("cumsum")(kind)
    with refused(ValueError, "Recognised: use must be an AbstractUse", wrong_type=True):
        linalg.Recognised(correlation)
