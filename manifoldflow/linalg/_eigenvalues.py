"""The largest and smallest eigenvalues of self-adjoint operators between PyTrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count
from manifoldflow._types import Scalar
from manifoldflow.linalg._lapack import eigh

# Up to this size a dense eigendecomposition is as cheap as the first products.
_DENSE = 64


@checked
def largest_eigenvalues(
    operator: lx.AbstractLinearOperator,
    num: int = 1,
    *,
    within: Callable[[PyTree[Any]], PyTree[Any]] | None = None,
    codimension: int = 0,
) -> Float[Array, " num"]:
    """The algebraically largest eigenvalues of a self-adjoint operator, descending.

    By LOBPCG from random vectors, or a dense decomposition up to 64 dimensions.
    Differentiable once in all that the operator holds, by dλ = ⟨v, dA v⟩, where the
    eigenvalue is simple; at a crossing the derivative of one of the branches.

    Args:
        operator: A, self-adjoint on a space of PyTrees; by products alone.
        num: how many.
        within: the orthogonal projection on an invariant subspace, e.g. the tangent space
            of a manifold: its eigenvalues only.
        codimension: of that subspace.

    Raises:
        ValueError: more eigenvalues than dimensions, or than a fifth of more than 64.
    """
    structure = operator.in_structure()
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
    flat, unravel = _tree.ravel(zeros)
    num = checked_count("num", num)
    if num > flat.size - codimension:
        raise ValueError(
            f"A space of dimension {flat.size - codimension} has no {num} eigenvalues."
        )
    if flat.size > _DENSE and 5 * num >= flat.size:
        raise ValueError(
            f"LOBPCG finds fewer than a fifth of the {flat.size} eigenvalues; got num={num}. "
            "For more take numpy.linalg.eigh of operator.as_matrix()."
        )
    project = (lambda x: x) if within is None else within

    def mv(vector: Float[Array, " D"]) -> Float[Array, " D"]:
        return _tree.ravel(project(operator.mv(project(unravel(vector)))))[0]

    if flat.size <= _DENSE:
        vectors = _dense(mv, unravel, project, flat, num)
    else:
        vectors = _lobpcg(mv, unravel, project, flat, num)
    vectors = jax.lax.stop_gradient(vectors)
    return jax.vmap(lambda v: jnp.vdot(v, mv(v), precision=jax.lax.Precision.HIGHEST))(vectors)


@checked
def smallest_eigenvalues(
    operator: lx.AbstractLinearOperator,
    num: int = 1,
    *,
    within: Callable[[PyTree[Any]], PyTree[Any]] | None = None,
    codimension: int = 0,
) -> Float[Array, " num"]:
    """The algebraically smallest eigenvalues, ascending; else as `largest_eigenvalues`."""
    return -largest_eigenvalues(-operator, num, within=within, codimension=codimension)


def _dense(mv: Any, unravel: Any, project: Any, like: Array, num: int) -> Float[Array, "num D"]:
    eye = jnp.eye(like.size, dtype=like.dtype)
    matrix = jax.lax.stop_gradient(jax.vmap(mv)(eye))
    projector = jax.lax.stop_gradient(jax.vmap(lambda e: _tree.ravel(project(unravel(e)))[0])(eye))
    # What is projected away goes to the other end of the spectrum.
    shift = 1 + 2 * jnp.linalg.norm(matrix)
    shifted = (matrix + matrix.T) / 2 - shift * (eye - (projector + projector.T) / 2)
    return eigh(shifted)[1][:, ::-1][:, :num].T


def _lobpcg(mv: Any, unravel: Any, project: Any, like: Array, num: int) -> Float[Array, "num D"]:
    # Here, since it would be a tenth of the time that `import manifoldflow` takes.
    from jax.experimental.sparse.linalg import lobpcg_standard

    block = min(num + 3, (like.size - 1) // 5)
    starts = jr.normal(jr.key(0), (block, like.size), like.dtype)
    starts = jax.vmap(lambda v: _tree.ravel(project(unravel(v)))[0])(starts)
    mv_fixed = lambda v: jax.lax.stop_gradient(mv(v))
    # LOBPCG looks for the largest of a positive operator in units of it: bring A there.
    bound = _norm_bound(mv_fixed, starts[0])
    products = lambda x: (jax.vmap(mv_fixed, 1, 1)(x) / bound + x) / 2
    _, vectors, _ = lobpcg_standard(products, starts.T, m=300)
    vectors = jax.vmap(lambda v: _tree.ravel(project(unravel(v)))[0])(vectors[:, :num].T)
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)


def _norm_bound(mv: Any, start: Float[Array, " D"]) -> Scalar:
    """Some more than |λ|_max, by power iteration."""

    def step(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        vector = mv(state[0])
        size = jnp.linalg.norm(vector)
        return vector / jnp.where(size > 0, size, 1), size

    unit, zero = start / jnp.linalg.norm(start), jnp.zeros((), start.dtype)
    _, size = jax.lax.fori_loop(0, 20, step, (unit, zero))
    return 1.5 * jnp.where(size > 0, size, 1)


@checked
def effective_rank(eigenvalues: Float[Array, " n"]) -> Scalar:
    """exp of the entropy of λᵢ/Σλ: between 1 and the number of eigenvalues that are not zero.

    Args:
        eigenvalues: of a positive semidefinite operator; rounding below zero counts as zero.

    References:
        Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = jnp.maximum(eigenvalues, 0)
    shares = values / jnp.sum(values)
    positive = shares > 0
    logs = jnp.where(positive, jnp.log(jnp.where(positive, shares, 1)), 0)
    return jnp.exp(-jnp.sum(shares * logs))
