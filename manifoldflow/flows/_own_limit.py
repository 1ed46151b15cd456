"""The drift of an update that replaces the parts of SGD's drift."""

from collections.abc import Callable
from typing import NamedTuple

from manifoldflow._types import Flag, Tangent


class OwnLimit(NamedTuple):
    """A drift at a point.

    Attributes:
        drift: of the noise, without what is slow.
        project: Π, for what is slow.
        is_fine: whether the hypotheses hold; else the drift is NaN.
    """

    drift: Tangent
    project: Callable[[Tangent], Tangent]
    is_fine: Flag
