"""The settings that make tests quick change nothing but their time."""

import gc

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import pytest
from diffrax import _integrate

import quick
from checks import at_most, equal

mlir = pytest.importorskip("jax._src.interpreters.mlir")


@pytest.mark.skipif(not hasattr(mlir.make_ir_context, "is_shared"), reason="JAX shares them")
def test_programs_share_contexts():
    """New ones come now and then, and within another program's always."""
    contexts = [mlir.make_ir_context() for _ in range(2 * quick.PROGRAMS_OF_A_CONTEXT)]
    at_most("contexts", len({id(context) for context in contexts}), 3)
    with contexts[-1]:
        inner = [mlir.make_ir_context() for _ in range(2)]
    assert inner[0] is not inner[1] and not {*map(id, inner)} & {*map(id, contexts)}


def test_settling_twice_is_settling_once():
    make = mlir.make_ir_context
    quick.settle()
    assert mlir.make_ir_context is make
    assert not gc.isenabled()


@pytest.mark.skipif(_integrate.eqxi is eqxi, reason="Diffrax does not count down")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_counting_down_in_a_loop_ends_where_diffrax_does(dtype):
    times = jnp.array([1.0, -1.0, 0.0, 0.1, 1e30, 1e-37, 1e-42], dtype)

    def one_by_one(time):
        for _ in range(100):
            time = eqxi.prevbefore(time)
        return time

    def as_diffrax_calls_it(time):
        for _ in _integrate.range(100):
            time = _integrate.eqxi.prevbefore(time)
        return time

    equal("times", as_diffrax_calls_it(times).tolist(), one_by_one(times).tolist())
    equal("slope", jax.grad(as_diffrax_calls_it)(times[0]), jnp.ones((), dtype))
    equal("other ranges", list(_integrate.range(2, 4)), [2, 3])
