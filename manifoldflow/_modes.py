"""Marks on arrays that let derivatives through in one mode only.

A derivative in the allowed mode goes through a marked array unchanged, and costs nothing. The other
mode raises a sentence. JAX would speak of its loops instead, sometimes as late as when the program
of the caller is compiled, out of reach of our own functions.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from manifoldflow._errors import is_traced


def _linear(name: str) -> Any:
    """A primitive that is the identity, to which evaluation and transposition are added."""
    primitive = jex.Primitive(name)
    primitive.def_abstract_eval(lambda x, **_: x)

    def batched(arrays: Any, axes: Any, **params: Any) -> Any:
        return primitive.bind(*arrays, **params), axes[0]

    # `vmap` passes through: the mark is the identity on every member.
    batching.primitive_batchers[primitive] = batched
    return primitive


_BACKWARDS = _linear("manifoldflow_backwards_only")
_FORWARDS = _linear("manifoldflow_forwards_only")


def _refusing(*arrays: Any, forwards: str, **_: Any) -> Any:
    del arrays
    raise ValueError(forwards)


# A tangent that is ever evaluated was wanted forwards. Reverse mode transposes it away before.
_BACKWARDS.def_impl(_refusing)
mlir.register_lowering(_BACKWARDS, lambda context, *_, **params: _refusing(**params))
# The tangent is computed forwards as it is; only the transposition of this primitive raises.
_FORWARDS.def_impl(lambda x, **_: x)
mlir.register_lowering(_FORWARDS, lambda context, x, **_: [x])


def _back_once(cotangent: Any, x: Any, *, forwards: str, twice: str) -> list[Any]:
    del x, forwards
    if type(cotangent) is ad.Zero:
        return [cotangent]
    return [_once(twice)(cotangent)]


def _never_back(cotangent: Any, x: Any, *, backwards: str) -> list[Any]:
    del x
    if type(cotangent) is ad.Zero:
        return [cotangent]
    raise ValueError(backwards)


ad.deflinear2(_BACKWARDS, _back_once)
ad.deflinear2(_FORWARDS, _never_back)


def _once(sentence: str) -> Callable[[Array], Array]:
    """The identity, which has no derivative."""

    @jax.custom_jvp
    def identity(x: Array) -> Array:
        return x

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise ValueError(sentence)

    return identity


def _marked(tree: PyTree[Any], primitive: Any, **params: str) -> PyTree[Any]:
    @jax.custom_jvp
    def mark(x: Array) -> Array:
        return x

    @mark.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return mark(*primals), primitive.bind(*tangents, **params)

    def marked(leaf: Any) -> Any:
        # What is no tracer has no derivative.
        is_moving = eqx.is_inexact_array(leaf) and is_traced(leaf)
        return mark(jnp.asarray(leaf)) if is_moving else leaf

    return jax.tree.map(marked, tree)


def backwards_only(tree: PyTree[Any], *, forwards: str, twice: str) -> PyTree[Any]:
    """The same arrays, through which derivatives go backwards, and once.

    Args:
        tree: all that is differentiated in.
        forwards: the sentence on forward mode.
        twice: the sentence on derivatives, backwards, of derivatives backwards.
    """
    return _marked(tree, _BACKWARDS, forwards=forwards, twice=twice)


def forwards_only(tree: PyTree[Any], *, backwards: str) -> PyTree[Any]:
    """The same arrays, through which derivatives go forwards only.

    Args:
        tree: all that comes out.
        backwards: the sentence on reverse mode.
    """
    return _marked(tree, _FORWARDS, backwards=backwards)
