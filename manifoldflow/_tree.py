"""Points as coordinates and a remainder, and the linear algebra of tangents.

A point is any PyTree. `split` takes its coordinates out; tangents are PyTrees like the
coordinates; nothing here flattens a point into one long vector unless it says so.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from manifoldflow import _precision, _trainable
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_point, shapes_of
from manifoldflow._types import Coordinates, Key, Point, Scalar, Tangent


class Static:
    """Any PyTree without arrays as one hashable value, fit for a static field."""

    def __init__(self, tree: PyTree[Any]):
        leaves, self._treedef = jax.tree.flatten(tree)
        self._leaves = tuple(leaves)

    @property
    def tree(self) -> PyTree[Any]:
        return jax.tree.unflatten(self._treedef, self._leaves)

    def __hash__(self) -> int:
        return hash((self._treedef, self._leaves))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Static)
            and self._treedef == other._treedef
            and self._leaves == other._leaves
        )


def as_pytree_callable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A callable that plain `jax.jit` takes as an argument.

    A module keeps its arrays as leaves; a bare function becomes static.
    """
    # A `Partial` has its function in the treedef: jit compares it by identity and does not retrace.
    is_module = issubclass(type(fn), eqx.Module)
    is_bare = not is_module and jax.tree.leaves(fn) == [fn]
    return jax.tree_util.Partial(fn) if is_bare else fn


@checked
def split(point: Point, trainable: Static | None = None) -> tuple[Coordinates, Point]:
    """The coordinates and the remainder of a point; together they are the point.

    Where `trainable` does not say which floating-point arrays may move, all of them do, except
    arrays of Flax that are no weights: those in an NNX module but in none of its `nnx.Param`, and
    the other collections beside `params` in the variables of a Linen module. A warning names them.

    Args:
        point: any PyTree; its coordinates are floating-point arrays.
        trainable: as for the losses.

    Returns:
        `(coordinates, remainder)`: the point with None in place of all that does not move, and of
        all that does.

    Raises:
        ValueError: no floating-point array, complex ones, or the state of Equinox's layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> coordinates, remainder = mf.split({"weight": jnp.ones(2), "name": "layer"})
        >>> print(coordinates)
        {'name': None, 'weight': Array([1., 1.], dtype=...)}
        >>> print(remainder)
        {'name': 'layer', 'weight': None}
    """
    flags = None if trainable is not None else _trainable.weights_of(point)
    coordinates, remainder = _weights(checked_point(point), flags)
    _mention_numbers(remainder)
    if trainable is not None:
        try:
            spec = jax.tree.map(lambda leaf: leaf if callable(leaf) else bool(leaf), trainable.tree)
            kept, frozen = eqx.partition(coordinates, spec)
        except ValueError as error:
            raise ValueError(
                "`trainable` must be True, False, a function of a leaf, or a PyTree "
                f"prefix of the point {shapes_of(point)}."
            ) from error
        coordinates, remainder = kept, eqx.combine(remainder, frozen)
    leaves = jax.tree.leaves(coordinates)
    if not leaves:
        raise ValueError(
            "A point needs at least one floating-point array among its leaves; got "
            f"{shapes_of(point)}. Python numbers and integer arrays are not coordinates."
        )
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves):
        raise ValueError(
            f"Complex leaves are not supported; got {shapes_of(coordinates)}. Write the "
            "model with real and imaginary parts as two real leaves."
        )
    return jax.tree.map(jnp.asarray, coordinates), remainder


def _weights(point: Point, flags: list[bool] | None) -> tuple[Coordinates, Point]:
    """The floating-point arrays among the leaves that may move, and the rest."""
    if flags is None or all(flags):
        return eqx.partition(point, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(point)
    moving = [f and eqx.is_inexact_array(leaf) for f, leaf in zip(flags, leaves, strict=True)]
    return eqx.partition(point, jax.tree.unflatten(treedef, moving))


_mentioned: list[str] = []


def _mention_numbers(remainder: Point) -> None:
    """Say once that a Python float does not move, where it can be no hyperparameter.

    Modules hold floats of the latter kind, as a LayerNorm its ε; dicts and lists of arrays
    hardly do.
    """
    if _mentioned:
        return
    containers = jax.tree_util.DictKey, jax.tree_util.SequenceKey
    for path, leaf in jax.tree_util.tree_leaves_with_path(remainder):
        if type(leaf) is float and path and all(isinstance(key, containers) for key in path):
            _mentioned.append(jax.tree_util.keystr(path))
            warnings.warn(
                f"The point{_mentioned[0]} is a Python float, {leaf}, and so stays as it is: only "
                "arrays are coordinates. Make it one, jnp.asarray(…), to let it move. This is "
                "said once.",
                stacklevel=2,
            )
            return


def join(coordinates: Coordinates, remainder: Point) -> Point:
    return eqx.combine(coordinates, remainder)


def as_tangent(coordinates: Coordinates, vector: PyTree[Any], name: str = "vector") -> Tangent:
    """The vector as a tangent at a point with these coordinates, or a clear error."""
    # None is no leaf for JAX: trees with None in the same places have the same structure.
    marks = jax.tree.map(lambda _: True, coordinates)
    try:
        tangent = jax.tree.map(lambda _, leaf: jnp.asarray(leaf), marks, vector)
        fits = jax.tree.map(lambda c, t: c.shape == t.shape, coordinates, tangent)
    except (ValueError, TypeError, AttributeError):
        # A whole model is taken too: its static leaves are dropped.
        tangent, _ = _weights(vector, _trainable.weights_of(vector))
        if jax.tree.structure(tangent) != jax.tree.structure(coordinates):
            fits = False
        else:
            fits = jax.tree.map(lambda c, t: c.shape == t.shape, coordinates, tangent)
    is_real = not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(tangent))
    if not (all(jax.tree.leaves(fits)) and is_real):
        raise ValueError(
            f"{name} must be real with the structure and shapes of the point's coordinates "
            f"{shapes_of(coordinates)}; got {shapes_of(vector)}. Gradients taken with "
            "`eqx.filter_grad` and the results of `random_tangent` have them."
        )
    return jax.tree.map(lambda c, t: t.astype(c.dtype), coordinates, tangent)


def dtype_of(tree: PyTree[Any]) -> Any:
    return jnp.result_type(*jax.tree.leaves(tree))


def eps_of(tree: PyTree[Any]) -> float:
    """The rounding error of the coarsest leaf."""
    return max(_precision.eps_of_dtype(leaf) for leaf in jax.tree.leaves(tree))


def relative_rank_cutoff(dtype: Any) -> float:
    """The part of λ_max below which a Hessian's eigenvalue near a minimum counts as zero: eps^⅓."""
    return _precision.eps_of_dtype(dtype) ** (1 / 3)


def cast_floats(tree: PyTree[Any], dtype: Any) -> PyTree[Any]:
    """Floating leaves in `dtype`, so that data never promote the point's precision."""

    def cast(leaf: Any) -> Any:
        is_float = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_float else leaf

    return jax.tree.map(cast, tree)


def cast_like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """Each leaf in the dtype of its counterpart: solvers take the widest of all for all."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def size(tree: PyTree[Any]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def structure_of(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.eval_shape(lambda: tree)


def zeros_like(tree: PyTree[Any]) -> PyTree[Array]:
    return jax.tree.map(jnp.zeros_like, tree)


def add(x: Tangent, y: Tangent) -> Tangent:
    """x + y, in the dtypes of x."""
    return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), x, y)


def subtract(x: Tangent, y: Tangent) -> Tangent:
    """x − y, in the dtypes of x."""
    return jax.tree.map(lambda a, b: (a - b).astype(a.dtype), x, y)


def scale(factor: Any, x: Tangent) -> Tangent:
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), x)


def inner(x: Tangent, y: Tangent) -> Scalar:
    dot = lambda a, b: _precision.tensordot(a, b, axes=jnp.ndim(a))
    products = jax.tree.map(dot, x, y)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype_of(x)))


def norm(x: PyTree[Array]) -> Scalar:
    """Euclidean norm, with derivative zero (not NaN) at zero; NaN stays NaN."""
    # √ has an infinite derivative at 0, and 0·∞ is NaN: hence two `where`s, one inside.
    square = inner(x, x)
    is_zero = square == 0
    return where(is_zero, 0, jnp.sqrt(where(is_zero, 1, square)))


def in_own_units(x: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    """`x / size` and its size, that of its largest entry (1 for zeros).

    So that squares neither vanish nor overflow: those of 1e-23 are zero in float32.
    """
    size = size_of(x)
    return jax.tree.map(lambda leaf: (leaf / size).astype(leaf.dtype), x), size


@functools.partial(jax.jit, inline=True)  # one program where arrays are at hand, no call in others
def size_of(x: PyTree[Array]) -> Scalar:
    """The largest entry in absolute value, 1 for zeros."""
    largest = jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(x)])
    return where(jnp.max(largest) == 0, 1, jnp.max(largest))


def where(condition: Any, x: PyTree[Any], y: PyTree[Any]) -> PyTree[Any]:
    """`jax.numpy.where` for every leaf, in one operation instead of a call with six of them."""
    condition = jnp.asarray(condition)

    def leafwise(a: Any, b: Any) -> Array:
        shape = jnp.broadcast_shapes(condition.shape, jnp.shape(a), jnp.shape(b))
        if condition.shape not in ((), shape):
            return jnp.where(condition, a, b)
        dtype = jnp.result_type(a, b)
        full = lambda x: jnp.broadcast_to(jnp.asarray(x, dtype), shape)
        return jax.lax.select(condition, full(a), full(b))

    return jax.tree.map(leafwise, x, y)


def all_finite(tree: PyTree[Any]) -> Array:
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, checks)


def random_normal_like(key: Key, tree: PyTree[Any]) -> PyTree[Array]:
    leaves, treedef = jax.tree.flatten(tree)
    # A key for each leaf: leaves of the same shape must not be drawn alike.
    keys = jr.split(key, len(leaves))
    drawn = [jr.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, drawn)


def probe_like(key: Key, tree: PyTree[Any]) -> PyTree[Array]:
    """Normal numbers drawn as one array: a generator for each shape compiles for seconds."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    drawn = jr.normal(key, (ends[-1],), jnp.result_type(*leaves))
    parts = zip(jnp.split(drawn, ends[:-1]), leaves)
    return jax.tree.unflatten(treedef, [x.reshape(y.shape).astype(y.dtype) for x, y in parts])


def ravel(tree: PyTree[Any]) -> tuple[Float[Array, " D"], Callable[[Array], PyTree[Array]]]:
    """One long vector and the way back: for dense methods on small problems only."""
    vector, unravel = ravel_pytree(tree)
    return vector, unravel
