"""The settings that make tests quick change nothing but their time."""

import gc

import pytest

import quick
from checks import at_most

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
