"""Φ moves with the data as well as with the start: its derivatives in the targets."""

import jax
import jax.numpy as jnp
import jax.random as jr

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

    step = 1e-4
    expected = height(targets + step * direction) - height(targets - step * direction)
    expected = expected / (2 * step)
    _, forward = jax.jvp(height, (targets,), (direction,))
    reverse = jnp.dot(jax.grad(height)(targets), direction)
    checks.close("jvp against central differences", forward, expected, 1e-6)
    checks.close("vjp against central differences", reverse, expected, 1e-6)
