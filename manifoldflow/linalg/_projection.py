"""Projections and pseudo-inverses of a Jacobian, from solves with its Gram matrix.

A solve with K = J Jᵀ in floating point is wrong by eps·cond(K). What it leaves is known
exactly in the space of tangents, so applying it again to the rest gains digits that no
better factorisation could: twice in float64. In float32 the factorisation only serves as
a preconditioner for what is still left after that.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._types import Flag, Scalar, Tangent
from manifoldflow.linalg._gram import AbstractGramSolve
from manifoldflow.linalg._operator import AbstractJacobian

# Each iteration gains what one factorisation is accurate to: usually one is enough, ten are
# for conditions near 1/eps, where it is hardly accurate at all.
_REDUCTION = 1e-2
_MAX_ITERATIONS = 10


@checked
def pseudo_inverse_mv(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Float[Array, " n"]
) -> Tangent:
    """J†w = Jᵀ K⁻¹ w, refined."""
    if vector.shape != jacobian.out_structure().shape:
        raise ValueError(
            f"pseudo_inverse_mv: vector must have the shape of the values of the Jacobian, "
            f"{jacobian.out_structure().shape}; got {vector.shape}."
        )
    lifted = jacobian.transpose_mv(gram.solve(vector))
    again = jacobian.transpose_mv(gram.solve(vector - jacobian.mv(lifted)))
    lifted = _tree.add(lifted, again)
    if _is_double(vector.dtype):
        return lifted
    return _tree.add(lifted, _conjugate_gradients(jacobian, gram, vector - jacobian.mv(lifted)))


@checked
def normal_component(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Tangent
) -> Tangent:
    """P⊥v = Jᵀ K⁻¹ J v, refined: I − P⊥ is applied again to what is left."""
    vector = _tree.as_tangent(jacobian.in_structure(), vector)
    remainder = vector
    for _ in range(2):
        multipliers = gram.solve(jacobian.mv(remainder))
        remainder = _tree.subtract(remainder, jacobian.transpose_mv(multipliers))
    if not _is_double(_tree.dtype_of(vector)):
        rest = _conjugate_gradients(jacobian, gram, jacobian.mv(remainder))
        remainder = _tree.subtract(remainder, rest)
    return _tree.subtract(vector, remainder)


def _is_double(dtype: Any) -> bool:
    return bool(jnp.finfo(dtype).eps < 1e-10)


class _State(eqx.Module):
    solution: Float[Array, " n"]
    left: Float[Array, " n"]
    direction: Float[Array, " n"]
    size: Scalar
    num_steps: Int[Array, ""]


@eqx.filter_custom_jvp
def _conjugate_gradients(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, left: Float[Array, " n"]
) -> Tangent:
    """J†·left by conjugate gradients on J Jᵀ, the Gram solve as preconditioner."""

    def mv(vector: Float[Array, " n"]) -> Float[Array, " n"]:
        return jacobian.mv(jacobian.transpose_mv(vector))

    def solve(mv: Callable[[Array], Array], right: Float[Array, " n"]) -> Float[Array, " n"]:
        return _iterate(mv, gram.solve, right)

    # Derivative rules elsewhere call this on tangents, which reverse mode then transposes:
    # it cannot transpose the loop, but knows that of a linear solve.
    return jacobian.transpose_mv(jax.lax.custom_linear_solve(mv, left, solve, symmetric=True))


def _iterate(
    mv: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    right: Float[Array, " n"],
) -> Float[Array, " n"]:
    # Relative to the right side, so that what is solved for depends on nothing else.
    tol = _REDUCTION * jnp.linalg.norm(right)

    def is_going(state: _State) -> Flag:
        return (jnp.linalg.norm(state.left) > tol) & (state.num_steps < _MAX_ITERATIONS)

    def step(state: _State) -> _State:
        preconditioned = precondition(state.left)
        size = jnp.vdot(state.left, preconditioned)
        direction = preconditioned + size / state.size * state.direction
        change = mv(direction)
        curvature = jnp.vdot(direction, change)
        length = size / jnp.where(curvature > 0, curvature, 1)
        return _State(
            state.solution + length * direction,
            state.left - length * change,
            direction,
            size,
            state.num_steps + 1,
        )

    zeros, infinity = jnp.zeros_like(right), jnp.asarray(jnp.inf, right.dtype)
    start = _State(zeros, right, zeros, infinity, jnp.asarray(0))
    return jax.lax.while_loop(is_going, step, start).solution


@_conjugate_gradients.def_jvp
def _conjugate_gradients_jvp(primals: Any, tangents: Any) -> tuple[Tangent, Tangent]:
    """The derivative of one more application, which the iteration only refines."""

    def once(jacobian: AbstractJacobian, gram: AbstractGramSolve, left: Array) -> Tangent:
        return jacobian.transpose_mv(gram.solve(left))

    _, change = eqx.filter_jvp(once, primals, tangents)
    return _conjugate_gradients(*primals), change
