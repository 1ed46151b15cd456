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


class Gradient(NamedTuple):
    """One call of `gradient_of`.

    Attributes:
        loss: L.
        norm_squared: ‖∇L‖².
        of_data: that without the weight decay.
    """

    loss: Scalar
    norm_squared: Scalar
    of_data: Scalar


@eqx.filter_jit
def gradient_of(loss: AbstractExampleLoss, point: Point) -> Gradient:
    """The loss and its gradient, by one pass forwards and one backwards."""
    coordinates, remainder = loss.split(point)
    value, gradient = jax.value_and_grad(lambda x: loss(_tree.join(x, remainder)))(coordinates)
    of_data = gradient
    if loss.weight_decay is not None:
        decay = loss.weight_decay.astype(_tree.dtype_of(coordinates))
        of_data = _tree.subtract(gradient, _tree.scale(decay, coordinates))
    return Gradient(value, _tree.inner(gradient, gradient), _tree.inner(of_data, of_data))


class Samples(NamedTuple):
    """One call of `trace_samples`.

    Attributes:
        squares: unbiased for tr G, of every leaf; (draws, leaves).
        spread: unbiased for the mean of ‖∇ℓᵢ‖² over examples; (draws,).
    """

    squares: Float[Array, "draws leaves"]
    spread: Float[Array, " draws"]


@eqx.filter_jit
def trace_samples(loss: AbstractExampleLoss, point: Point, keys: Key, num_examples: int) -> Samples:
    """Unbiased samples of traces: each from so many random examples, by two passes backwards.

    For signs ε, independent of each other, E‖Jᵀ√W ε‖² = tr G: what labels drawn from the model do
    where W is their Fisher matrix. And E‖Σᵢ εᵢ∇ℓᵢ‖² = Σᵢ‖∇ℓᵢ‖².
    """

    def sample(key: Key) -> tuple[Array, Scalar]:
        which, first, second = jr.split(key, 3)
        part = _part(loss, which, num_examples)
        coordinates, remainder = part.split(point)
        outputs, pull = jax.vjp(lambda x: part.outputs(_tree.join(x, remainder)), coordinates)
        signs = jr.rademacher(first, outputs.shape, outputs.dtype)
        (drawn,) = pull(_weight_root(part, outputs)(signs))
        slopes = part.output_gradient(outputs, part.targets).astype(outputs.dtype)
        per_example = (num_examples,) + (1,) * (outputs.ndim - 1)
        (flipped,) = pull(slopes * jr.rademacher(second, per_example, outputs.dtype))
        return _leaf_squares(drawn), num_examples * jnp.sum(_leaf_squares(flipped))

    return Samples(*jax.lax.map(sample, keys))


@eqx.filter_jit
def curvature_samples(
    loss: AbstractLoss, point: Point, keys: Key, num_examples: int
) -> Float[Array, " draws"]:
    """Unbiased samples of tr(∇²L − G), less the weight decay; of tr ∇²L for losses without outputs.

    By vᵀAv for random signs v: two derivatives forwards along v, nothing backwards. Each on so
    many random examples.
    """
    coordinates, remainder = loss.split(point)

    def sample(key: Key) -> Scalar:
        which, signs = jr.split(key)
        along = _signs_like(signs, coordinates)
        height = lambda x: loss(_tree.join(x, remainder))
        if isinstance(loss, AbstractExampleLoss):
            height = _linear_in_outputs(_part(loss, which, num_examples), point)
        slope = lambda x: jax.jvp(height, (x,), (along,))[1]
        return jax.jvp(slope, (coordinates,), (along,))[1]

    return jax.lax.map(sample, keys)


def _part(loss: AbstractExampleLoss, key: Key, num_examples: int) -> AbstractExampleLoss:
    """The loss on so many random examples, unbiased."""
    if num_examples >= loss.num_examples:
        return loss
    return loss.select(jr.choice(key, loss.num_examples, (num_examples,), replace=False))


def _linear_in_outputs(loss: AbstractExampleLoss, point: Point) -> Any:
    """x ↦ ⟨∂L/∂f, f(x)⟩ with the slopes at the point, whose Hessian is ∇²L − G there."""
    _, remainder = loss.split(point)
    outputs = loss.outputs(point)
    slopes = loss.output_gradient(outputs, loss.targets).astype(outputs.dtype)
    return lambda x: _precision.vdot(slopes, loss.outputs(_tree.join(x, remainder)))


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
