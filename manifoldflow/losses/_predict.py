"""One example through a user's model, with the errors that users meet first."""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow._errors import shapes_of
from manifoldflow._tracebacks import with_few_frames
from manifoldflow._types import Example, Point

_JAX = os.path.dirname(str(jax.__file__)) + os.sep
_STOCHASTIC_LAYERS = (eqx.nn.Dropout, eqx.nn.BatchNorm)


def call_point(point: Point, x: Example) -> Array:
    """The default prediction: the point is a model and is called on one example."""
    if not callable(point):
        raise ValueError(
            f"The point (a {type(point).__name__}) is not callable; tell the loss how it "
            "predicts, as predict=lambda point, x: …."
        )
    model: Any = point
    return model(x)


def model_output(
    predict: Callable[..., Any], point: Point, x: Example, shape: tuple[int, ...] | None
) -> Array:
    """The output predict(point, x), checked against the shape that is expected of it."""
    _refuse_randomness(point)
    try:
        output = predict(point, x)
    except (TypeError, ValueError) as error:
        if not _is_of_shapes(error):
            raise
        raise ValueError(
            f"The model fails on one example, {shapes_of(x)}: {str(error).strip()} It is given "
            "one example at a time, without the axis of all examples: jax.vmap is not needed. A "
            "model for batches needs predict=lambda model, x: model(x[None])[0]."
        ) from with_few_frames(error)
    if not isinstance(output, jax.Array):
        raise ValueError(
            f"The model must map one example to one array; got {type(output).__name__}. "
            "Stateful layers return more: apply `eqx.nn.inference_mode` to the model, or "
            "give the loss a `predict` that returns the array alone."
        )
    if jnp.iscomplexobj(output):
        raise ValueError("The model's output is complex; return real and imaginary parts instead.")
    if shape is not None and output.shape != shape:
        raise ValueError(
            f"The model's output for one example has shape {output.shape}, its target has "
            f"shape {shape}. Reshape the targets to (examples, *{output.shape}) or the "
            "output to the target's shape; they are never broadcast."
        )
    return jnp.asarray(output)


def _is_of_shapes(error: Exception) -> bool:
    """True for errors of JAX itself about shapes, not for ours or those of a type checker."""
    is_plain = type(error) in (TypeError, ValueError)
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_jax = last is not None and last.tb_frame.f_code.co_filename.startswith(_JAX)
    return is_plain and is_jax and "shape" in str(error)


def _is_training(layer: Any) -> bool:
    """True where calling the layer is random or changes it. A dropout of nothing does neither."""
    drops_nothing = isinstance(layer, eqx.nn.Dropout) and _is_zero(layer.p)
    return not (getattr(layer, "inference", True) or drops_nothing)


def _is_nnx(node: Any) -> bool:
    """A module of Flax NNX, which is known by its bases alone: Flax need not be there."""
    return any(base.__module__.startswith("flax.nnx") for base in type(node).__mro__)


def _refuse_training_in_nnx(point: Point) -> None:
    modules = [node for node in jax.tree.leaves(point, is_leaf=_is_nnx) if _is_nnx(node)]
    names: set[str] = set()
    # Modules of NNX may refer to each other in circles.
    seen: set[int] = set()
    while modules:
        module = modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parts = getattr(module, "__dict__", {})
        drops = parts.get("deterministic") is False and parts.get("rate", 1) != 0
        if drops or parts.get("use_running_average") is False:
            names.add(type(module).__name__)
        inner = jax.tree.leaves(list(parts.values()), is_leaf=_is_nnx)
        modules += [node for node in inner if _is_nnx(node)]
    if names:
        raise ValueError(
            f"The model has {', '.join(sorted(names))} in training mode, so its loss is random or "
            "stateful. Call `model.eval()` first."
        )


def _is_zero(number: Any) -> bool:
    return isinstance(number, int | float) and number == 0


def _refuse_randomness(point: Point) -> None:
    """Dropout and batch statistics make the loss something other than a function."""

    def is_layer(node: Any) -> bool:
        return isinstance(node, _STOCHASTIC_LAYERS)

    _refuse_training_in_nnx(point)
    layers = [node for node in jax.tree.leaves(point, is_leaf=is_layer) if is_layer(node)]
    names = sorted({type(layer).__name__ for layer in layers if _is_training(layer)})
    if names:
        raise ValueError(
            f"The model has {', '.join(names)} in training mode, so its loss is random or "
            "stateful. Use `eqx.nn.inference_mode(model)`."
        )
