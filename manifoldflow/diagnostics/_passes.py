"""Traces by random signs and products with G, from ordinary passes through a model.

No Jacobian is kept, of whatever the model is made. With f the outputs, J = ∂f and W = ∂²L/∂f², the
Gauss-Newton matrix is G = JᵀWJ, and the Hessian ∇²L = G + Σⱼ ∂L/∂fⱼ·∇²fⱼ + λ.

One pass a program, and few programs: they take longer to be compiled than to be run. Python leads
them, since within loops XLA's convolutions on CPUs take some fifteen times as long.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _precision, _tree
from manifoldflow._types import Coordinates, Point, Scalar
from manifoldflow.losses import (
    AbstractExampleLoss,
    AbstractLoss,
    LeastSquares,
    PerExampleLoss,
    ResidualForm,
)

# The number of outputs of an example up to which its matrix W is taken apart.
_MOST_OUTPUTS = 64

Vector = Float[Array, " D"]


class Outputs(NamedTuple):
    """The result of one forward pass.

    Attributes:
        loss: L.
        data_loss: L without the weight decay.
        slopes: ∂L/∂f.
        roots: √W, a matrix an example, or one number; None where there are too many outputs. Of a W
            with negative eigenvalues the root of its positive part.
    """

    loss: Scalar
    data_loss: Scalar
    slopes: Float[Array, "N ..."]
    roots: Float[Array, "..."] | None


@eqx.filter_jit
def outputs_at(loss: AbstractExampleLoss, point: Point) -> Outputs:
    coordinates, _ = loss.split(point)
    outputs = loss.outputs(point)
    value = data_loss = loss(point)
    if loss.weight_decay is not None:
        size = _tree.inner(coordinates, coordinates).astype(value.dtype)
        data_loss = value - loss.weight_decay.astype(value.dtype) / 2 * size
    slopes = loss.output_gradient(outputs, loss.targets).astype(outputs.dtype)
    roots = None
    if isinstance(loss, LeastSquares):
        roots = jnp.sqrt(loss.scale.astype(outputs.dtype))
    elif math.prod(outputs.shape[1:]) <= _MOST_OUTPUTS:
        # One small matrix an example, in one batch: no other factorisation runs beside it.
        values, vectors = jnp.linalg.eigh(_plain(loss).output_hessian(outputs, loss.targets))
        scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
        roots = _precision.einsum("nij,nkj->nik", scaled, vectors)
    return Outputs(value, data_loss, slopes, roots)


@eqx.filter_jit
def pulled(loss: AbstractExampleLoss, point: Point, weights: Float[Array, "N ..."]) -> Vector:
    """Jᵀw: a pass forwards and one backwards."""
    coordinates, remainder = loss.split(point)
    _, pull = jax.vjp(lambda x: loss.outputs(_tree.join(x, remainder)), coordinates)
    return _tree.ravel(pull(weights)[0])[0]


@eqx.filter_jit
def pushed(
    loss: AbstractExampleLoss, point: Point, roots: Array | None, vector: Vector
) -> Float[Array, "N ..."]:
    """WJv: a pass forwards with its derivative."""
    coordinates, remainder = loss.split(point)
    _, unravel = _tree.ravel(coordinates)
    outputs = lambda x: loss.outputs(_tree.join(x, remainder))
    values, moved = jax.jvp(outputs, (coordinates,), (unravel(vector),))
    if roots is not None:
        return _rooted(roots, _rooted(roots, moved))
    slopes = lambda f: _plain(loss).output_gradient(f, loss.targets).astype(f.dtype)
    return jax.jvp(slopes, (values,), (moved,))[1]


@eqx.filter_jit
def hessian_product(loss: AbstractLoss, point: Point, vector: Vector) -> Vector:
    """∇²L v."""
    _, unravel = _tree.ravel(loss.split(point)[0])
    return _tree.ravel(loss.hessian(point).mv(unravel(vector)))[0]


class Sample(NamedTuple):
    """One call of `trace_sample`.

    Attributes:
        squares: unbiased for tr G, of every leaf.
        spread: unbiased for the mean of ‖∇ℓᵢ‖² over examples.
    """

    squares: np.ndarray
    spread: float


def trace_sample(
    loss: AbstractExampleLoss, point: Point, outputs: Outputs, signs: np.random.Generator
) -> Sample:
    """An unbiased sample of traces of a loss, by two passes backwards.

    For signs ε, independent of each other, E‖Jᵀ√W ε‖² = tr G: what labels drawn from the model do
    where W is their Fisher matrix. And E‖Σᵢ εᵢ∇ℓᵢ‖² = Σᵢ‖∇ℓᵢ‖². Where there are too many outputs
    for roots of W, tr G comes from signs v for all coordinates, E v∘Gv = diag G.
    """
    slopes = outputs.slopes
    # One sign an example: cross terms of different examples vanish in the mean.
    per_example = draw_signs(signs, (len(slopes),) + (1,) * (slopes.ndim - 1), slopes.dtype)
    spread = pulled(loss, point, slopes * per_example)
    like = spread if outputs.roots is None else slopes
    left, right = trace_pair(loss, point, outputs, draw_signs(signs, like.shape, like.dtype))
    sizes = [leaf.size for leaf in jax.tree.leaves(loss.split(point)[0])]
    norm = float(np.sum(np.asarray(spread, float) ** 2))
    return Sample(_by_leaf(sizes, left, right), loss.num_examples * norm)


def trace_pair(
    loss: AbstractExampleLoss, point: Point, outputs: Outputs, signs: Array
) -> tuple[Vector, Vector]:
    """Two vectors whose inner product is tr G, in the mean over random signs.

    The signs are of outputs; of coordinates where there are no roots of W.
    """
    if outputs.roots is None:
        return signs, pulled(loss, point, pushed(loss, point, None, signs))
    pulled_back = pulled(loss, point, _rooted(outputs.roots, signs))
    return pulled_back, pulled_back


def curvature_sample(
    loss: AbstractLoss, point: Point, slopes: Array | None, signs: np.random.Generator
) -> Scalar:
    """An unbiased sample of tr(∇²L − G), less the weight decay; of tr ∇²L without outputs."""
    flat, _ = _tree.ravel(loss.split(point)[0])
    return curvature_along(loss, point, slopes, draw_signs(signs, flat.shape, flat.dtype))


@eqx.filter_jit
def curvature_along(
    loss: AbstractLoss, point: Point, slopes: Array | None, along: Vector
) -> Scalar:
    """vᵀAv, A the Hessian of ⟨∂L/∂f, f⟩ with constant slopes ∂L/∂f, or of L without outputs.

    By two derivatives forwards along v, nothing backwards.
    """
    coordinates, remainder = loss.split(point)
    _, unravel = _tree.ravel(coordinates)

    def height(x: Coordinates) -> Scalar:
        there = _tree.join(x, remainder)
        if isinstance(loss, AbstractExampleLoss):
            return _precision.vdot(slopes, loss.outputs(there))
        return loss(there)

    slope = lambda x: jax.jvp(height, (x,), (unravel(along),))[1]
    return jax.jvp(slope, (coordinates,), (unravel(along),))[1]


@eqx.filter_jit
def _rooted(roots: Array, weights: Array) -> Array:
    """√W w, for w like the outputs."""
    if roots.ndim == 0:
        return roots * weights
    flat = weights.reshape(roots.shape[:2])
    return _precision.einsum("nij,nj->ni", roots, flat).reshape(weights.shape)


def _by_leaf(sizes: list[int], left: Vector, right: Vector) -> np.ndarray:
    """⟨left, right⟩, leaf by leaf."""
    products = np.asarray(left, float) * np.asarray(right, float)
    return np.array([part.sum() for part in np.split(products, np.cumsum(sizes)[:-1])])


def _plain(loss: AbstractExampleLoss) -> PerExampleLoss:
    plain = loss.loss if isinstance(loss, ResidualForm) else loss
    assert isinstance(plain, PerExampleLoss)
    return plain


def draw_signs(generator: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Random signs by NumPy: in JAX each new shape would be one more program."""
    signs = generator.integers(0, 2, shape, np.int8)
    return jnp.asarray(2 * signs - 1, dtype)
