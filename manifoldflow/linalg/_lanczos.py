"""The upper end of a spectrum by products alone: band Lanczos with thick restarts.

Every new vector is made orthogonal to all that are kept, twice. So the matrix on the basis is right
to rounding and no eigenvalue comes back as a ghost. The band is one vector wider than the number of
eigenvalues wanted. So neither a start that is orthogonal to one of them nor a multiple eigenvalue
hides any.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from manifoldflow import _precision, _tree
from manifoldflow._types import Scalar
from manifoldflow.linalg._lapack import eigh

# The basis takes this many numbers, within these bounds for its length. Each _SHORTEST steps
# it is seen whether they were enough.
_MEMORY, _SHORTEST, _LONGEST = 2**22, 32, 160

Vector = Float[Array, " D"]


def target(eps: float, values: Float[Array, " n"], scale: Scalar) -> Float[Array, " n"]:
    """The residual at which an eigenvalue of an operator of size `scale` is good enough.

    Relative to the eigenvalue down to what products can tell: their rounding is that of the
    largest one.
    """
    return jnp.maximum(eps**0.6 * jnp.abs(values), eps**0.75 * scale)


class _Basis(eqx.Module):
    vectors: Float[Array, "n D"]  # orthonormal; zero where there was no further direction
    matrix: Float[Array, "n n"]  # ⟨vᵢ, A vⱼ⟩, for i ≤ j
    first: Int[Array, ""]  # the next vector to be made
    scale: Scalar  # the largest ‖A v‖ or |λ| so far
    error: Scalar  # the largest residual against its target
    num_products: Int[Array, ""]


def _ritz(basis: _Basis, count: Int[Array, ""]) -> tuple[Array, Array]:
    """Eigenvalues of the matrix on the first `count` vectors, descending, and eigenvectors."""
    upper = jnp.triu(basis.matrix)
    is_there = (jnp.arange(len(upper)) < count) & jnp.any(basis.vectors != 0, axis=1)
    matrix = jnp.where(is_there[:, None] & is_there, upper + jnp.triu(upper, 1).T, 0)
    # Places without a vector go to the lower end.
    below = 1.1 * jnp.linalg.norm(matrix)
    below = jnp.where(below > 0, below, 1)
    values, rotations = eigh(matrix - jnp.diag(jnp.where(is_there, 0, below)))
    return values[::-1], rotations[:, ::-1]


def lanczos(
    product: Callable[[Vector], Vector],
    project: Callable[[Vector], Vector],
    like: Vector,
    num: int,
    *,
    dimension: int,
    eps: float,
    max_steps: int,
) -> tuple[Float[Array, "num D"], Scalar, Int[Array, ""]]:
    """Unit vectors for the largest eigenvalues, the size of A, and the products it took.

    Args:
        product: v ↦ Av for vectors of an invariant subspace.
        project: the orthogonal projection on it.
        like: a vector of that shape and dtype.
        num: the number of vectors.
        dimension: of the subspace, at least `num`.
        eps: the rounding error of products.
        max_steps: products, rounded up to a whole cycle between two restarts.
    """
    band = min(num + 1, dimension)
    length = min(dimension, max(_SHORTEST, min(_LONGEST, _MEMORY // like.size)))
    # Whole bands throughout, since residuals are read from the last one.
    length = band * max(3, -(-length // band))
    kept = band * max(1, length // (3 * band))
    stride = band * max(1, _SHORTEST // band)

    def grown(index: Int[Array, ""], basis: _Basis) -> _Basis:
        """The basis with one more vector, and one more column of the matrix."""
        source = index - band
        # At random: a start that is normal to an eigenvector would never find it. One key for
        # all, so that the same operator has the same eigenvalues to the last bit.
        drawn = jr.normal(jr.fold_in(jr.key(0), index), like.shape, like.dtype)
        image = product(basis.vectors[jnp.maximum(source, 0)])
        vector = jnp.where(source < 0, drawn, image)
        size = jnp.linalg.norm(vector)
        scale = jnp.where(source < 0, basis.scale, jnp.maximum(basis.scale, size))
        column = jnp.zeros(len(basis.vectors), like.dtype)
        # Twice is enough. Between the two the products' rounding goes back to the subspace.
        for then in (project, lambda v: v):
            parts = _precision.matmul(basis.vectors, vector)
            vector = then(vector - _precision.matmul(parts, basis.vectors))
            column = column + parts
        left = jnp.linalg.norm(vector)
        # What is left of a product in an invariant subspace is rounding and no direction.
        floor = jnp.where(source < 0, eps**0.75 * size, 0.1 * eps**0.75 * scale)
        is_new = left > floor
        unit = jnp.where(is_new, vector / jnp.where(is_new, left, 1), 0)
        column = column.at[index].set(jnp.where(is_new, left, 0))
        # The first vectors are drawn: they belong to no column.
        column = jnp.where(source < 0, basis.matrix[:, 0], column)
        return _Basis(
            basis.vectors.at[index].set(unit),
            basis.matrix.at[:, jnp.maximum(source, 0)].set(column),
            basis.first,
            scale,
            basis.error,
            basis.num_products + (source >= 0),
        )

    def cycle(basis: _Basis) -> _Basis:
        stop = jnp.minimum(basis.first + stride, length + band)
        basis = jax.lax.fori_loop(basis.first, stop, grown, basis)
        values, rotations = _ritz(basis, stop - band)
        # What A makes of a Ritz vector leaves the basis through its last band only.
        beyond = jax.lax.dynamic_slice_in_dim(basis.matrix, stop - band, band)
        outside = _precision.matmul(beyond, rotations[:, :num])
        scale = jnp.maximum(basis.scale, jnp.max(jnp.abs(values[:num])))
        allowed = jnp.where(scale > 0, target(eps, values[:num], scale), 1)
        error = jnp.max(jnp.linalg.norm(outside, axis=0) / allowed)
        basis = eqx.tree_at(lambda b: (b.first, b.scale, b.error), basis, (stop, scale, error))
        is_last = (stop == length + band) | ~is_going(basis)
        return _tree.where(is_last, restarted(basis, values, rotations, stop), basis)

    def restarted(basis: _Basis, values: Array, rotations: Array, stop: Int[Array, ""]) -> _Basis:
        """The basis with the best Ritz vectors, and the last band, in place of all vectors."""
        vectors = _precision.matmul(rotations[:, :kept].T, basis.vectors)
        # Ritz vectors have length one, or zero where there was no further direction.
        is_there = jnp.linalg.norm(vectors, axis=1) > 0.5
        vectors = jnp.where(is_there[:, None], vectors, 0)
        values = jnp.where(is_there, values[:kept], 0)
        following = jax.lax.dynamic_slice_in_dim(basis.vectors, stop - band, band)
        blank = jnp.zeros((length - kept, like.size), like.dtype)
        matrix = jnp.zeros_like(basis.matrix).at[jnp.arange(kept), jnp.arange(kept)].set(values)
        return eqx.tree_at(
            lambda b: (b.vectors, b.matrix, b.first),
            basis,
            (jnp.concatenate([vectors, following, blank]), matrix, jnp.asarray(kept + band)),
        )

    def is_going(basis: _Basis) -> Array:
        # Half of the target: the verdict in the end takes residuals by products anew, with their
        # rounding.
        return (basis.error > 0.5) & (basis.num_products < max_steps)

    start = _Basis(
        jnp.zeros((length + band, like.size), like.dtype),
        jnp.zeros((length + band, length + band), like.dtype),
        jnp.asarray(0),
        jnp.zeros((), like.dtype),
        jnp.asarray(jnp.inf, like.dtype),
        jnp.asarray(0),
    )
    end = jax.lax.while_loop(is_going, cycle, start)
    vectors = jax.vmap(project)(end.vectors[:num])
    sizes = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(sizes > 0, sizes, 1), end.scale, end.num_products
