"""Optax transforms: made from a learning rate, and tested for the clock that they run on."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._types import Coordinates, Tangent


def checked_optimizer(optimizer: Any) -> Callable[..., Any]:
    """Something that maps a learning rate to a transform, in a form that jit can compare."""
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise ValueError(
            "simulate needs an optimizer that maps a learning rate to an Optax transform, as "
            "optax.sgd or lambda rate: optax.sgd(rate, momentum=0.9); got "
            f"{_name(optimizer)}. The rate itself goes into learning_rate=…."
        )
    if isinstance(optimizer, functools.partial):
        # Equal partials made twice are two values to jit, equal `Partial`s are one.
        optimizer = jax.tree_util.Partial(optimizer.func, *optimizer.args, **optimizer.keywords)
    return _tree.as_pytree_callable(optimizer)


def transform_of(
    optimizer: Callable[..., Any], learning_rate: Any
) -> optax.GradientTransformationExtraArgs:
    transform = optimizer(learning_rate)
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(
            f"optimizer(learning_rate) must return an Optax transform; got {_name(transform)}."
        )
    return optax.with_extra_args_support(transform)


def updated(
    transform: optax.GradientTransformationExtraArgs,
    gradient: Tangent,
    state: PyTree[Any],
    here: Coordinates,
    grad_fn: Callable[..., Any],
    value_fn: Callable[..., Any],
) -> tuple[Any, Any]:
    """The update and the new state, from a transform that gets the arguments it asks for.

    Optax refuses what nobody asks for, and nothing says beforehand what is: SAM wants
    `grad_fn` alone, line searches `value`, `grad` and `value_fn` without it.
    """
    slopes = {"grad_fn": grad_fn}

    def values() -> dict[str, Any]:
        return {"value": value_fn(here), "value_fn": value_fn, "grad": gradient}

    try:
        return transform.update(gradient, state, here, **slopes)
    except TypeError as error:
        for extras in (values, lambda: slopes | values()):
            with contextlib.suppress(TypeError):
                return transform.update(gradient, state, here, **extras())
        raise error  # of the user's own transform, as it is


def _name(value: Any) -> str:
    return f"a {type(value).__name__}"


def _elsewhere(*_: Any) -> Any:
    """The gradient anywhere but here: whoever asks for it, as SAM does, is no plain SGD."""
    raise ValueError(_NO_CLOCK)


def _zero(_: Any) -> Array:
    return jnp.zeros(())


def check_clock(
    optimizer: Callable[..., Any], one: Any, coordinates: Coordinates, expected_gain: float
) -> None:
    """Refuse an optimiser whose limit clock is not Ση² times the square of `expected_gain`.

    Momentum of any kind answers one gradient g by displacements that add up to −G·η·g, and
    then SGD runs on the limit clock G²Ση². Ask it: a gradient, and nothing after it. The
    answers of heavy-ball and Nesterov momentum decay geometrically, so three are enough.

    Args:
        optimizer: learning rate ↦ Optax transform.
        one: the learning rate 1, as a number or a schedule.
        coordinates: whatever has the structure of the point; its values are not used.
        expected_gain: G = 1/(1−β) for the momentum β that was told.

    Raises:
        ValueError: the answer is not proportional to the gradient, as with Adam, SAM or
            clipping; there is one without a gradient, as with weight decay; or G is neither the
            expected one nor 1.
    """
    try:
        # No gradient shows a decay of weights, one twice as large a normalisation, a huge one
        # clipping.
        gradients = 0, 1e-3, 2e-3, 1e6
        found = [_answers(optimizer, one, coordinates, gradient) for gradient in gradients]
    except ValueError as error:
        raise ValueError(_NO_CLOCK) from error
    if is_traced(found):
        return  # The user's transform holds traced values: not known before it runs.
    rest, answers, doubled, huge = (np.asarray(each, float) for each in found)
    # Against the answer to no gradient, which is not 0 where weights decay.
    first, second, third = answers = (rest - answers) / 1e-3
    for size, answer in ((2e-3, doubled), (1e6, huge)):
        if not np.allclose((rest - answer) / size, answers, rtol=1e-2, atol=1e-3):
            raise ValueError(_NO_CLOCK)
    if np.any(np.abs(rest) > 1e-6):
        raise ValueError(_DECAYS)
    has_memory = np.abs(second) > 1e-3
    # Momentum answers g, βg, β²g, …: the first plus second/(1 − β) is the whole sum.
    decay = np.where(has_memory, third / np.where(has_memory, second, 1), 0)
    gains = (first + second / (1 - decay))[first != 0]  # Others are frozen.
    if not gains.size or np.ptp(gains) > 1e-2 * gains[0]:
        raise ValueError(_NO_CLOCK)
    if np.allclose(gains, expected_gain, rtol=1e-2) or np.allclose(gains, 1, rtol=1e-2):
        return
    raise ValueError(
        f"The optimizer moves {gains[0]:.4g} times as far as its learning rate says, as momentum "
        f"does; the limit clock counts it if told: pass momentum={1 - 1 / gains[0]:.4g}, or "
        "give num_steps instead of end_time."
    )


_NO_CLOCK = (
    "end_time counts on the limit clock of SGD with or without momentum, Ση²/(1−β)²; the steps "
    "of this optimizer are not proportional to the gradients (Adam and its kin normalise "
    "them, clipping shortens them, SAM runs on kηρ²). Hand over an update that knows its clock, as "
    "updates.Adam(), or give num_steps instead; the limit of any iteration is IterationLimit."
)
_DECAYS = (
    "end_time counts on the limit clock of SGD with or without momentum, Ση²/(1−β)²; this "
    "optimizer moves a point without any gradient, as weight decay does. Hand over "
    "updates.SGD(momentum, weight_decay) with weight_decay = λ/η, or give num_steps; the limit "
    "of any iteration is IterationLimit."
)


def _answers(
    optimizer: Callable[..., Any], one: Any, coordinates: Coordinates, gradient: float
) -> Array:
    """The first three updates, (3, some coordinates), for the gradients `gradient`, 0, 0."""

    def full(value: float) -> Coordinates:
        # Small: two entries along each axis are enough to ask.
        shape = lambda leaf: tuple(min(length, 2) for length in leaf.shape)
        return jax.tree.map(lambda leaf: jnp.full(shape(leaf), value, jnp.float32), coordinates)

    # Under jit as well: the answer decides what is compiled.
    with jax.ensure_compile_time_eval():
        transform = transform_of(optimizer, one)
        point, updates = full(1.0), []
        state = transform.init(point)
        for value in (gradient, 0.0, 0.0):
            slope = full(value)
            update, state = updated(transform, slope, state, point, _elsewhere, _zero)
            updates.append(_tree.ravel(update)[0])
        return jnp.stack(updates)
