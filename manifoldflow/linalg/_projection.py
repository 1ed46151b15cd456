"""Projections and pseudo-inverses of a Jacobian, from solves with its Gram matrix.

A solve with K = J Jᵀ in floating point is wrong by eps·cond(K). What it leaves is known
exactly by products with J and Jᵀ, so corrections and conjugate gradients with the factorisation as
preconditioner gain digits that no better factorisation could: two iterations in float64, two
to ten in float32, whose factorisation hardly has a correct digit at conditions near 1/eps.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Flag, Scalar, Tangent
from manifoldflow.linalg._gram import AbstractGramSolve
from manifoldflow.linalg.jacobian import AbstractJacobian

# Conjugate gradients in float32 take two to ten, plain corrections in float64 two.
_MAX_ITERATIONS = 12
_NUM_PLAIN = 3
_LONGEST = 30  # the longest step that is believed, in units of what the factor foresees


@checked
@jit_part
def pseudo_inverse_mv(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Float[Array, " n"]
) -> Tangent:
    """The tangent J†w = JᵀK⁻¹w, refined to rounding.

    Args:
        jacobian: J, (n, D).
        gram: prepared solves with K = JJᵀ, for example `DenseGram()(jacobian)`.
        vector: w, (n,), in the range of J.

    Returns:
        A tangent, the shortest v with Jv = w.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> gram = linalg.DenseGram()(jacobian)
        >>> print(linalg.pseudo_inverse_mv(jacobian, gram, jnp.array([25.0])).round(4))
        [3. 4.]
    """
    return jacobian.transpose_mv(refined_solve(jacobian, gram, vector))


@checked
@jit_part
def tangent_component(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Tangent
) -> Tangent:
    """The tangent part Pv = v − JᵀK⁻¹Jv of a vector, with P applied again to what is left.

    Pv is tangent to rounding of itself, however much longer v is.

    Args:
        jacobian: J, (n, D).
        gram: prepared solves with K = JJᵀ.
        vector: v, a PyTree like the coordinates.

    Returns:
        A tangent with J(Pv) = 0.

    Raises:
        ValueError: a vector of another structure.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> gram = linalg.DenseGram()(jacobian)
        >>> print(linalg.tangent_component(jacobian, gram, jnp.array([7.0, 1.0])).round(4))
        [ 4. -3.]
    """
    vector = _tree.as_tangent(jacobian.in_structure(), vector)

    def again(remainder: Tangent, inverse: Callable[[Array], Array]) -> Tangent:
        return _tree.subtract(remainder, jacobian.transpose_mv(inverse(jacobian.mv(remainder))))

    if _precision.is_double(_tree.dtype_of(vector)):
        # A loop, so that the program holds one copy of the solve.
        return jax.lax.fori_loop(0, 2, lambda _, left: again(left, gram.solve), vector)
    # What a plain solve leaves in single precision takes more than another one.
    return again(again(vector, gram.solve), lambda value: refined_solve(jacobian, gram, value))


@checked
def normal_component(
    jacobian: AbstractJacobian, gram: AbstractGramSolve, vector: Tangent
) -> Tangent:
    """The normal part P⊥v = JᵀK⁻¹Jv of a vector, which `tangent_component` takes away.

    Args:
        jacobian: J, (n, D).
        gram: prepared solves with K = JJᵀ.
        vector: v, a PyTree like the coordinates.

    Returns:
        A tangent in the span of the rows of J.

    Raises:
        ValueError: a vector of another structure.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> gram = linalg.DenseGram()(jacobian)
        >>> print(linalg.normal_component(jacobian, gram, jnp.array([7.0, 1.0])).round(4))
        [3. 4.]
    """
    vector = _tree.as_tangent(jacobian.in_structure(), vector)
    return _tree.subtract(vector, tangent_component(jacobian, gram, vector))


@checked
@jit_part
def refined_solve(
    jacobian: AbstractJacobian,
    gram: AbstractGramSolve,
    vector: Float[Array, " n"],
    damping: Scalar | None = None,
) -> Float[Array, " n"]:
    """The solution K⁻¹w, by repeated solves with the factorisation until only rounding is left.

    Args:
        jacobian: J, (n, D).
        gram: solves with K, or with K + damping·diag(K) if a damping is given.
        vector: w, (n,), in the range of J.
        damping: ≥ 0, relative to the diagonal of K; None for 0.

    Returns:
        (n,).

    Raises:
        ValueError: a vector of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), jnp.array([[3.0, 4.0]]))
        >>> print(
        ...     linalg.refined_solve(
        ...         jacobian, linalg.DenseGram()(jacobian), jnp.array([50.0])
        ...     ).round(4)
        ... )
        [2.]
    """
    if vector.shape != jacobian.out_structure().shape:
        raise ValueError(
            f"refined_solve: vector must have the shape of the values of the Jacobian, "
            f"{jacobian.out_structure().shape}; got {vector.shape}."
        )

    shift = None if damping is None else damping * gram.row_norms_squared()

    def mv(vector: Float[Array, " n"]) -> Float[Array, " n"]:
        product = jacobian.mv(jacobian.transpose_mv(vector))
        return product if shift is None else product + shift * vector

    def solve(mv: Callable[[Array], Array], right: Float[Array, " n"]) -> Float[Array, " n"]:
        # In units of the right side: in float32 the squares of small ones are zero.
        size = jnp.max(jnp.abs(gram.row_scale * right))
        unit = right / _tree.where(size == 0, 1, size)
        return size * _refined(mv, gram, unit)

    # Reverse mode cannot transpose the loop, but knows the transpose of a linear solve.
    return jax.lax.custom_linear_solve(mv, vector, solve, symmetric=True)


class _State(eqx.Module):
    solution: Float[Array, " n"]
    left: Float[Array, " n"]
    direction: Float[Array, " n"]
    size: Scalar
    best: Float[Array, " n"]
    least: Scalar  # ‖left‖ of the best
    is_plain: Flag
    num_idle: Int[Array, ""]
    num_steps: Int[Array, ""]


def _refined(
    mv: Callable[[Array], Array], gram: AbstractGramSolve, right: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The solution once what is left is rounding, or no longer falls, in rows of length one.

    In float64 by plain corrections: their weights 1 − (μ/(λ + μ))ᵏ leave alone what lies below the
    shift μ of the factorisation, so that a vector field stays smooth where J loses rank. In float32
    by conjugate gradients; but a right side that is partly out of the reach of J (equations that
    depend on each other, away from the manifold) leads them astray, since the factorisation
    magnifies that part without end: then by plain corrections as well, which J sees nothing of it
    in.
    """
    eps = _precision.eps_of_dtype(right)
    norm_of = lambda left: _tree.norm(gram.row_scale * left)
    target = 4 * eps * norm_of(right)  # a few roundings

    def is_going(state: _State) -> Flag:
        is_useful = (state.least > target) & (state.num_idle < 2) & (state.size > 0)
        limit = _tree.where(state.is_plain, _NUM_PLAIN, _MAX_ITERATIONS)
        return is_useful & (state.num_steps < limit)

    def step(state: _State) -> _State:
        preconditioned = gram.solve(state.left)
        size = _tree.inner(state.left, preconditioned)
        turn = _tree.where(state.is_plain, 0, size / state.size)
        direction = preconditioned + turn * state.direction
        change = mv(direction)
        # Steps of conjugate gradients have about length one, or the direction is not seen.
        curvature = _tree.inner(direction, change)
        is_seen = (_LONGEST * curvature > size) & ~state.is_plain
        # A direction that was mixed with others must not be followed blindly.
        is_first = state.num_steps == 0
        plain = _tree.where(state.is_plain | is_first, 1, jnp.zeros_like(size))
        length = _tree.where(is_seen, size / curvature, plain)
        solution, left = state.solution + length * direction, state.left - length * change
        norm = norm_of(left)
        # Plain corrections count as better each time: they are few, and never idle.
        is_better = (norm < state.least) | ~is_seen | is_first
        is_idle = ~(norm < 0.9 * state.least) & is_seen
        return _State(
            solution,
            left,
            direction,
            size,
            _tree.where(is_better, solution, state.best),
            _tree.where(is_better, norm, state.least),
            ~is_seen,
            _tree.where(is_idle, state.num_idle + 1, 0),
            state.num_steps + 1,
        )

    # An infinite size before the first step: its direction then has no part of an earlier one.
    zeros, infinity = jnp.zeros_like(right), jnp.asarray(jnp.inf, right.dtype)
    zero, is_plain = jnp.asarray(0), jnp.asarray(eps < 1e-10)
    start = _State(zeros, right, zeros, infinity, zeros, infinity, is_plain, zero, zero)
    return jax.lax.while_loop(is_going, step, start).best
