"""The symmetries that networks commonly have, each built for points of a given structure."""

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
from manifoldflow.symmetry._views import as_view

Where = Callable[[Any], Any]
"""Picks a leaf, or a tuple of leaves, out of a point."""


@checked
def rescaling(
    point: Point, first: Where, second: Where, *, degree: float = 1.0
) -> ExponentialSymmetry:
    """The rescaling (a, b) ↦ (ca, c⁻ᵖb) of two layers about a homogeneous activation.

    Its generator is A = diag(I, −pI).

    Args:
        point: a point of the structure to be moved.
        first: picks the part that is multiplied by c, for example `lambda p: p["a"]`; a tuple of
            leaves where a layer has a bias.
        second: picks the part that is divided by cᵖ.
        degree: p > 0, the degree of the activation, φ(cz) = cᵖφ(z): 1 for ReLU.

    Returns:
        An `ExponentialSymmetry`.

    Raises:
        ValueError: a degree that is not one finite number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> net = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([4.0])}
        >>> pair = symmetry.rescaling(net, lambda p: p["a"], lambda p: p["b"])
        >>> moved = pair.act(net, jnp.log(2.0))
        >>> print(moved["a"].round(5), moved["b"].round(5))
        [ 2. -4.] [2.]

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

    The layer's weight and bias grow, the next one's weight shrinks. The activation must be
    homogeneous and without a parameter; `find_rescalings` finds out whether it is.

    Args:
        mlp: the network.
        layer: the number of the layer that grows, from 0.
        neuron: the number of one of the layer's outputs, to rescale only that one; None for all.
        degree: p of the activation, φ(cz) = cᵖφ(z).

    Returns:
        An `ExponentialSymmetry`.

    Raises:
        ValueError: no such layer or neuron.

    Examples:
        >>> import equinox as eqx
        >>> import jax
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> net = eqx.nn.MLP(2, 1, 3, 1, activation=jax.nn.relu, key=jr.key(0))
        >>> x, moved = jr.normal(jr.key(1), (2,)), symmetry.mlp_rescaling(net).act(net, 0.7)
        >>> print(abs(moved(x) - net(x)).max() < 1e-5)
        True
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
        neuron: the number of one output of the first layer; None for all.
        degree: p of the function between the two, φ(cz) = cᵖφ(z).
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
def scaling(point: Point, where: Where | None = None) -> ExponentialSymmetry:
    """The scaling θ ↦ cθ of weights that only enter normalised, A = I.

    Without weight decay SGD lets their norm grow for ever [Ziyin2024, §A.1].

    Args:
        point: a point of the structure to be moved.
        where: picks the leaves that are scaled; None for all.

    Returns:
        An `ExponentialSymmetry`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point = {"direction": jnp.array([3.0, 4.0]), "gain": jnp.array(2.0)}
        >>> norm = symmetry.scaling(point, lambda p: p["direction"])
        >>> print(symmetry.noether_charge(norm, point))  # half the squared norm
        12.5
    """
    chosen = (lambda tree: tree) if where is None else where
    return ExponentialSymmetry(_weighted(_zeros(point), chosen, lambda leaf: 1.0))


@checked
def double_rotation(
    point: Point,
    first: Where,
    second: Where,
    matrix: Any,
    *,
    axes: tuple[int, int] = (1, 0),
) -> ExponentialSymmetry:
    """The symmetry (U, W) ↦ (Ue^{λB}, e^{−λB}W) of two matrices that enter as their product UW.

    Its charge is C = ½tr(UBUᵀ) − ½tr(WᵀBW).

    Args:
        point: a point of the structure to be moved.
        first: picks U, (m, d).
        second: picks W, (d, n).
        matrix: B, any symmetric matrix (d, d).
        axes: the axes of U and W over which their product sums.

    Returns:
        An `ExponentialSymmetry`.

    Raises:
        ValueError: B is not symmetric, or the shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> point = {"U": jnp.array([[1.0, 2.0]]), "W": jnp.array([[3.0], [0.5]])}
        >>> mix = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> turn = symmetry.double_rotation(point, lambda p: p["U"], lambda p: p["W"], mix)
        >>> moved = turn.act(point, 0.3)
        >>> print(round(float((moved["U"] @ moved["W"])[0, 0]), 4))
        4.0

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
    """The symmetry (W_Q, W_K) ↦ (e^{λB}W_Q, e^{−λB}W_K) of one attention head.

    It holds since attention scores are products qᵀk.

    Args:
        point: a network.
        where: picks an `equinox.nn.MultiheadAttention` out of it.
        matrix: B, symmetric, (qk_size, qk_size).
        head: the number of the head, from 0.

    Returns:
        An `ExponentialSymmetry`.

    Raises:
        ValueError: B is not symmetric; the shapes do not fit; there is no such head.

    Examples:
        >>> import equinox as eqx
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> layer = eqx.nn.MultiheadAttention(2, 4, key=jr.key(0))
        >>> turn = symmetry.query_key_rotation(layer, lambda p: p, jnp.eye(2), head=1)
        >>> x, moved = jr.normal(jr.key(1), (3, 4)), turn.act(layer, 0.5)
        >>> print(abs(moved(x, x, x) - layer(x, x, x)).max() < 1e-5)
        True
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
    """The symmetry with the generator A = Σᵣ cᵣvᵣvᵣᵀ, of low rank.

    The directions vᵣ need not be orthogonal.

    Args:
        point: a point of the structure to be moved.
        directions: v, a PyTree like the point's coordinates with a trailing axis of r.
        values: c, (r,).

    Returns:
        An `ExponentialSymmetry`, which holds D×r numbers.

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> along = jnp.array([[1.0], [0.0], [0.0]])
        >>> stretch = symmetry.low_rank(jnp.ones(3), along, jnp.array([2.0]))
        >>> print(stretch.velocity(jnp.array([3.0, 4.0, 5.0])))
        [6. 0. 0.]
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
    # A = QR·diag(c)·RᵀQᵀ: the eigenproblem is r×r, whatever D is.
    basis, triangle = jnp.linalg.qr(columns)
    eigenvalues, vectors = jnp.linalg.eigh((triangle * values) @ triangle.T)
    return ExponentialSymmetry(LowRank(basis @ vectors, eigenvalues))


def _zeros(point: Point) -> Coordinates:
    coordinates, _ = _tree.split(point)
    # One number for each leaf, to be broadcast: such symmetries need no gradient of an example.
    return jax.tree.map(lambda leaf: jnp.zeros((1,) * leaf.ndim, leaf.dtype), coordinates)


def _weighted(weights: PyTree[Any], where: Where, weight: Callable[[Any], Any]) -> PyTree[Any]:
    """The weights, with those of some leaves (or of all below a node) set."""
    of_leaf = lambda leaf: jnp.asarray(weight(leaf), leaf.dtype)
    # `where` may pick a node: all leaves below it are set.
    return eqx.tree_at(where, weights, replace_fn=lambda node: jax.tree.map(of_leaf, node))


def _rotation(
    point: Point,
    where: Where,
    axes: tuple[int, ...],
    signs: tuple[int, ...],
    blocks: Float[Array, "blocks d d"],
) -> ExponentialSymmetry:
    lengths = [as_view(a, leaf.ndim).length(leaf.shape) for leaf, a in zip(where(point), axes)]
    size = blocks.shape[0] * blocks.shape[1]
    if set(lengths) != {size}:
        raise ValueError(
            f"The generator acts on axes of length {size}; got axes {axes} of "
            f"{shapes_of(where(point))}."
        )
    values, vectors = jnp.linalg.eigh(blocks)
    return ExponentialSymmetry(Rotation(where, tuple(axes), signs, vectors, values))
