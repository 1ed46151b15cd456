"""The limit of updates that see one example at a time and move along a row made of its gradient.

With rows bᵢ = β(∇rᵢ), gains and squares of the response in diagonal R and C, and G = JBᵀ it is the
rows form, Y' = −Π Σᵢ ∂bᵢ[(BᵀTGᵀR)_{·i}] with R G T + T GᵀR = C. Every row is made of one example:
its derivative costs a Hessian-vector product of that example.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Example, Point, Tangent
from manifoldflow.flows._oblique import inverse, product, stable_lyapunov_solve
from manifoldflow.flows._own_limit import OwnLimit
from manifoldflow.losses import AbstractResidualLoss
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.updates import AbstractRowsUpdate, Setting

FAILURE = (
    "An eigenvalue of RJBᵀ, with J the gradients of the residuals, B the rows that the update "
    "moves along and R its gains, has no positive real part: the update does not lead back to "
    "the manifold. Are there two examples with one gradient, or is the noise 0?"
)


def rows_limit(
    update: AbstractRowsUpdate, setting: Setting, manifold: AbstractManifold, point: Point
) -> OwnLimit:
    """The drift, by n×n matrices; and n×D numbers unless the rows are the gradients."""
    local = manifold.local(point)
    loss, coordinates, remainder = manifold.loss, local.coordinates, local.remainder
    assert isinstance(loss, AbstractResidualLoss)
    jacobian = loss.jacobian(point)
    lengths = jnp.sqrt(jacobian.row_norms_squared())
    # One of N examples at a time: each acts in 1/N of the steps.
    gains, squares = (value / len(lengths) for value in update.response(lengths, setting))
    if update.keeps_gradients:
        coefficients, is_fine = _coefficients(jacobian.gram(), gains, squares)
        turned = linalg.contract_hessians(
            lambda x: loss.jacobian(_tree.join(x, remainder)), coordinates, coefficients
        )
        project = local.space.tangent
    else:
        data = _tree.cast_floats(loss.data, _tree.dtype_of(coordinates))

        def row(x: Coordinates, example: Example) -> Tangent:
            residual = lambda x: loss.example_residual(_tree.join(x, remainder), example)[0]
            return update.row(jax.grad(residual)(x))

        rows = jax.vmap(row, (None, 0))(coordinates, data)
        gram = jax.vmap(jacobian.mv)(rows).T
        coefficients, is_fine = _coefficients(gram, gains, squares)

        def turn(example: Example, tangent: Tangent) -> Tangent:
            return jax.jvp(lambda x: row(x, example), (coordinates,), (tangent,))[1]

        mixed = jax.tree.map(lambda leaf: _precision.tensordot(coefficients.T, leaf, axes=1), rows)
        turned = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), jax.vmap(turn)(data, mixed))
        dense, back = linalg.DenseJacobian(rows), inverse(gram)

        def project(vector: Tangent) -> Tangent:
            lifted = product(back, jacobian.mv(vector))
            return _tree.subtract(vector, dense.transpose_mv(lifted))

    # As a factor, so that derivatives are NaN too where the hypotheses fail.
    sign = _tree.where(is_fine, -jnp.ones((), lengths.dtype), jnp.nan)
    return OwnLimit(_tree.scale(sign, project(turned)), project, is_fine)


def _coefficients(
    gram: Float[Array, "n n"], gains: Float[Array, " n"], squares: Float[Array, " n"]
) -> tuple[Float[Array, "n n"], Array]:
    """The matrix TGᵀR with R G T + T GᵀR = C, and True if RG has Re λ > 0 for all its λ."""
    driven = gains[:, None] * gram
    spread, is_stable = stable_lyapunov_solve(driven, jnp.diag(squares))
    return product(spread, driven.T), is_stable
