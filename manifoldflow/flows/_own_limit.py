"""The drift of an update that replaces the parts of SGD's drift."""

from collections.abc import Callable
from typing import NamedTuple

from manifoldflow._types import Flag, Tangent


class OwnLimit(NamedTuple):
    """The drift of an update with a limit of its own, at a point.

    Attributes:
        drift: of the noise, without slow drifts.
        project: Π, for slow drifts.
        is_fine: True where the hypotheses hold; else the drift is NaN.
    """

    drift: Tangent
    project: Callable[[Tangent], Tangent]
    is_fine: Flag
