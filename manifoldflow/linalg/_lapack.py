"""Factorisations that may run several at once, also under `vmap`.

On CPUs jaxlib hands the members of a batched LAPACK call to the threads of XLA's pool, and one of
these threads waits for them. Where as many such calls run at once as there are threads, they wait
for ever: two independent ones on two cores. A member by itself waits for nobody.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision
from manifoldflow._boundary import checked
from manifoldflow._errors import described
from manifoldflow._signatures import shown


@shown
def one_by_one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function mapped over the members of a batch one by one on CPUs; without reverse mode.

    On CPUs several batched LAPACK calls at once can wait for each other for ever.

    Args:
        fn: a function of arrays; the first one is a matrix.

    Returns:
        A function of the same arrays, which `vmap` runs in a loop on CPUs.

    Raises:
        ValueError: `fn` is no function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> determinant = linalg.one_by_one(jnp.linalg.det)
        >>> print(jax.vmap(determinant)(jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])).round(4))
        [1. 4.]
    """
    if not callable(fn):
        raise ValueError(f"one_by_one: fn must be a function of arrays; got {described(fn)}.")
    call = jax.custom_batching.custom_vmap(fn)

    @call.def_vmap
    def batched(axis_size: int, in_batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        del axis_size
        axes = tuple(0 if is_batched else None for is_batched in in_batched)

        def loop(*arrays: Array) -> Any:
            mapped = [array for array, axis in zip(arrays, axes) if axis == 0]

            def member(mapped: list[Array]) -> Any:
                rest = iter(mapped)
                return call(*(next(rest) if axis == 0 else a for a, axis in zip(arrays, axes)))

            return jax.lax.map(member, mapped)

        def at_once(*arrays: Array) -> Any:
            return jax.vmap(fn, in_axes=axes)(*arrays)

        # One matrix for all members is one call: the first argument is the matrix.
        if in_batched[0]:
            found = jax.lax.platform_dependent(*arrays, cpu=loop, default=at_once)
        else:
            found = at_once(*arrays)
        return found, jax.tree.map(lambda _: True, found)

    return call


# `one_by_one` has no reverse mode: `eigh` is given its derivatives below.
@one_by_one
def _eigh(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@checked
def eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """The eigenvalues and eigenvectors of a symmetric matrix, safe where several run at once.

    A = V diag(λ) Vᵀ, as `jax.numpy.linalg.eigh` finds it, which under `vmap` can wait for ever on
    CPUs (see `one_by_one`). Derivatives of any order, in both modes:

        λ' = diag(VᵀA'V),   V' = V (F ∘ VᵀA'V),   Fᵢⱼ = 1/(λⱼ − λᵢ), Fᵢᵢ = 0.

    Those of the eigenvectors are inf or NaN where eigenvalues are equal.

    Args:
        matrix: symmetric (n, n).

    Returns:
        (λ, V): the eigenvalues in ascending order, and the eigenvectors as columns; NaN if the
        matrix is not finite.

    Raises:
        ValueError: if it is no square matrix of real numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> values, vectors = linalg.eigh(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> print(values.round(4), (vectors.T @ vectors).round(4).tolist())
        [1. 3.] [[1.0, 0.0], [0.0, 1.0]]
    """
    return _differentiable_eigh(matrix)


@jax.custom_jvp
def _differentiable_eigh(matrix: Array) -> tuple[Array, Array]:
    return _eigh(matrix)


@_differentiable_eigh.defjvp
def _eigh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    values, vectors = _differentiable_eigh(*primals)
    (change,) = tangents
    # `jnp.linalg.eigh` takes the symmetric part of its matrix, so that only that of A' counts.
    symmetric = (change + change.T) / 2
    inside = _precision.matmul(_precision.matmul(vectors.T, symmetric), vectors)
    # 1/1 − 1 on the diagonal, where the gap is 0 and 1/0 times 0 would be NaN.
    one = jnp.eye(len(values), dtype=values.dtype)
    gaps = values[None, :] - values[:, None]
    turn = inside * (1 / (one + gaps) - one)
    return (values, vectors), (jnp.diag(inside), _precision.matmul(vectors, turn))


@one_by_one
def cholesky(matrix: Array) -> Array:
    """The factor L of LLᵀ, by the lower triangle of a matrix; NaN if not positive definite."""
    # Symmetrising would mix in the other triangle, which need not hold numbers of the matrix.
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@one_by_one
def cho_solve(cholesky: Array, right: Array) -> Array:
    """The solution (LLᵀ)⁻¹·right."""
    return jax.scipy.linalg.cho_solve((cholesky, True), right)
