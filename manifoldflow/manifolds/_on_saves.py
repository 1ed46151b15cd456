"""Steps that end on the saves, so that what is saved is the end of a step as it is.

What lies between the ends of steps is off the manifold: to save it would take an interpolation
and one more landing, which would be a quarter of the program.
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


def _shared(begin: Any, size: Any, ends: Float[Array, " ends"]) -> Array:
    """Where the step from `begin` ends: one of equal ones to the next of the ends.

    As few as are no longer than asked for, so that none is left over that is much shorter.
    """
    end = jnp.min(jnp.where(ends > begin, ends, ends[-1]))
    way = end - begin
    # The last of equal steps must not be cut in two for a rounding error.
    count = jnp.ceil(way / size * (1 - 1e-6))
    return jnp.where(count > 1, begin + way / jnp.maximum(count, 1), end)


class StepsOnSaves(dfx.AbstractStepSizeController):
    """Equal steps of at most the given size from end to end."""

    ends: Float[Array, " ends"]

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return _shared(t0, dt0, self.ends), dt0

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        going = jnp.asarray(True), t1, _shared(t1, state, self.ends), False
        return *going, state, dfx.RESULTS.successful


class AdaptiveStepsOnSaves(dfx.AbstractAdaptiveStepSizeController):
    """Steps of a size that another controller chooses, or a little less, from end to end."""

    controller: dfx.AbstractAdaptiveStepSizeController
    ends: Float[Array, " ends"]

    def __init__(
        self, controller: dfx.AbstractAdaptiveStepSizeController, ends: Float[Array, " ends"]
    ):
        self.controller = controller
        self.ends = ends

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
        end, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return _shared(t0, end - t0, self.ends), (inner, end - t0)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        inner, before = state
        keeps, begin, end, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, inner
        )
        # A step that was cut short for a save does not make the next one short.
        size = jnp.where(keeps & (t1 - t0 < before), jnp.maximum(end - begin, before), end - begin)
        return keeps, begin, _shared(begin, size, self.ends), made_jump, (inner, size), result
