"""Solves from save to save: each leg is one Diffrax solve that ends on a save.

What lies between the ends of steps is off the manifold, so that a save inside a step would take
an interpolation and one more landing. Legs need neither, and Diffrax none of its checks of save
times, which are calls of the host that would keep the program out of the cache on disk.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._types import Scalar

State = TypeVar("State", bound=PyTree[Any])


def over_legs(
    leg: Callable[[State, Any], State],
    save: Callable[[State], tuple[State, Any]],
    state: State,
    ends: PyTree[Array],
) -> tuple[State, PyTree[Array]]:
    """The last state, and all saved, of `state, saved = save(leg(state, end))` for each end.

    In reverse mode one leg after the other is run again, so that only the states between them are
    kept. A single leg is not: it keeps what Diffrax keeps.
    """
    is_single = len(jax.tree.leaves(ends)[0]) == 1
    # Within a scan common subexpressions are safe, and `prevent_cse` would only slow it down.
    follow = leg if is_single else eqx.filter_checkpoint(leg, prevent_cse=False)

    def body(state: State, end: Any) -> tuple[State, Any]:
        return save(follow(state, end))

    if is_single:
        state, saved = body(state, jax.tree.map(lambda leaf: leaf[0], ends))
        return state, jax.tree.map(lambda leaf: leaf[None], saved)
    return jax.lax.scan(body, state, ends)


def _next_end(begin: Any, size: Any, end: Any) -> Array:
    """The end of the step from `begin`: one of equal ones to the end of the leg.

    As few as are no longer than asked for, so that none is left over that is much shorter.
    """
    way = end - begin
    # The last of equal steps must not be cut in two for a rounding error. A leg may be empty.
    count = jnp.ceil(way / _tree.where(size > 0, size, 1) * (1 - 1e-6))
    count = jax.lax.stop_gradient(jnp.maximum(count, 1))
    return _tree.where(count > 1, begin + way / count, end)


class EqualSteps(dfx.AbstractStepSizeController):
    """Equal steps of at most the given size."""

    size: Scalar

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return _next_end(t0, self.size, t1), t1

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        end = _next_end(t1, self.size, state)
        return jnp.asarray(True), t1, end, False, state, dfx.RESULTS.successful


class AdaptiveSteps(dfx.AbstractAdaptiveStepSizeController):
    """Steps of a size that another controller chooses, or a little less.

    Args:
        controller: that other one.
        first: the first step to try, where Diffrax would evaluate the vector field twice.
    """

    controller: dfx.AbstractAdaptiveStepSizeController
    first: Scalar

    def __init__(self, controller: dfx.AbstractAdaptiveStepSizeController, first: Scalar):
        self.controller = controller
        self.first = first

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        return eqx.tree_at(lambda c: c.controller, self, self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del dt0
        first = self.first
        _, inner = self.controller.init(terms, t0, t1, y0, first, args, func, error_order)
        return _next_end(t0, first, t1), (inner, first, t1)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        inner, before, end = state
        keeps, begin, wanted, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        size = wanted - begin
        # A step that was cut short for a save does not make the next one short.
        size = _tree.where(keeps & (t1 - t0 < before), jnp.maximum(size, before), size)
        return keeps, begin, _next_end(begin, size, end), made_jump, (inner, size, end), result


def next_step(solution: dfx.Solution) -> Scalar:
    """The size that `AdaptiveSteps` would have tried after a solve with `controller_state`."""
    assert solution.controller_state is not None
    # The size of a step is no function of the problem: its derivative would be one of the error
    # estimate.
    return jax.lax.stop_gradient(solution.controller_state[1])
