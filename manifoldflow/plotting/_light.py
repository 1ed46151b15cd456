"""Pictures of few bytes: pixels in a few colours."""

import io

from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count


@checked
def light_png(figure: Figure, num_colours: int = 64) -> bytes:
    """The figure as a PNG file with a palette and no empty margins: a third of the bytes or so.

    In a notebook: `IPython.display.Image(light_png(figure), width=…)`.

    Args:
        figure: of matplotlib; its own `dpi` counts.
        num_colours: from 2 to 256. Lines need some 64, surfaces with many hues more.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: if the number of colours is out of range.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> from manifoldflow.plotting import light_png
        >>> light_png(plt.figure())[1:4]
        b'PNG'
    """
    from PIL import Image

    num_colours = checked_count("num_colours", num_colours)
    if not 2 <= num_colours <= 256:
        raise ValueError(f"light_png: num_colours must be from 2 to 256; got {num_colours}.")
    drawn, saved = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=figure.dpi, bbox_inches="tight")
    # Dithering would scatter pixels of other colours, which PNG cannot compress.
    picture = Image.open(drawn).convert("RGB").quantize(num_colours, dither=Image.Dither.NONE)
    picture.save(saved, "PNG", optimize=True, dpi=(figure.dpi, figure.dpi))
    return saved.getvalue()
