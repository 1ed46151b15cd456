"""Settings for processes that compile much and compute little, as tests and smoke runs do."""

import functools
import gc
import inspect
import threading
from types import SimpleNamespace

import jax

# Whatever was a constant of a program stays in its context: one for all would grow for ever.
PROGRAMS_OF_A_CONTEXT = 200

# `jax.jit` for what runs for longer than it compiles, as simulations do: in a third of the time.
long_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": False,
    },
)


def settle() -> None:
    """Trace, lower and compile in less time; nothing that is computed changes."""
    # Tracing makes millions of objects: looking for garbage among them is a tenth of the time.
    gc.disable()
    # A third of the time goes without optimisation.
    jax.config.update("jax_disable_most_optimizations", True)
    # A tenth of the time goes into the lines of the source that programs carry along.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    share_contexts()
    count_down_in_a_loop()


def share_contexts() -> None:
    """JAX before 0.12 makes one for each program, in 7 ms: as long as many a program is lowered."""
    try:
        # No part of JAX that is public: tests are slower where it is elsewhere, and do not fail.
        from jax._src.interpreters import mlir
        from jax._src.lib.mlir import ir
    except ImportError:
        return
    make = getattr(mlir, "make_ir_context", None)
    if make is None or hasattr(make, "is_shared") or make() is make():
        return

    # Threads lower at the same time.
    shared = threading.local()

    def context():
        # A program that is lowered while another one is would become a part of it.
        if ir.Context.current is not None:
            return make()
        shared.number = getattr(shared, "number", -1) + 1
        if shared.number % PROGRAMS_OF_A_CONTEXT == 0:
            shared.context = make()
        return shared.context

    context.is_shared = True
    mlir.make_ir_context = context


# Of `diffrax._integrate.loop`.
COUNTDOWN = """
    for _ in range(100):
        t1_clip_floor = eqxi.prevbefore(t1_clip_floor)
"""


def count_down_in_a_loop() -> None:
    """Diffrax goes 100 numbers down from the last time one by one: a third of many a program."""
    # Not at the top: flags of XLA are set before.
    import equinox.internal as eqxi
    from diffrax import _integrate

    # No part that is public: tests are slower where it is otherwise, and do not fail.
    if COUNTDOWN not in inspect.getsource(_integrate.loop):
        return

    def hundred_before(time):
        return jax.lax.fori_loop(0, 100, lambda _, time: eqxi.prevbefore(time), time)

    _integrate.eqxi = SimpleNamespace(**vars(eqxi) | {"prevbefore": hundred_before})
    _integrate.range = lambda *ends: range(1) if ends == (100,) else range(*ends)
