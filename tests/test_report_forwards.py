"""A model without derivatives forwards has a report of all that needs none."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import manifoldflow as mf


@jax.custom_vjp
def squashed(x):
    return jnp.tanh(x)


squashed.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
LOSS = mf.PerExampleLoss(
    jr.normal(jr.key(0), (6, 3)),
    jnp.array([0, 1, 0, 1, 1, 0]),
    lambda f, y: jax.nn.logsumexp(f) - f[y],
    predict=lambda w, x: squashed(x @ w),
)
WEIGHTS = 0.3 * jnp.ones((3, 2))


@pytest.mark.parametrize("max_rows", [100, 2])
def test_what_needs_derivatives_forwards_is_left_out(max_rows):
    found = mf.report(LOSS, WEIGHTS, num_samples=16, max_rows=max_rows, learning_rate=0.1)
    reasons = {one.name: one.reason for one in found.left_out}
    assert "custom_vjp" in reasons["trace of the Hessian"], reasons
    assert ("largest eigenvalue" in reasons) == (max_rows == 2), reasons
    assert found["trace of G"].value > 0 and found["gradient noise"].value > 0


def test_other_mistakes_are_told():
    number: Any = 3
    loss = mf.FunctionLoss(lambda w: jnp.sum(w) + len(number))
    with pytest.raises((TypeError, ValueError)):
        mf.report(loss, WEIGHTS)
