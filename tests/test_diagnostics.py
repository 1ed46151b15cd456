"""What a drift costs is known before it is spent, and printed so that a person can read it."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf
from manifoldflow import diagnostics

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def problem():
    model = eqx.nn.MLP(20, 1, 30, 2, activation=jnp.tanh, key=jr.key(0))
    loss = mf.LeastSquares(jr.normal(jr.key(1), (40, 20)), jr.normal(jr.key(2), (40, 1)))
    flow = mf.LimitDiffusion(mf.ZeroLossManifold(loss), mf.LabelNoise(1.0, 1))
    return loss, flow, model


def test_explain_names_every_leaf(problem):
    loss, _, model = problem
    rows = {row.leaf: row for row in mf.explain(loss, model)}
    assert len(rows) == 6, f"6 leaves, got {list(rows)}"
    weight = rows[".layers[1].weight"]
    assert weight.treatment == "rank one", weight
    assert weight.bytes_dense == 40 * 30 * 30 * 8, weight
    assert weight.bytes_kept < weight.bytes_dense / 5, weight
    assert ".layers[1].weight" in str(mf.explain(loss, model))


def test_explain_says_where_structure_is_lost(problem):
    loss, _, model = problem
    squared = mf.LeastSquares(
        loss.inputs, loss.targets, predict=lambda p, x: jnp.tanh((p["w"] ** 2) @ x)[:1]
    )
    (row,) = diagnostics.explain(squared, {"w": jnp.ones((30, 20))})
    assert row.treatment == "dense rows", row
    assert isinstance(diagnostics.explain(squared, {"w": jnp.ones((30, 20))}), tuple)


def test_plan_is_what_the_compiler_says_and_refuses(problem):
    _, flow, model = problem
    needed = mf.plan(flow, model)
    assert isinstance(needed, diagnostics.Plan)
    dense = 40 * (20 * 30 + 30 + 30 * 30 + 30 + 30 + 1) * 8
    assert needed.dense_jacobian == dense, f"{needed.dense_jacobian} is not {dense}"
    assert 0 < needed.drift, needed
    assert "dense_jacobian" in str(needed)
    mf.plan(flow, model, limit=10**9)
    with pytest.raises(MemoryError, match="IterativeGram"):
        mf.plan(flow, model, limit=needed.drift)
