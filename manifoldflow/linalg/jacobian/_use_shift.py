"""A shift: z = y ± w, as of a bias. Its row is ±δ, summed over the axes that were broadcast."""

from jaxtyping import Array, Float

from manifoldflow.linalg.jacobian._block import LeafView
from manifoldflow.linalg.jacobian._use import (
    AbstractElementwise,
    Equation,
    Recognised,
    register_use,
)
from manifoldflow.linalg.jacobian._use_rows import RowBlock, rows_of


@register_use("add")
@register_use("add_any")
@register_use("sub")
class Shift(AbstractElementwise):
    """z = y ± w."""

    @classmethod
    def recognise(cls, equation: Equation, index: int) -> Recognised:
        is_negative = equation.name == "sub" and index == 1
        return Recognised(cls(), scale=-1 if is_negative else None)

    def block(self, delta: Float[Array, "n k ..."], factor: None, leaf: LeafView) -> RowBlock:
        return rows_of(lambda w, _: w, delta, factor, leaf)
