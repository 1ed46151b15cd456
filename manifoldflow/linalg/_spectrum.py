"""Functions of the spectrum of K = J Jᵀ, and their derivatives: ln det K and λ_max(K).

On the zero-loss manifold of a squared loss ln|∇²L|₊ = ln det K + n·ln scale and
λ_max(∇²L) = scale·λ_max(K).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._boundary import checked
from manifoldflow._jit import jit_part
from manifoldflow._types import Scalar, Tangent
from manifoldflow.linalg._eigenvalues import Eigenvalues, judged
from manifoldflow.linalg._lanczos import lanczos
from manifoldflow.linalg._lapack import cho_solve, cholesky, eigh
from manifoldflow.linalg.jacobian import AbstractJacobian

# The number of rows up to which the Gram matrix is as cheap as the first products.
_DENSE = 20
_MAX_STEPS = 10_000


@checked
@jit_part
def gram_log_determinant(jacobian: AbstractJacobian) -> Scalar:
    """The logarithm ln det(JJᵀ), with derivative tr(K⁻¹·dK).

    It is −inf, with an infinite or undefined derivative, where J loses rank to working precision,
    and NaN where J is not finite.
    For a constant lower rank use `log_pseudo_determinant(jacobian.gram())`.

    Args:
        jacobian: J, (n, D).

    Returns:
        A scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[3.0, 0.0], [0.0, 2.0]])
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows)
        >>> print(f"{linalg.gram_log_determinant(jacobian):.4f}")  # ln 36
        3.5835
    """
    return _log_determinant(jacobian.gram())


@jax.custom_jvp
def _log_determinant(matrix: Float[Array, "n n"]) -> Scalar:
    # The transpose of a symmetric matrix is for its layout, see `_gram._cholesky`.
    factor = cholesky(matrix.T)
    value = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    # The factor of a matrix that is not finite tells nothing: it may be NaN as where rank is lost.
    return jnp.where(jnp.all(jnp.isfinite(matrix)), value, jnp.nan)


@_log_determinant.defjvp
def _log_determinant_jvp(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    (matrix,), (change,) = primals, tangents
    inverse = _inverse(matrix)
    return _log_determinant(matrix), jnp.sum(inverse * change)


# Solves by `one_by_one` have no reverse mode of their own.
@jax.custom_jvp
def _inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return cho_solve(cholesky(matrix.T), jnp.eye(len(matrix), dtype=matrix.dtype))


@_inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    inverse = _inverse(matrix)
    inner = _precision.matmul(change, inverse)
    return inverse, -_precision.matmul(inverse, inner)


@checked
@jit_part
def gram_largest_eigenvalue(jacobian: AbstractJacobian) -> Scalar:
    """The largest eigenvalue λ_max(JJᵀ), by products with J and Jᵀ alone.

    It has derivatives of any order as long as it is simple. At a crossing of the two largest λ_max
    has no derivative, and the one of either is returned.

    Args:
        jacobian: J, (n, D).

    Returns:
        A scalar; NaN where it was not found to tolerance.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> rows = jnp.array([[3.0, 0.0], [0.0, 2.0]])
        >>> jacobian = linalg.dense_jacobian(jnp.dot, jnp.zeros(2), rows)
        >>> print(linalg.gram_largest_eigenvalue(jacobian).round(4))
        9.0
    """
    return _largest_eigenvalue(jacobian)


@eqx.filter_custom_jvp
def _largest_eigenvalue(jacobian: AbstractJacobian) -> Scalar:
    return _norm_squared(jacobian.transpose_mv(_top_eigenvector(jacobian)))


@_largest_eigenvalue.def_jvp
def _largest_eigenvalue_jvp(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    # dλ = uᵀ·dK·u: the change of u does not count.
    (jacobian,), (change,) = primals, tangents
    vector = _top_eigenvector(jacobian)
    return eqx.filter_jvp(lambda j: _norm_squared(j.transpose_mv(vector)), (jacobian,), (change,))


def _norm_squared(vector: Tangent) -> Scalar:
    return _tree.inner(vector, vector)


@checked
@jit_part
def gram_largest_eigenvalue_with_info(jacobian: AbstractJacobian) -> tuple[Scalar, Eigenvalues]:
    """The value of `gram_largest_eigenvalue`, with residual and result; differentiable once.

    Args:
        jacobian: J, (n, D).

    Returns:
        (λ_max, `Eigenvalues`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(
        ...     jnp.dot, jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 2.0]])
        ... )
        >>> value, info = linalg.gram_largest_eigenvalue_with_info(jacobian)
        >>> print(value.round(4), bool(info.is_successful))
        9.0 True
    """
    is_array = eqx.is_inexact_array
    fixed = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if is_array(x) else x, jacobian)
    vector, found = _top(fixed)
    return _norm_squared(jacobian.transpose_mv(vector)), found


@checked
@jit_part
def gram_top_eigenvector(jacobian: AbstractJacobian) -> Float[Array, " n"]:
    """The unit eigenvector of JJᵀ with the largest eigenvalue; its sign is arbitrary.

    Args:
        jacobian: J, (n, D).

    Returns:
        (n,); NaN where it was not found to tolerance. `gram_largest_eigenvalue_with_info` tells how
        far it got.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> jacobian = linalg.dense_jacobian(
        ...     jnp.dot, jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 2.0]])
        ... )
        >>> print(abs(linalg.gram_top_eigenvector(jacobian)).round(4))
        [1. 0.]
    """
    return _top_eigenvector(jacobian)


@eqx.filter_custom_jvp
def _top_eigenvector(jacobian: AbstractJacobian) -> Float[Array, " n"]:
    return _top(jacobian)[0]


def _top(jacobian: AbstractJacobian) -> tuple[Float[Array, " n"], Eigenvalues]:
    structure = jacobian.out_structure()
    num_rows = structure.shape[0]
    eps = _tree.eps_of((jacobian.in_structure(), structure))
    mv = lambda w: jacobian.mv(jacobian.transpose_mv(w))
    if num_rows <= _DENSE:
        values, vectors = eigh(jacobian.gram())
        vector, scale, num_steps = vectors[:, -1], values[-1], num_rows
    else:
        vectors, scale, num_steps = lanczos(
            mv,
            lambda w: w,
            jnp.zeros(structure.shape, structure.dtype),
            1,
            dimension=num_rows,
            eps=eps,
            max_steps=_MAX_STEPS,
        )
        vector = vectors[0]
    image = mv(vector)
    value = _precision.vdot(vector, image)
    found = judged(value[None], (image - value * vector)[None], scale, num_steps + 1, eps)
    # By a product, so that derivatives are NaN as well.
    return vector * jnp.where(found.is_successful, 1, jnp.nan).astype(vector.dtype), found


@_top_eigenvector.def_jvp
def _top_eigenvector_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The derivative du = (λ − K)†·dK·u, by conjugate gradients on the complement of u."""
    (jacobian,), (change,) = primals, tangents
    vector = _top_eigenvector(jacobian)
    product = lambda j: j.mv(j.transpose_mv(vector))
    image, image_dot = eqx.filter_jvp(product, (jacobian,), (change,))
    eigenvalue = _precision.vdot(vector, image)

    def mv(w: Float[Array, " n"]) -> Float[Array, " n"]:
        # On u itself the operator is λ, so that it is positive definite on everything.
        alone = eigenvalue * _precision.vdot(vector, w) * vector
        return eigenvalue * w - jacobian.mv(jacobian.transpose_mv(w)) + alone

    rhs = image_dot - _precision.vdot(vector, image_dot) * vector
    structure = jax.ShapeDtypeStruct(rhs.shape, rhs.dtype)
    operator = lx.FunctionLinearOperator(mv, structure, lx.positive_semidefinite_tag)
    eps = _precision.eps_of_dtype(rhs)
    # No absolute tolerance: a derivative may come in any units.
    solver = lx.CG(rtol=10 * eps, atol=0.0, max_steps=10 * len(rhs))
    return vector, lx.linear_solve(operator, rhs, solver, throw=False).value
