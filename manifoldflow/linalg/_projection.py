"""Projections and pseudo-inverses of a Jacobian, from solves with its Gram matrix.

A solve with K = J Jᵀ in floating point is wrong by eps·cond(K). What it leaves is known
exactly in the space of tangents, so applying it again to the rest gains digits that no
better factorisation could: twice in float64. In float32 the factorisation only serves as
a preconditioner for what is still left after that.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _tree
from manifoldflow._types import Flag, Scalar, Tangent
from manifoldflow.linalg._gram import AbstractGramSolve
from manifoldflow.linalg._operator import AbstractJacobian

# Each iteration gains what one factorisation is accurate to; ten are for conditions near
# 1/eps, where it is hardly accurate at all.
_MAX_ITERATIONS = 10


def pseudo_inverse_mv(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Float[Array, " n"]
) -> Tangent:
    """J†w = Jᵀ K⁻¹ w, refined."""
    lifted = jacobian.transpose_mv(gram.solve(vector))
    again = jacobian.transpose_mv(gram.solve(vector - jacobian.mv(lifted)))
    lifted = _tree.add(lifted, again)
    if _is_double(vector.dtype):
        return lifted
    return _tree.add(lifted, _rest(jacobian, gram, vector - jacobian.mv(lifted), lifted))


def normal_component(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Tangent
) -> Tangent:
    """P⊥v = Jᵀ K⁻¹ J v, refined: I − P⊥ is applied again to what is left."""
    remainder = vector
    for _ in range(2):
        multipliers = gram.solve(jacobian.mv(remainder))
        remainder = _tree.subtract(remainder, jacobian.transpose_mv(multipliers))
    if not _is_double(_tree.dtype_of(vector)):
        rest = _rest(jacobian, gram, jacobian.mv(remainder), vector)
        remainder = _tree.subtract(remainder, rest)
    return _tree.subtract(vector, remainder)


def _is_double(dtype: Any) -> bool:
    return bool(jnp.finfo(dtype).eps < 1e-10)


def _rest(
    jacobian: AbstractJacobian,
    gram: AbstractGramSolve,
    left: Float[Array, " n"],
    of: Tangent,
) -> Tangent:
    """J†·left, unless `left` is nothing but the rounding errors of J·of."""
    eps = jnp.finfo(left.dtype).eps
    tol = jax.lax.stop_gradient(2 * eps * jnp.sqrt(gram.trace()) * _tree.norm(of))
    return _conjugate_gradients(jacobian, gram, left, tol)


class _State(eqx.Module):
    lifted: Tangent
    left: Float[Array, " n"]
    direction: Float[Array, " n"]
    size: Scalar
    num_steps: Int[Array, ""]


@eqx.filter_custom_jvp
def _conjugate_gradients(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, left: Float[Array, " n"], tol: Scalar
) -> Tangent:
    """J†·left by conjugate gradients on J Jᵀ, the Gram solve as preconditioner."""

    def is_going(state: _State) -> Flag:
        return (jnp.linalg.norm(state.left) > tol) & (state.num_steps < _MAX_ITERATIONS)

    def step(state: _State) -> _State:
        preconditioned = gram.solve(state.left)
        size = jnp.vdot(state.left, preconditioned)
        direction = preconditioned + size / state.size * state.direction
        change = jacobian.transpose_mv(direction)
        curvature = _tree.inner(change, change)
        length = size / jnp.where(curvature > 0, curvature, 1)
        return _State(
            _tree.add(state.lifted, _tree.scale(length, change)),
            state.left - length * jacobian.mv(change),
            direction,
            size,
            state.num_steps + 1,
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jacobian.in_structure())
    first = _State(
        zeros, left, jnp.zeros_like(left), jnp.asarray(jnp.inf, left.dtype), jnp.asarray(0)
    )
    return jax.lax.while_loop(is_going, step, first).lifted


@_conjugate_gradients.def_jvp
def _conjugate_gradients_jvp(primals: Any, tangents: Any) -> tuple[Tangent, Tangent]:
    """The derivative of one more application, which the iteration only refines."""

    def once(jacobian: AbstractJacobian, gram: AbstractGramSolve, left: Array) -> Tangent:
        return jacobian.transpose_mv(gram.solve(left))

    _, change = eqx.filter_jvp(once, primals[:3], tangents[:3])
    return _conjugate_gradients(*primals), change
