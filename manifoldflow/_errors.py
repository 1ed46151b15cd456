"""Checks of arguments, and the sentences that say what is wrong with them."""

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def is_traced(tree: PyTree[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def shapes_of(tree: PyTree[Any]) -> str:
    """The shapes and dtypes of a PyTree, short enough for an error message."""
    try:
        text = eqx.tree_pformat(tree, width=100, struct_as_array=True)
    except (TypeError, ValueError):  # what is no array has no such form
        text = described_leaves(tree)
    return text if len(text) < 600 else text[:600] + " …"


def described(value: Any) -> str:
    """The description of a wrong argument, short enough for an error message."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself, not one of its values"
    if eqx.is_array(value) or isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, str | int | float | complex | None):
        return repr(value)[:200]
    return f"a {type(value).__name__}"


def numbers(name: str, value: Any) -> Array | np.ndarray:
    """An array: of JAX if it was one, or of NumPy's numbers, in their own precision."""
    try:
        # Lists may hold values inside jit, of which NumPy can make nothing.
        is_jax = isinstance(value, jax.Array) or is_traced(value)
        array = jnp.asarray(value) if is_jax else np.asarray(value)
    except (TypeError, ValueError):  # ragged lists, lists of other things
        array = np.asarray(None)
    if not is_jax and not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name} must be numbers in one array; got {described(value)}.")
    return array


def real_numbers(name: str, value: Any) -> Array | np.ndarray:
    """The array of `numbers`, refused unless it is real."""
    array = numbers(name, value)
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if not is_real and array.dtype != bool:
        raise ValueError(f"{name} must be real numbers in one array; got {described(value)}.")
    return array


def checked_floats(name: str, value: Any) -> Array:
    """A finite floating-point array."""
    array = real_numbers(name, value)
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return _finite(name, jnp.asarray(array, None if is_float else jnp.result_type(float)))


def checked_data(name: str, tree: PyTree[Any]) -> PyTree[Array]:
    """Arrays with one common leading axis and without NaN or inf."""
    arrays = jax.tree.map(lambda leaf: jnp.asarray(numbers(name, leaf)), tree)
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or lengths & {None, 0}:
        raise ValueError(
            f"{name} needs arrays with one common, non-empty leading example axis; got "
            f"{shapes_of(arrays)}. Stack the examples along axis 0."
        )
    return jax.tree.map(lambda leaf: _finite(name, leaf), arrays)


def _finite(name: str, array: Array) -> Array:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    message = f"{name} contains NaN or infinite entries. Remove or impute those examples first."
    if isinstance(array, jax.core.Tracer):
        return eqx.error_if(array, ~jnp.all(jnp.isfinite(array)), message)
    for start, values in _here(array):
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            index = tuple((bad[0] + start).tolist())
            raise ValueError(f"{message} First one at index {index}.")
    return array


def _here(array: Array) -> Iterator[tuple[Any, np.ndarray]]:
    """The parts of an array that this process has, all of it as a rule, and where they begin."""
    if getattr(array, "is_fully_addressable", True):
        yield 0, np.asarray(array)
        return
    for shard in array.addressable_shards:
        yield np.array([part.start or 0 for part in shard.index], int), np.asarray(shard.data)


def checked_point(point: PyTree[Any]) -> PyTree[Any]:
    """The point, which has at least one array of floating-point numbers."""
    if not any(_is_inexact(leaf) for leaf in jax.tree.leaves(point)):
        raise ValueError(
            "A point needs at least one floating-point array among its leaves; got "
            f"{shapes_of(point)}. Python numbers and integer arrays are not coordinates."
        )
    return point


def _is_inexact(leaf: Any) -> bool:
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return is_shape or eqx.is_inexact_array(leaf)


def described_leaves(tree: PyTree[Any]) -> str:
    return ", ".join(described(leaf) for leaf in jax.tree.leaves(tree))[:600]


def name_of(path: Any) -> str:
    """A leaf, as messages and tables call it."""
    return jax.tree_util.keystr(path).removesuffix(".value") or "the point"


def refuse_nonfinite(name: str, coordinates: PyTree[Any]) -> None:
    """Refuse a model with NaN or inf in it, and name the leaves."""
    named = jax.tree_util.tree_leaves_with_path(coordinates)
    wrong = [name_of(path) for path, leaf in named if not np.all(np.isfinite(np.asarray(leaf)))]
    if wrong:
        raise ValueError(
            f"{name} needs a model of finite numbers; got NaN or inf in {', '.join(wrong)}. "
            "Take the last point before training went wrong."
        )


def checked_indices(indices: Any, length: int) -> Any:
    """Indices of examples; JAX would take the nearest one for those out of range."""
    if isinstance(indices, slice) or is_traced(indices):
        return indices
    known = np.asarray(numbers("indices", indices))
    is_mask = known.dtype == bool and known.shape == (length,)
    is_inside = np.issubdtype(known.dtype, np.integer) and known.size > 0
    is_inside = is_inside and bool(np.all((known >= -length) & (known < length)))
    if not (is_mask or is_inside):
        raise ValueError(
            f"select needs the numbers of some of the {length} examples, from 0 to {length - 1}, "
            f"or a mask of that length; got {indices!r}."
        )
    return known if isinstance(indices, list | tuple) else indices


def checked_count(name: str, value: Any) -> int:
    """A positive Python integer, from any integer type."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")
    return count


def checked_nonnegative(name: str, value: Any, mend: str = "") -> Array:
    """A scalar array that is finite and at least zero."""
    return _checked_scalar(name, value, lambda x: x >= 0, "finite and not negative", mend)


def checked_positive(name: str, value: Any, mend: str = "") -> Array:
    """A scalar array that is finite and above zero."""
    return _checked_scalar(name, value, lambda x: x > 0, "positive and finite", mend)


def checked_number(name: str, value: Any, mend: str = "") -> Array:
    """A finite scalar array."""
    return _checked_scalar(name, value, lambda x: x == x, "one finite number", mend)


def _checked_scalar(
    name: str, value: Any, is_fine: Callable[[Any], Any], wanted: str, mend: str
) -> Array:
    array = real_numbers(name, value)
    if array.ndim or array.dtype == bool:
        raise ValueError(f"{name} must be one number, a scalar; got {described(value)}.")
    is_float = jnp.issubdtype(array.dtype, jnp.floating) and isinstance(array, jax.Array)
    # With a dtype of its own, so that 2 after 1.0 does not retrace.
    converted = jnp.asarray(array, dtype=array.dtype if is_float else jnp.result_type(float))
    message = " ".join(filter(None, [f"{name} must be {wanted}.", mend]))
    if is_traced(array):
        return eqx.error_if(converted, ~(is_fine(array) & jnp.isfinite(array)), message)
    known = np.asarray(array, float)  # in NumPy: inside jit JAX makes tracers even of constants
    if not (is_fine(known) and np.isfinite(known)):
        raise ValueError(f"{message} Got {value!r}.")
    return converted


# What JAX says of functions that cannot be differentiated as is needed, and what helps.
_NO_LOOPS = (
    "Gradients are taken backwards, which no lax.while_loop (nor lax.fori_loop of a traced number "
    "of steps) in a model lets through. Use lax.scan, lax.fori_loop with a fixed number of steps, "
    "or equinox.internal.while_loop(…, kind='checkpointed')."
)
_NO_FORWARD = (
    "Second derivatives along given directions are taken forwards, and a function with a "
    "jax.custom_vjp has no forward mode. Give it a jax.custom_jvp, or, for a Diffrax solve in "
    "the model and for mf.solve itself, adjoint=diffrax.DirectAdjoint()."
)
_REFUSALS = {
    "Reverse-mode differentiation does not work for lax.while_loop": _NO_LOOPS,
    "(jvp) to a custom_vjp": _NO_FORWARD,  # whatever word it has for derivatives
    "Differentiation rule for 'custom_lin' not implemented": _NO_FORWARD,
}


def of_jax(error: Exception) -> str | None:
    """The words in place of an error of JAX, where that is known."""
    if not isinstance(error, TypeError | ValueError | NotImplementedError):
        return None
    message = str(error)
    ours = next((ours for theirs, ours in _REFUSALS.items() if theirs in message), None)
    return _on_other_devices(message) if ours is None else ours


def _on_other_devices(message: str) -> str | None:
    """The words for JAX's error about arrays on other devices than the rest, or the mesh."""
    if "Received incompatible devices for jitted computation" not in message:
        return None
    ids = " and ".join(dict.fromkeys(re.findall(r"device ids (\[[\d, ]*\])", message)))
    return (
        f"All arrays must lie on the devices of one mesh; got devices {ids}. Call "
        "manifoldflow.shard_examples(loss) and manifoldflow.shard_parameters(point) within the "
        "`with manifoldflow.mesh(…)` in which they are used."
    )
