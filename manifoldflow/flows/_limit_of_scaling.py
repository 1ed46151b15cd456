"""The limit of updates that divide by their running second moments: Adam, RMSProp.

A step is −η·s(v)∘g with v ← v + bη(g∘g − v), g of mean ∇L and covariance c∇²L, H = scale·JᵀJ. On
the manifold v = c·diag H; with S = Diag s(v), K = JSJᵀ, Π = 1 − SJᵀK⁻¹J and G_S = ΠS

    Y' = −½c·scale·G_S Σᵢ ∇²rᵢ SJᵢ − Π s'(v)∘diag(HX),   X_{·j} = b(SH + b)⁻¹M∇v_j,
    M = ½c SJᵀK⁻¹JS,

which is the general formula for the iteration of (θ, v). With t_a = SJᵀe_a and the n×n matrix
V = b(scale·K + b)⁻¹ it is diag(HX)_j = ½c·scale Σ_a (JᵀV)_{ja} ∂v_j[t_a]: the second moments lag
behind θ, and see more noise than there is. As b → 0 (second moments that lag by many steps, but by
few of the limit) V vanishes, and what is left is −½G_S∇Σⱼ w(vⱼ) with w' = s/2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Int

from manifoldflow import _tree, linalg
from manifoldflow._types import Coordinates, Point, Tangent
from manifoldflow.flows._oblique import inverse, product
from manifoldflow.flows._own_limit import OwnLimit
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.noise import AbstractNoise
from manifoldflow.updates import AbstractPreconditionedUpdate, Setting


def scaling_limit(
    update: AbstractPreconditionedUpdate,
    setting: Setting,
    manifold: AbstractManifold,
    noise: AbstractNoise,
    point: Point,
) -> OwnLimit:
    """The drift: n Hessian-vector products, and for b > 0 n more of every column of the noise."""
    local, loss = manifold.local(point), manifold.residual_loss
    assert loss is not None and setting.hessian_multiple is not None
    coordinates, remainder = local.coordinates, local.remainder
    dtype = _tree.dtype_of(coordinates)
    strength = (setting.hessian_multiple * loss.scale).astype(dtype)
    jacobian, scale = loss.jacobian(point), loss.scale.astype(dtype)
    rows = lx.IdentityLinearOperator(jacobian.out_structure())

    def moments(x: Coordinates) -> Tangent:
        return second_moments(noise.checked_factor(loss, _tree.join(x, remainder)))

    known = moments(coordinates)
    scaling = jax.tree.map(update.preconditioner, known)
    is_fine = _tree.all_finite(scaling)
    lift = lambda w: _times(scaling, jacobian.transpose_mv(w))  # SJᵀ
    lifted = lx.FunctionLinearOperator(lift, rows.out_structure())
    gram = linalg.columns(jacobian @ lifted)
    # JSJᵀ is symmetric up to rounding; eigenvectors need it to be so exactly.
    back = linalg.pseudo_inverse((gram + gram.T) / 2)

    def project(vector: Tangent) -> Tangent:
        for _ in range(2):  # K⁻¹ has rounding errors
            vector = _tree.subtract(vector, lift(product(back, jacobian.mv(vector))))
        return vector

    bent = linalg.hessian_product_sum(local.constraint, coordinates, rows, lifted)
    total = _times(scaling, bent)
    if update.averaging_rate is not None:
        b = update.averaging_rate.astype(dtype)
        lag = b * inverse(scale * gram + b * jnp.eye(len(gram), dtype=dtype))

        def term(index: Int[Array, ""]) -> Tangent:
            unit = jnp.zeros(len(gram), dtype).at[index].set(1)
            seen = jax.jvp(moments, (coordinates,), (lift(unit),))[1]
            return _times(jacobian.transpose_mv(product(lag, unit)), seen)

        late = linalg.sum_terms(term, len(gram), _together(coordinates))
        slopes = jax.tree.map(lambda v: _slope(update.preconditioner, v), known)
        total = _tree.add(total, _times(slopes, late))
    # Both terms have the factor ½c·scale, see above.
    factor = _tree.where(is_fine, -strength / 2, jnp.nan)
    return OwnLimit(_tree.scale(factor, project(total)), project, is_fine)


def second_moments(factor: lx.AbstractLinearOperator) -> Tangent:
    """The second moments diag F Fᵀ, from the columns of F, a few at a time."""

    def term(index: Int[Array, ""]) -> Tangent:
        return jax.tree.map(jnp.square, linalg.column(factor, index))

    count = _tree.size(factor.in_structure())
    return linalg.sum_terms(term, count, _together(factor.out_structure()))


def _together(tree: Tangent) -> int:
    # Some 2¹⁹ numbers at a time, 4 MB in double precision: all columns at once would be n×D.
    return max(1, 2**19 // _tree.size(tree))


def _times(a: Tangent, b: Tangent) -> Tangent:
    return jax.tree.map(jnp.multiply, a, b)


def _slope(fn: Callable[[Array], Array], values: Array) -> Array:
    """The slope s'(v); 0 where v = 0, as nothing depends on that coordinate to first order."""
    is_seen = values > 0
    at = _tree.where(is_seen, values, 1)
    return _tree.where(is_seen, jax.jvp(fn, (at,), (jnp.ones_like(at),))[1], 0)
