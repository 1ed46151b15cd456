"""Functions of the spectrum of K = J Jᵀ, and their derivatives: ln det K and λ_max(K).

On the zero-loss manifold of a squared loss ln|∇²L|₊ = ln det K + n·ln scale and
λ_max(∇²L) = scale·λ_max(K).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._types import Scalar, Tangent
from manifoldflow.linalg._lapack import cho_solve, cholesky, eigh
from manifoldflow.linalg._operator import AbstractJacobian

_HIGHEST = jax.lax.Precision.HIGHEST

# LOBPCG needs more than five rows for each vector that it iterates on.
_BLOCK = 4


@checked
def gram_log_determinant(jacobian: AbstractJacobian) -> Scalar:
    """ln det(J Jᵀ), with derivative tr(K⁻¹·dK).

    −inf, with an infinite or undefined derivative, where J loses rank to working precision;
    `log_pseudo_determinant(jacobian.gram())` is for a constant lower rank.
    """
    return _log_determinant(jacobian.gram())


@jax.custom_jvp
def _log_determinant(matrix: Float[Array, "n n"]) -> Scalar:
    factor = cholesky(matrix.T)
    value = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


@_log_determinant.defjvp
def _log_determinant_jvp(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    (matrix,), (change,) = primals, tangents
    inverse = _inverse(matrix)
    return _log_determinant(matrix), jnp.sum(inverse * change)


@jax.custom_jvp
def _inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return cho_solve(cholesky(matrix.T), jnp.eye(len(matrix), dtype=matrix.dtype))


@_inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    inverse = _inverse(matrix)
    inner = jnp.matmul(change, inverse, precision=_HIGHEST)
    return inverse, -jnp.matmul(inverse, inner, precision=_HIGHEST)


@eqx.filter_custom_jvp
def gram_largest_eigenvalue(jacobian: AbstractJacobian) -> Scalar:
    """λ_max(J Jᵀ), by products with J and Jᵀ alone.

    Derivatives to any order, as long as the eigenvalue is simple: at a crossing of the two
    largest λ_max has no derivative, and the one of either is returned.
    """
    return _norm_squared(jacobian.transpose_mv(gram_top_eigenvector(jacobian)))


@gram_largest_eigenvalue.def_jvp
def _largest_eigenvalue_jvp(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    # dλ = uᵀ·dK·u: the change of u does not count.
    (jacobian,), (change,) = primals, tangents
    vector = gram_top_eigenvector(jacobian)
    return eqx.filter_jvp(lambda j: _norm_squared(j.transpose_mv(vector)), (jacobian,), (change,))


def _norm_squared(vector: Tangent) -> Scalar:
    return _tree.inner(vector, vector)


@eqx.filter_custom_jvp
def gram_top_eigenvector(jacobian: AbstractJacobian) -> Float[Array, " n"]:
    """The unit eigenvector of J Jᵀ with the largest eigenvalue; its sign is arbitrary."""
    structure = jacobian.out_structure()
    num_rows = structure.shape[0]
    if num_rows <= 5 * _BLOCK:
        return eigh(jacobian.gram())[1][:, -1]
    # Here, since it would be a tenth of the time that `import manifoldflow` takes.
    from jax.experimental.sparse.linalg import lobpcg_standard

    mv = lambda w: jacobian.mv(jacobian.transpose_mv(w))
    # LOBPCG keeps the units of K in its tolerance; give it a matrix of trace one.
    total = jnp.sum(jacobian.row_norms_squared())
    inverse = 1 / jnp.where(total > 0, total, 1)
    start = jr.normal(jr.key(0), (num_rows, _BLOCK), structure.dtype)
    products = jax.vmap(mv, in_axes=1, out_axes=1)
    _, vectors, _ = lobpcg_standard(lambda x: inverse * products(x), start, m=200)
    return vectors[:, 0] / jnp.linalg.norm(vectors[:, 0])


@gram_top_eigenvector.def_jvp
def _top_eigenvector_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """du = (λ − K)†·dK·u, by conjugate gradients on the complement of u."""
    (jacobian,), (change,) = primals, tangents
    vector = gram_top_eigenvector(jacobian)
    product = lambda j: j.mv(j.transpose_mv(vector))
    image, image_dot = eqx.filter_jvp(product, (jacobian,), (change,))
    eigenvalue = jnp.vdot(vector, image)

    def mv(w: Float[Array, " n"]) -> Float[Array, " n"]:
        # On u itself the operator is λ, so that it is positive definite on everything.
        alone = eigenvalue * jnp.vdot(vector, w) * vector
        return eigenvalue * w - jacobian.mv(jacobian.transpose_mv(w)) + alone

    rhs = image_dot - jnp.vdot(vector, image_dot) * vector
    structure = jax.ShapeDtypeStruct(rhs.shape, rhs.dtype)
    operator = lx.FunctionLinearOperator(mv, structure, lx.positive_semidefinite_tag)
    eps = float(jnp.finfo(rhs.dtype).eps)
    solver = lx.CG(rtol=10 * eps, atol=eps**2, max_steps=10 * len(rhs))
    return vector, lx.linear_solve(operator, rhs, solver, throw=False).value
