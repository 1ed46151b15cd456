"""Surfaces in space with curves on them, of which the side that faces away is hidden."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from manifoldflow._boundary import checked
from manifoldflow._errors import checked_number, checked_positive


@checked
def surface_axes(
    figure: Figure,
    place: Any = (1, 1, 1),
    *,
    limit: float = 1.0,
    height: float | None = None,
    elevation: float = 22.0,
    azimuth: float = 35.0,
) -> Any:
    """Axes for a surface in space, seen from far away and with one scale for all three.

    Args:
        figure: where they go.
        place: as of `figure.add_subplot`: rows, columns, number; or a cell of a grid.
        limit: they show [−limit, limit] in the first two coordinates.
        height: and [−height, height] in the third; `limit` by default.
        elevation: of the eye above the first two coordinates, in degrees.
        azimuth: of the eye, in degrees from the first coordinate.

    Returns:
        The axes, for `draw_surface` and `draw_curve`.

    Raises:
        ValueError: if a limit is not positive, or an angle not finite.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> from manifoldflow.plotting import surface_axes
        >>> axes = surface_axes(plt.figure(), (1, 2, 1), limit=2.0)
        >>> axes.get_xlim() == axes.get_zlim() == (-2.0, 2.0)
        True
    """
    limit = float(checked_positive("limit", limit))
    height = limit if height is None else float(checked_positive("height", height))
    angles = checked_number("elevation", elevation), checked_number("azimuth", azimuth)
    cell = place if isinstance(place, tuple) else (place,)
    # In the order of drawing: matplotlib would sort whole objects by depth, and hide a curve behind
    # the surface that it lies on.
    axes: Any = figure.add_subplot(*cell, projection="3d", computed_zorder=False)
    axes.set_proj_type("ortho")
    axes.view_init(*map(float, angles))
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-height, height))
    axes.set_box_aspect((1, 1, height / limit), zoom=1.1)
    axes.set(xlabel="$x$", ylabel="$y$", zlabel="$z$")
    axes.tick_params(labelsize=8, pad=0)
    return axes


@checked
def draw_surface(
    axes: Any, points: Any, values: Any, *, norm: Any, cmap: Any, pale: float = 0.0
) -> None:
    """A surface, coloured by a function on it.

    Args:
        axes: from `surface_axes`.
        points: (rows, columns, 3), a grid on the surface.
        values: (rows, columns), the function there; a patch has the mean of its corners.
        norm: of matplotlib, from values to [0, 1].
        cmap: a colour map of matplotlib, or its name.
        pale: from 0, the colours of the map, to 1, white: for curves to stand out.

    Raises:
        ValueError: if the shapes do not belong together.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from manifoldflow.plotting import draw_surface, surface_axes
        >>> axes, grid = surface_axes(plt.figure()), np.zeros((4, 5, 3))
        >>> draw_surface(axes, grid, grid[..., 0], norm=plt.Normalize(0, 1), cmap="viridis")
    """
    points, values = np.asarray(points), np.asarray(values)
    if points.ndim != 3 or points.shape[-1] != 3 or values.shape != points.shape[:2]:
        raise ValueError(
            "draw_surface: points must be (rows, columns, 3) and values (rows, columns); got "
            f"{points.shape} and {values.shape}."
        )
    middles = (values[1:, 1:] + values[1:, :-1] + values[:-1, 1:] + values[:-1, :-1]) / 4
    colours = plt.get_cmap(cmap)(norm(middles))
    axes.plot_surface(
        *np.moveaxis(points, -1, 0), facecolors=colours + pale * (1 - colours), rstride=1,
        cstride=1, shade=False, linewidth=0, antialiased=False, zorder=1,
    )  # fmt: skip


@checked
def draw_curve(axes: Any, points: Any, normals: Any, **style: Any) -> None:
    """A curve on a surface, where the surface faces the eye.

    That is all that can be seen of a convex surface; of others it is more.

    Args:
        axes: from `surface_axes`.
        points: (n, 3), along the curve.
        normals: (n, 3), outer normals of the surface there, of any length.
        style: as of matplotlib's `plot`.

    Raises:
        ValueError: if the shapes are not as said.

    Examples:
        >>> import matplotlib.pyplot as plt
        >>> import numpy as np
        >>> from manifoldflow.plotting import draw_curve, surface_axes
        >>> line = np.eye(3)  # on the unit sphere, whose normals are its points
        >>> draw_curve(surface_axes(plt.figure()), line, line, color="k")
    """
    points, normals = np.asarray(points), np.asarray(normals)
    if points.ndim != 2 or points.shape[-1] != 3 or normals.shape != points.shape:
        raise ValueError(
            "draw_curve: points and normals must be (n, 3) both; got "
            f"{points.shape} and {normals.shape}."
        )
    up, around = np.radians(axes.elev), np.radians(axes.azim)
    eye = np.array([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)])
    faces_eye = (normals @ eye > 0)[:, None]
    axes.plot(*np.where(faces_eye, points, np.nan).T, **{"zorder": 3, **style})
