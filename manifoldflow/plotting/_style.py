"""One look for all pictures: a style, and colours that mean the same everywhere."""

import enum
import functools
from collections.abc import Callable
from typing import Any, cast, TypeVar

import matplotlib.pyplot as plt
from matplotlib import colors

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count

TALK = "manifoldflow.plotting.talk"
Function = TypeVar("Function", bound=Callable[..., Any])


def styled(draw: Function) -> Function:
    """The function, which draws in the style, whatever the settings around it are."""

    @functools.wraps(draw)
    def in_style(*arguments: Any, **options: Any) -> Any:
        with plt.style.context(TALK):
            return draw(*arguments, **options)

    return cast(Function, in_style)


class Colour(enum.StrEnum):
    """Colours of Okabe and Ito, which colour-blind people tell apart; each has one meaning.

    SGD: runs of an optimiser itself, and networks that it made.
    LIMIT: the limit of small learning rates, and what follows it.
    GRADIENT_FLOW: gradient flow, and where it lands.
    PROJECTION: the nearest point, and other ways to the manifold; what has been balanced.
    TEST: what is measured on examples that nobody trained on.
    DATA: examples, truths, targets, and what is measured without belonging to one of the above.
    REFERENCE: theory, bounds and other lines that are no data; they are dashed or dotted.

    The style `plt.style.use("manifoldflow.plotting.talk")` has them in this order for a plot's
    lines, 150 dpi and legends of 9 points. A member is a string that matplotlib takes.

    Examples:
        >>> from manifoldflow.plotting import Colour
        >>> str(Colour.LIMIT)
        '#0072B2'
    """

    SGD = "#D55E00"
    LIMIT = "#0072B2"
    GRADIENT_FLOW = "#009E73"
    PROJECTION = "#CC79A7"
    TEST = "#E69F00"
    DATA = "#000000"
    REFERENCE = "#4D4D4D"


@checked
def shades(colour: str, number: int) -> list[tuple[float, float, float]]:
    """So many shades of one colour, from light to dark: one meaning at several sizes.

    The lightest is half white and the darkest half black, so that the order can be seen in grey
    as well.

    Args:
        colour: any colour of matplotlib, such as a `Colour`.
        number: how many, at least 1; a single one is the colour itself.

    Returns:
        A list of (red, green, blue), each from 0 to 1.

    Raises:
        ValueError: if the colour is none of matplotlib's, or the number is not positive.

    Examples:
        >>> from manifoldflow.plotting import Colour, shades
        >>> light, same, dark = shades(Colour.SGD, 3)
        >>> sum(light) > sum(same) > sum(dark)
        True
    """
    number = checked_count("number", number)
    if not colors.is_color_like(colour):
        raise ValueError(
            f"shades: colour must be one of matplotlib's, e.g. '#0072B2'; got {colour!r}."
        )
    middle = colors.to_rgb(colour)
    places = [2 * i / max(number - 1, 1) - (number > 1) for i in range(number)]
    return [_shade(middle, place) for place in places]


def _shade(middle: tuple[float, float, float], place: float) -> Any:
    """From −1, light, over 0, the colour itself, to 1, dark."""
    towards = 1.0 if place < 0 else 0.0
    share = abs(place) / 2
    return tuple((1 - share) * part + share * towards for part in middle)
