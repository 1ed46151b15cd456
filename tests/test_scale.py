"""What makes the drift affordable: chunks, several devices, subsets, no retracing."""

import os
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
import processes
from checks import at_most, close, equal, refused
from manifoldflow import _tree, flows, linalg


def problem(num_examples=30, width=64):
    model = eqx.nn.MLP(5, 2, width, 2, activation=jnp.tanh, key=jr.key(0))
    inputs = jr.normal(jr.key(1), (num_examples, 5))
    return mf.LeastSquares(inputs, jr.normal(jr.key(2), (num_examples, 2))), model


@pytest.mark.parametrize("chunk_size", [7, 30])
def test_chunked_equals_structured(chunk_size):
    """30 examples in chunks of 7 leave a rest of 2."""
    loss, model = problem()
    coordinates, static = loss.split(model)
    fn = lambda x, example: loss.example_residual(_tree.join(x, static), example)
    chunked = linalg.chunked_jacobian(fn, coordinates, loss.data, chunk_size)
    whole = linalg.structured_jacobian(fn, coordinates, loss.data)
    v, w = _tree.random_normal_like(jr.key(3), coordinates), jr.normal(jr.key(4), (60,))
    flat = lambda tree: _tree.ravel(tree)[0]
    products = {
        "J v": lambda jacobian: jacobian.mv(v),
        "K": lambda jacobian: jacobian.gram(),
        "row norms": lambda jacobian: jacobian.row_norms_squared(),
        "column norms": lambda jacobian: jacobian.column_norms_squared(),
        "Jᵀw": lambda jacobian: flat(jacobian.transpose_mv(w)),
        "rows": lambda jacobian: jacobian.as_matrix(),
    }
    for name, product in products.items():
        jitted = eqx.filter_jit(product)
        close(name, jitted(chunked), jitted(whole), 1e-12)

    def energy(build):
        def of(x):
            jacobian = build(fn, x, loss.data)
            return jnp.sum(jnp.sin(jacobian.gram())) + jacobian.mv(v) @ w

        return flat(jax.jit(jax.grad(of))(coordinates))

    expected = energy(linalg.structured_jacobian)
    got = energy(lambda *at: linalg.chunked_jacobian(*at, chunk_size))
    close("derivative of Gram matrix and product", got, expected, 1e-10)


def test_chunks_are_chosen_by_memory_and_keep_within_it():
    model = eqx.nn.MLP(16, 1, 256, 2, activation=jnp.tanh, key=jr.key(0))
    model = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, model)
    coordinates, static = eqx.partition(model, eqx.is_inexact_array)
    data = jr.normal(jr.key(1), (2000, 16), jnp.float32)
    fn = lambda x, example: eqx.combine(x, static)(example)

    def temporary(memory):
        def trace(x):
            return jnp.sum(linalg.jacobian(fn, x, data, memory=memory).row_norms_squared())

        compiled = jax.jit(jax.grad(trace)).lower(coordinates).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert isinstance(linalg.jacobian(fn, coordinates, data), linalg.StructuredJacobian)
    small = linalg.jacobian(fn, coordinates, data, memory=2**20)
    assert isinstance(small, linalg.ChunkedJacobian), type(small)
    at_most("memory in chunks, MB", temporary(2**20) / 2**20, 2.5)
    assert temporary(2**30) > 5 * 2**20, "all at once should need more, or the test says nothing"


def test_automatic_gram_solver():
    """Dense while 3n² numbers fit and n ≤ 60√D, else iterative."""
    jacobian = linalg.DenseJacobian(jr.normal(jr.key(0), (40, 50)))
    kind = lambda gram: type(gram(jacobian)).__name__
    equal("room for it", kind(linalg.AutoGram(memory=3 * 40**2 * 8)), "DenseGramSolve")
    equal("too little", kind(linalg.AutoGram(memory=3 * 40**2 * 8 - 1)), "IterativeGramSolve")
    flat = linalg.DenseJacobian(jnp.ones((130, 4)))
    equal("n > 60√D", type(linalg.AutoGram()(flat)).__name__, "IterativeGramSolve")


def test_the_drift_is_traced_once():
    loss, model = problem(width=16)
    calls = []

    def predict(point, x):
        calls.append(None)
        return point(x)

    noise = mf.LabelNoise(std=1.0, batch_size=1)

    def drift(targets, model):
        loss_ = mf.LeastSquares(loss.inputs, targets, predict=predict)
        return mf.LimitDiffusion(mf.ZeroLossManifold(loss_), noise).drift(model)

    drift(loss.targets, model)
    traced = len(calls)
    assert traced > 0
    drift(loss.targets + 1, jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, model))
    equal("calls of the model while tracing, after new data", len(calls), traced)


def test_subsampled_drift():
    """Unbiased, with the stated standard error; exact for all examples."""
    loss, model = problem(num_examples=64, width=16)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0))
    exact = flow.drift(model)
    whole = mf.subsampled_drift(flow, model, jr.key(0), num_examples=64)
    assert isinstance(whole, flows.DriftEstimate)
    gap = _tree.norm(_tree.subtract(whole.drift, exact))
    at_most("all examples", gap / _tree.norm(exact), 1e-10)
    at_most("their standard error", whole.standard_error, 1e-10)

    ambient = mf.subsampled_drift(flow, model, jr.key(0), num_examples=64, projected=False).drift
    estimate = lambda key: mf.subsampled_drift(flow, model, key, num_examples=16, projected=False)
    some = jax.lax.map(estimate, jr.split(jr.key(1), 400))
    errors = jax.tree.map(lambda x, y: x - y, some.drift, ambient)
    squares = sum(jnp.sum(leaf**2, range(1, leaf.ndim)) for leaf in jax.tree.leaves(errors))
    stated = jnp.mean(some.standard_error**2)
    ratio = float(jnp.mean(squares) / stated)
    at_most("|mean squared error / stated − 1|", abs(ratio - 1), 0.2)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), errors)
    at_most("bias in standard errors", _tree.norm(mean) / jnp.sqrt(stated / 400), 2.0)


def test_subsample_bad_input():
    loss, model = problem(num_examples=16, width=8)
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(std=1.0))
    draw = lambda **options: mf.subsampled_drift(flow, model, jr.key(0), **options)
    with refused(ValueError, "at most 16", "num_examples=32"):
        draw(num_examples=32)
    with refused(ValueError, "equal groups", "num_groups=8"):
        draw(num_examples=12)


EIGHT = "--xla_force_host_platform_device_count=8"
DEVICES = """
    import jax, jax.numpy as jnp, jax.random as jr, equinox as eqx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    jax.config.update("jax_enable_x64", True)
    import manifoldflow as mf
    from manifoldflow import linalg
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
    model = eqx.nn.MLP(8, 1, 128, 2, activation=jnp.tanh, key=jr.key(0))
    inputs, targets = jr.normal(jr.key(1), (512, 8)), jr.normal(jr.key(2), (512, 1))
    loss = mf.LeastSquares(inputs, targets)
    sharded = mf.shard_examples(loss, mesh)
    assert len(sharded.inputs.sharding.device_set) == 8
    halves = NamedSharding(mesh, PartitionSpec("examples"))
    wide = lambda x: eqx.is_array(x) and x.ndim == 2 and x.shape[0] % 8 == 0
    spread = jax.tree.map(lambda x: jax.device_put(x, halves) if wide(x) else x, model)

    def compiled(fn, *arguments):
        program = eqx.filter_jit(fn).lower(*arguments).compile()
        result = eqx.filter(program(*arguments), eqx.is_array)
        return result, program.compiled.memory_analysis().temp_size_in_bytes

    trace = lambda loss, model: eqx.filter_grad(loss.trace_gauss_newton)(model)
    gram = lambda loss, model: loss.jacobian(model).gram()
    drift = lambda gram: lambda loss, model: mf.LimitDiffusion(
        mf.ZeroLossManifold(loss, gram=gram), mf.LabelNoise(1.0)
    ).drift(model)
    iterative = linalg.IterativeGram(rtol=1e-8, preconditioner_rank=32)
    for name, fn in dict(trace=trace, gram=gram, dense=drift(linalg.DenseGram()),
                         iterative=drift(iterative)).items():
        # Few examples for conjugate gradients: at the condition of 512 they keep few digits.
        some = loss.select(jnp.arange(64)) if name == "iterative" else loss
        one, one_memory = compiled(fn, some, model)
        ways = {"replicated": model, "sharded": spread}
        for parameters, at in list(ways.items())[: 2 if name in ("trace", "dense") else 1]:
            many, many_memory = compiled(fn, mf.shard_examples(some, mesh), at)
            leaves = zip(jax.tree.leaves(one), jax.tree.leaves(many))
            error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in leaves)
            print(name, parameters, error, one_memory / many_memory)
"""


def test_eight_devices_give_the_same_numbers_with_less_memory_each():
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {EIGHT}"}
    done = processes.Running(["-c", textwrap.dedent(DEVICES)], environment=flags).finished()
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    equal("what was compared", len(rows), 6)
    # The Gram matrix needs the factors of all examples on every device for a while.
    least = {"trace": 4, "gram": 2}
    for name, parameters, error, saved in rows:
        at_most(f"{name}, parameters {parameters}: relative difference", float(error), 1e-8)
        if name in least and parameters == "replicated":
            text = f"{name}: only {saved} times less memory on each device"
            assert float(saved) >= least[name], text


def test_shard_bad_input():
    loss, _ = problem(num_examples=3)
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with refused(ValueError, "one axis", "3 examples"):
        mf.shard_examples(loss, mesh)
