"""A scale: z = w ⊙ g, as in a normalisation. Its row is δ ⊙ g, summed over broadcast axes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from manifoldflow.linalg.jacobian._block import LeafView
from manifoldflow.linalg.jacobian._interpreter import Interpreter, times, Value
from manifoldflow.linalg.jacobian._use import AbstractElementwise, Equation, met, Recognised, rule
from manifoldflow.linalg.jacobian._use_rows import RowBlock, rows_of


class Scale(AbstractElementwise):
    """z = w ⊙ g, or w / g."""

    @classmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        other = equation.operands[1 - index]
        return Recognised(cls(), 1 / other if equation.name == "div" else other)

    def block(self, delta: Float[Array, "n k ..."], factor: Array, leaf: LeafView) -> RowBlock:
        return rows_of(lambda w, g: w * g.astype(w.dtype), delta, factor, leaf)


@rule("mul", "div")
def _product(interpreter: Interpreter, eqn: Any, inputs: list[Value]) -> list[Value] | None:
    """A number times a leaf is still that leaf, scaled; all else is a use of it."""
    divides = eqn.primitive.name == "div"
    if divides and inputs[1].alias is not None:
        return None
    for value, other in ((inputs[0], inputs[1]), (inputs[1], inputs[0])):
        if value.alias is not None and jnp.ndim(other.array) == 0 < jnp.ndim(value.array):
            (output,) = interpreter.plain(eqn, inputs)
            # The number may be a leaf as well. The product is then a use of it that leaves no tap.
            interpreter.give_up([other])
            factor = 1 / other.array if divides else other.array
            alias = value.alias._replace(scale=times(value.alias.scale, factor))
            return [Value(output.array, alias)]
    return met(interpreter, eqn, inputs, Scale)
