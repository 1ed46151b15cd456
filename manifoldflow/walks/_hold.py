"""Training on new data with the outputs on old data held, for any Optax optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_positive
from manifoldflow._jit import jit_part
from manifoldflow._types import Coordinates, Point, Scalar, Tangent
from manifoldflow.manifolds import AbstractManifold, AbstractNormalSpace

_MOST_HALVINGS = 10


class HeldOutputs(NamedTuple):
    """The Optax state of `hold_outputs`, with its certificate.

    Attributes:
        inner: the state of the optimiser within.
        change: the largest |f(θ, xᵢ) − f(θ₀, xᵢ)| of any old output after the last step.
        worst: the largest `change` of all steps so far.
        num_steps: steps so far.
        num_shortened: those of them that were shortened to keep `change` in bounds.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> import optax
        >>> weights = jnp.array([3.0, 4.0])
        >>> circle = mf.LevelSet(lambda w: w @ w - 25)
        >>> optimizer = mf.walks.hold_outputs(optax.sgd(0.1), circle, weights)
        >>> state = optimizer.init(weights)
        >>> print(state.worst, state.num_steps)
        0.0 0
    """

    inner: PyTree[Any]
    change: Scalar
    worst: Scalar
    num_steps: Int[Array, ""]
    num_shortened: Int[Array, ""]


@checked
def hold_outputs(
    optimizer: optax.GradientTransformation,
    manifold: AbstractManifold,
    like: Point,
    *,
    max_change: Any = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """An Optax optimiser that moves weights only where a model's outputs on old data stay.

        old = mf.OutputManifold(None, old_images, like=model)
        optimizer = mf.walks.hold_outputs(optax.adam(1e-3), old, model)
        state = optimizer.init(params)
        updates, state = optimizer.update(gradient_on_new_data, state, params)
        print(state.worst)  # how far any old output ever was from where it was

    With P the projector on the null space of J, the Jacobian of the old outputs f at the present
    weights θ, the optimiser gets Pg in the place of a gradient g. Its step v then becomes

        Pv − J†(f(θ + Pv) − f(θ₀)),

    the part that leaves the old outputs as they are to first order, and Newton's step to where
    they were. Both come from one factorisation of JJᵀ. What is left is of third order in |v|,
    and does not add up over the steps. A step that leaves more than `max_change` is halved
    until it does not. Of the old data only the inputs are needed.

    Args:
        optimizer: any Optax transform, with its learning rate.
        manifold: the models with the old outputs, `OutputManifold(predict, inputs, like=model)`;
            on any other manifold the weights stay in the same way.
        like: a point with the structure of those that move, for its parts that do not.
        max_change: the largest change of any of the old outputs, in their units.

    Returns:
        The optimiser. Its `update` needs the parameters, which must be the coordinates of the
        point: of an Equinox module `eqx.filter(model, eqx.is_inexact_array)`. Its state is a
        `HeldOutputs`.

    Raises:
        ValueError: a `max_change` that is not positive; in `update`, no parameters.

    Assumes:
        There are more weights than independent old outputs: else nothing moves. No later
        transform changes the step.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> import optax
        >>> predict = lambda w, x: jnp.sum(jnp.sinh(w @ x))
        >>> weights = jnp.array([[1.0, 0.5], [0.2, -0.3]])
        >>> old = mf.OutputManifold(predict, jnp.array([[1.0, 0.0]]), like=weights)
        >>> new = mf.LeastSquares(jnp.array([[0.5, 1.0]]), jnp.ones(1), predict=predict)
        >>> optimizer = mf.walks.hold_outputs(optax.sgd(0.1), old, weights)
        >>> state = optimizer.init(weights)
        >>> for _ in range(50):
        ...     updates, state = optimizer.update(jax.grad(new)(weights), state, weights)
        ...     weights = optax.apply_updates(weights, updates)
        >>> print(bool(new(weights) < 1e-6), bool(state.worst < 1e-3))
        True True
    """
    bound = checked_positive("hold_outputs: max_change", max_change)
    inner = optax.with_extra_args_support(optimizer)
    _, remainder = manifold.split(like)

    def init(params: Coordinates) -> HeldOutputs:
        zero = jnp.zeros((), jnp.int32)
        change = _change(manifold, _tree.join(params, remainder))
        return HeldOutputs(inner.init(params), change, change, zero, zero)

    def update(
        updates: Tangent, state: Any, params: Coordinates | None = None, **extra: Any
    ) -> tuple[Tangent, HeldOutputs]:
        if params is None:
            raise ValueError(
                "hold_outputs needs the parameters to know the old outputs there; got none. "
                "Call optimizer.update(gradients, state, params)."
            )
        coordinates, _ = manifold.split(_tree.join(params, remainder))
        space = _normal_space(manifold, _tree.join(coordinates, remainder))
        gradient = _tree.as_tangent(coordinates, updates, "The gradient")
        wanted, inner_state = inner.update(space.tangent(gradient), state.inner, params, **extra)
        wanted = _tree.as_tangent(coordinates, wanted, "The step of the optimizer")
        step, change, is_whole = _held_step(manifold, space, coordinates, remainder, wanted, bound)
        shortened = state.num_shortened + jnp.where(is_whole, 0, 1)
        worst = jnp.maximum(state.worst, change)
        return step, HeldOutputs(inner_state, change, worst, state.num_steps + 1, shortened)

    return optax.GradientTransformationExtraArgs(init, update)


@jit_part
def _change(manifold: AbstractManifold, point: Point) -> Scalar:
    return jnp.max(jnp.abs(manifold.constraint(point)))


@jit_part
def _normal_space(manifold: AbstractManifold, point: Point) -> AbstractNormalSpace:
    return manifold.normal_space(point)


@jit_part
def _held_step(
    manifold: AbstractManifold,
    space: AbstractNormalSpace,
    here: Coordinates,
    remainder: Point,
    wanted: Tangent,
    bound: Scalar,
) -> tuple[Tangent, Scalar, Array]:
    """The step, the largest change of outputs after it, and whether it was not shortened."""
    value_after = lambda step: manifold.constraint(_tree.join(_tree.add(here, step), remainder))
    along = space.tangent(wanted)

    def tried(share: Scalar) -> tuple[Scalar, Tangent, Scalar]:
        step = _tree.scale(share, along)
        step = _tree.subtract(step, space.pseudo_inverse(value_after(step)))
        return share, step, jnp.max(jnp.abs(value_after(step)))

    def is_too_long(found: tuple[Scalar, Tangent, Scalar]) -> Array:
        share, _, change = found
        # Not `change > bound`, which is False, and so the end of it, where the change is NaN.
        return ~(change <= bound) & (share > 2.0**-_MOST_HALVINGS)

    whole = tried(jnp.ones((), jnp.float32))
    share, step, change = jax.lax.while_loop(is_too_long, lambda f: tried(f[0] / 2), whole)
    return step, change, share == 1
