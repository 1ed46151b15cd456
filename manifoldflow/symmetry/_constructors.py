"""The symmetries that networks commonly have, for a point of the kind to be moved."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_number, described, real_numbers, shapes_of
from manifoldflow._types import Coordinates, Point
from manifoldflow.symmetry._generators import checked_symmetric, LowRank, Rotation
from manifoldflow.symmetry._symmetry import ExponentialSymmetry

Where = Callable[[Any], Any]
"""Picks a leaf, or a tuple of leaves, out of a point."""


@checked
def rescaling(
    point: Point, first: Where, second: Where, *, degree: float = 1.0
) -> ExponentialSymmetry:
    """(a, b) ↦ (ca, c^{−p}b), A = diag(I, −pI): two layers about a homogeneous activation.

    Args:
        point: a point of the kind to be moved.
        first: picks what is multiplied by c, as `lambda p: p["a"]`; a tuple of leaves
            where a layer has a bias.
        second: picks what is divided by c^p.
        degree: p, the degree of the activation, φ(cz) = c^p φ(z): 1 for ReLU.

    References:
        [Ziyin2024, §4.2].
    """
    checked_number("rescaling: degree", degree)
    weights = _weighted(_zeros(point), first, lambda leaf: 1.0)
    return ExponentialSymmetry(_weighted(weights, second, lambda leaf: -degree))


@checked
def mlp_rescaling(
    mlp: eqx.nn.MLP, layer: int = 0, *, neuron: int | None = None, degree: float = 1.0
) -> ExponentialSymmetry:
    """The rescaling of one layer of an `equinox.nn.MLP` against the next one.

    The layer's weight and bias grow, the next one's weight shrinks. For homogeneous
    activations without a parameter; `find_rescalings` finds out whether they are.

    Args:
        mlp: the network.
        layer: which layer grows.
        neuron: of all the layer's outputs, only this one.
        degree: of the activation.

    Raises:
        ValueError: no such layer or neuron.
    """
    if not 0 <= layer < len(mlp.layers) - 1:
        raise ValueError(
            f"An MLP of {len(mlp.layers)} layers has rescalings of layer 0 to "
            f"{len(mlp.layers) - 2} against the next; got layer={layer}."
        )
    return linear_rescaling(
        mlp, lambda p: p.layers[layer], lambda p: p.layers[layer + 1], neuron, degree
    )


def linear_rescaling(
    point: Point,
    first: Where,
    second: Where,
    neuron: int | None = None,
    degree: float = 1.0,
) -> ExponentialSymmetry:
    """The rescaling of one `equinox.nn.Linear` of a network against another one.

    Args:
        point: the network.
        first: picks the layer whose weight and bias grow.
        second: picks the layer whose weight shrinks.
        neuron: of all outputs of the first layer, only this one.
        degree: of what is between the two.
    """
    size = first(point).weight.shape[0]
    if neuron is not None and not 0 <= neuron < size:
        raise ValueError(f"The layer has {size} neurons; got neuron={neuron}.")
    chosen = jnp.ones(1) if neuron is None else jnp.zeros(size).at[neuron].set(1)

    def leaves(layer: eqx.nn.Linear) -> tuple[Any, ...]:
        return (layer.weight,) + ((layer.bias,) if layer.bias is not None else ())

    def growing(leaf: Array) -> Array:
        return chosen.reshape(-1, *leaf.shape[1:])

    weights = _weighted(_zeros(point), lambda p: leaves(first(p)), growing)
    shrinking = lambda leaf: -degree * chosen.reshape(*leaf.shape[:-1], -1)
    weights = _weighted(weights, lambda p: second(p).weight, shrinking)
    return ExponentialSymmetry(weights)


@checked
def scaling(point: Point, where: Where = lambda point: point) -> ExponentialSymmetry:
    """θ ↦ cθ, A = I: weights that only enter normalised.

    Without weight decay SGD lets their norm grow for ever [Ziyin2024, §A.1].

    Args:
        point: a point of the kind to be moved.
        where: picks the leaves that are scaled; by default all.
    """
    return ExponentialSymmetry(_weighted(_zeros(point), where, lambda leaf: 1.0))


@checked
def double_rotation(
    point: Point,
    first: Where,
    second: Where,
    matrix: Any,
    *,
    axes: tuple[int, int] = (1, 0),
) -> ExponentialSymmetry:
    """(U, W) ↦ (Ue^{λB}, e^{−λB}W): two matrices that enter as their product UW.

    Its charge is C = ½ tr(UBUᵀ) − ½ tr(WᵀBW).

    Args:
        point: a point of the kind to be moved.
        first: picks U, (m, d).
        second: picks W, (d, n).
        matrix: B, any symmetric matrix (d, d).
        axes: the axes of U and W that are summed over in their product.

    Raises:
        ValueError: B is not symmetric, or the shapes do not fit.

    References:
        [Ziyin2024, Proposition 5.1].
    """
    where = lambda p: (first(p), second(p))
    return _rotation(point, where, axes, (1, -1), checked_symmetric(matrix)[None])


@checked
def query_key_rotation(
    point: Point,
    where: Callable[[Any], eqx.nn.MultiheadAttention],
    matrix: Any,
    *,
    head: int = 0,
) -> ExponentialSymmetry:
    """(W_Q, W_K) ↦ (e^{λB}W_Q, e^{−λB}W_K) in one head: attention scores are q·k.

    Args:
        point: a network.
        where: picks an `equinox.nn.MultiheadAttention` out of it.
        matrix: B, symmetric, (qk_size, qk_size).
        head: which head.

    Raises:
        ValueError: B is not symmetric, the shapes do not fit, or there is no such head.
    """
    layer = where(point)
    if not isinstance(layer, eqx.nn.MultiheadAttention):
        raise ValueError(
            "query_key_rotation: `where` must pick an equinox.nn.MultiheadAttention out of the "
            f"point; it picks {described(layer)}."
        )
    if not 0 <= head < layer.num_heads:
        raise ValueError(f"The layer has {layer.num_heads} heads; got head={head}.")
    matrix = checked_symmetric(matrix)
    blocks = jnp.zeros((layer.num_heads, *matrix.shape), matrix.dtype).at[head].set(matrix)
    has_bias = [p.bias is not None for p in (layer.query_proj, layer.key_proj)]

    def leaves(p: Any) -> tuple[Any, ...]:
        projections = where(p).query_proj, where(p).key_proj
        weights = tuple(projection.weight for projection in projections)
        return weights + tuple(q.bias for q, has in zip(projections, has_bias) if has)

    signs = (1, -1, *(s for s, has in zip((1, -1), has_bias) if has))
    return _rotation(point, leaves, (0,) * len(signs), signs, blocks)


@checked
def low_rank(point: Point, directions: PyTree[Any], values: Any) -> ExponentialSymmetry:
    """A = Σᵣ cᵣ vᵣvᵣᵀ, of low rank, for directions that need not be orthogonal.

    Args:
        point: a point of the kind to be moved.
        directions: v, a PyTree like the point's coordinates with a trailing axis of r.
        values: c, (r,).

    Raises:
        ValueError: the shapes do not fit.
    """
    coordinates, _ = _tree.split(point)
    values = jnp.asarray(real_numbers("values", values))
    directions = jax.tree.map(lambda x: jnp.asarray(real_numbers("directions", x)), directions)
    leading = jax.tree.map(lambda leaf: leaf[..., 0] if leaf.ndim else leaf, directions)
    _tree.as_tangent(coordinates, leading, "directions, but for their trailing axis,")
    if any(leaf.shape[-1:] != values.shape for leaf in jax.tree.leaves(directions)):
        raise ValueError(
            f"directions need a trailing axis as long as values, {values.shape}; got "
            f"{shapes_of(directions)}."
        )
    columns = jax.vmap(lambda v: _tree.ravel(v)[0], in_axes=-1, out_axes=-1)(directions)
    basis, triangle = jnp.linalg.qr(columns)
    eigenvalues, vectors = jnp.linalg.eigh((triangle * values) @ triangle.T)
    return ExponentialSymmetry(LowRank(basis @ vectors, eigenvalues))


def _zeros(point: Point) -> Coordinates:
    coordinates, _ = _tree.split(point)
    return jax.tree.map(lambda leaf: jnp.zeros((1,) * leaf.ndim, leaf.dtype), coordinates)


def _weighted(weights: PyTree[Any], where: Where, weight: Callable[[Any], Any]) -> PyTree[Any]:
    """The weights with those of some leaves (or of all below a node) set."""
    of_leaf = lambda leaf: jnp.asarray(weight(leaf), leaf.dtype)
    return eqx.tree_at(where, weights, replace_fn=lambda node: jax.tree.map(of_leaf, node))


def _rotation(
    point: Point,
    where: Where,
    axes: tuple[int, ...],
    signs: tuple[int, ...],
    blocks: Float[Array, "blocks d d"],
) -> ExponentialSymmetry:
    lengths = [leaf.shape[axis] for leaf, axis in zip(where(point), axes)]
    size = blocks.shape[0] * blocks.shape[1]
    if set(lengths) != {size}:
        raise ValueError(
            f"The generator acts on axes of length {size}; got axes {axes} of "
            f"{shapes_of(where(point))}."
        )
    values, vectors = jnp.linalg.eigh(blocks)
    return ExponentialSymmetry(Rotation(where, tuple(axes), signs, vectors, values))
