"""Φ moves with the data as well as with the start: its derivatives in the targets."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import checks
import manifoldflow as mf


def test_derivative_in_the_targets():
    """Gradient flow itself feels the targets, not only the last projection.

    On a network, that is: on the u²−v² model the limit moves along the normal space alone.
    """
    inputs, targets = jr.normal(jr.key(0), (2, 5)), jnp.array([1.0, -0.5])
    start = {"w": jr.normal(jr.key(2), (5, 6)), "b": jr.normal(jr.key(3), (6,))}
    weights, direction = jr.normal(jr.key(1), (5, 6)), jnp.array([0.7, -1.1])

    def height(targets):
        loss = mf.LeastSquares(
            inputs, targets, predict=lambda p, z: jnp.dot(jnp.tanh(z @ p["w"]), p["b"])
        )
        return jnp.sum(weights * mf.limit_map(loss, start, rtol=1e-10)["w"])

    @jax.jit
    def value_and_derivatives(t):
        """All from one program: along the direction, and backwards."""
        value, along = jax.linearize(height, targets + t * direction)
        (backwards,) = jax.linear_transpose(along, targets)(jnp.ones(()))
        return value, along(direction), backwards

    step = 1e-4
    (above, *_), (below, *_) = (value_and_derivatives(t) for t in (step, -step))
    expected = (above - below) / (2 * step)
    _, forward, backwards = value_and_derivatives(0.0)
    checks.close("jvp against central differences", forward, expected, 1e-6)
    checks.close("vjp against central differences", backwards @ direction, expected, 1e-6)


@pytest.mark.quick
def test_slow_directions_in_single_precision():
    """Products uᵢvᵢ over three decades of stiffness in slope: u² − v² stays, uv arrives at y.

    Where the slow ones are taken for rounding too soon, the projection moves them instead of the
    flow, and 0.3 % are lost.
    """
    slopes, targets = np.logspace(0, -3, 200), np.linspace(0.5, 1.5, 200)
    u, v = np.linspace(1.5, 2.0, 200), np.linspace(0.9, 0.1, 200)
    loss = mf.LeastSquares(
        (jnp.asarray(slopes, jnp.float32), jnp.arange(200)),
        jnp.asarray(slopes * targets, jnp.float32),
        predict=lambda p, x: x[0] * p["u"][x[1]] * p["v"][x[1]],
    )
    start = {"u": jnp.asarray(u, jnp.float32), "v": jnp.asarray(v, jnp.float32)}
    limit, info = mf.limit_map_with_info(loss, start)
    assert info.result == mf.RESULTS.successful, info
    kept = (u**2 - v**2) / 2
    expected = np.sqrt(kept + np.sqrt(kept**2 + targets**2))
    expected = np.concatenate([expected, targets / expected])
    found = np.concatenate([limit["u"], limit["v"]])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    checks.at_most("distance from the closed form, relative", error, 1e-3)
