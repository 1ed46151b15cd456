"""What ordinary passes through a model tell of its loss: traces by random signs, top eigenvalues.

No Jacobian is kept, of whatever the model is made. With f the outputs, J = ∂f and W = ∂²L/∂f²,
the Gauss-Newton matrix is G = JᵀWJ, and the Hessian ∇²L = G + Σⱼ ∂L/∂fⱼ·∇²fⱼ + λ.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _tree, linalg
from manifoldflow._types import Coordinates, Key, Point, Scalar, Tangent
from manifoldflow.losses import (
    AbstractExampleLoss,
    AbstractLoss,
    LeastSquares,
    PerExampleLoss,
    ResidualForm,
)


class Passes(NamedTuple):
    """One call of `passes`.

    Attributes:
        loss: L.
        gradient: ‖∇L‖², of every leaf.
        squares: unbiased for tr G, of every leaf; (draws, leaves).
        spread: unbiased for Σᵢ‖∇ℓᵢ‖²/N², with ∇ℓᵢ/N what one example adds to the mean; (draws,).
        data_gradient: ‖∇L‖² without the weight decay.
    """

    loss: Scalar
    gradient: Float[Array, " leaves"]
    squares: Float[Array, "draws leaves"]
    spread: Float[Array, " draws"]
    data_gradient: Scalar


@eqx.filter_jit
def passes(loss: AbstractExampleLoss, point: Point, keys: Key) -> Passes:
    """The loss, its gradient, and unbiased samples of traces, two backward passes for each.

    For signs ε, independent of each other, E‖Jᵀ√W ε‖² = tr G: what labels drawn from the model do
    where W is their Fisher matrix [LiWangArora2022]. And E‖Σᵢ εᵢ∇ℓᵢ‖² = Σᵢ‖∇ℓᵢ‖².
    """
    coordinates, remainder = loss.split(point)
    outputs, pull = jax.vjp(lambda x: loss.outputs(_tree.join(x, remainder)), coordinates)
    root = _weight_root(loss, outputs)
    slopes = loss.output_gradient(outputs, loss.targets).astype(outputs.dtype)
    per_example = (len(outputs),) + (1,) * (outputs.ndim - 1)

    def sample(key: Key) -> tuple[Array, Scalar]:
        first, second = jr.split(key)
        (drawn,) = pull(root(jr.rademacher(first, outputs.shape, outputs.dtype)))
        (flipped,) = pull(slopes * jr.rademacher(second, per_example, outputs.dtype))
        return _leaf_squares(drawn), jnp.sum(_leaf_squares(flipped))

    squares, spread = jax.lax.map(sample, keys)
    (data_gradient,) = pull(slopes)
    gradient = data_gradient
    if loss.weight_decay is not None:
        decay = loss.weight_decay.astype(_tree.dtype_of(coordinates))
        gradient = _tree.add(gradient, _tree.scale(decay, coordinates))
    return Passes(
        loss(point),
        _leaf_squares(gradient),
        squares,
        spread,
        jnp.sum(_leaf_squares(data_gradient)),
    )


@eqx.filter_jit
def curvature_samples(loss: AbstractLoss, point: Point, keys: Key) -> Float[Array, " draws"]:
    """Unbiased samples of tr(∇²L − G), less the weight decay; of tr ∇²L for losses without outputs.

    By vᵀAv for random signs v: two derivatives forwards along v, nothing backwards.
    """
    coordinates, remainder = loss.split(point)
    if isinstance(loss, AbstractExampleLoss):
        outputs = loss.outputs(point)
        slopes = loss.output_gradient(outputs, loss.targets).astype(outputs.dtype)
        height = lambda x: _precision.vdot(slopes, loss.outputs(_tree.join(x, remainder)))
    else:
        height = lambda x: loss(_tree.join(x, remainder))

    def sample(key: Key) -> Scalar:
        along = _signs_like(key, coordinates)
        slope = lambda x: jax.jvp(height, (x,), (along,))[1]
        return jax.jvp(slope, (coordinates,), (along,))[1]

    return jax.lax.map(sample, keys)


@eqx.filter_jit
def top_eigenvalues(loss: AbstractLoss, point: Point, num: int) -> linalg.Eigenvalues:
    """The largest eigenvalues of G, or of ∇²L where there is no G, by products alone."""
    is_examples = isinstance(loss, AbstractExampleLoss)
    operator = gauss_newton(loss, point) if is_examples else loss.hessian(point)
    return linalg.largest_eigenvalues(operator, num)


def gauss_newton(loss: AbstractExampleLoss, point: Point) -> lx.AbstractLinearOperator:
    """G, by a pass forwards and one backwards a product, whatever the model is made of."""
    coordinates, remainder = loss.split(point)
    outputs, push = jax.linearize(lambda x: loss.outputs(_tree.join(x, remainder)), coordinates)
    pull, root = jax.linear_transpose(push, coordinates), _weight_root(loss, outputs)

    def mv(vector: Tangent) -> Tangent:
        return pull(root(root(push(vector))))[0]

    return lx.FunctionLinearOperator(mv, _tree.structure_of(coordinates), lx.symmetric_tag)


def _weight_root(loss: AbstractExampleLoss, outputs: Array) -> Any:
    """w ↦ √W w on outputs; of a W with negative eigenvalues the root of its positive part."""
    if isinstance(loss, LeastSquares):
        scale = jnp.sqrt(loss.scale.astype(outputs.dtype))
        return lambda weights: scale * weights
    plain = loss.loss if isinstance(loss, ResidualForm) else loss
    assert isinstance(plain, PerExampleLoss)
    values, vectors = jnp.linalg.eigh(plain.output_hessian(outputs, plain.targets))
    scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    roots = _precision.einsum("nij,nkj->nik", scaled, vectors)

    def root(weights: Array) -> Array:
        flat = weights.reshape(roots.shape[:2])
        return _precision.einsum("nij,nj->ni", roots, flat).reshape(weights.shape)

    return root


def _leaf_squares(tree: PyTree[Array]) -> Float[Array, " leaves"]:
    return jnp.stack([_precision.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)])


def _signs_like(key: Key, coordinates: Coordinates) -> Tangent:
    leaves, treedef = jax.tree.flatten(coordinates)
    keys = jr.split(key, len(leaves))
    signs = [jr.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, signs)
