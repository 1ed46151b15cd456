"""One look for all pictures: the style, its colours to all kinds of eyes, surfaces and files."""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

import manifoldflow as mf
from checks import at_least, at_most, close, equal, refused
from manifoldflow import plotting
from manifoldflow.plotting import Colour

pytestmark = pytest.mark.quick

# What is left of linear red, green and blue, by Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "all cones": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def seen(colour, eye="all cones"):
    """CIELAB of what an eye sees: a distance of some 2.3 is just noticed."""
    given = np.array(colors.to_rgb(colour))
    linear = np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)
    xyz = np.asarray(TO_XYZ) @ np.clip(np.asarray(EYES[eye]) @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_all_kinds_of_eyes_tell_the_colours_apart(eye):
    for one, other in itertools.combinations(Colour, 2):
        distance = np.linalg.norm(seen(one, eye) - seen(other, eye))
        at_least(f"{one.name} and {other.name} with {eye}", distance, 15)
    for colour in Colour:
        at_least(f"{colour.name} on white", 100 - seen(colour, eye)[0], 25)


def test_red_and_green_would_be_noticed():
    """The test above has to fail for them."""
    distance = np.linalg.norm(seen("#b05a3c", "no green cones") - seen("#6f7a30", "no green cones"))
    at_most("a red and a green without green cones", distance, 15)


def test_each_colour_has_its_meaning():
    for colour in Colour:
        assert f"{colour.name}: " in Colour.__doc__


def test_the_style_suits_talks():
    with plt.style.context("manifoldflow.plotting.talk"):
        at_least("dpi", plt.rcParams["figure.dpi"], 150)
        for name in ("legend.fontsize", "xtick.labelsize", "font.size", "legend.title_fontsize"):
            at_least(name, plt.rcParams[name], 9)
        order = [c.lower() for c in plt.rcParams["axes.prop_cycle"].by_key()["color"]]
    named = [c.lower() for c in Colour if c is not Colour.REFERENCE]
    assert [c for c in order if c in named] == named, f"{order}, {named}"


def test_library_pictures_are_in_the_style_and_leave_no_settings():
    check = mf.diagnostics.SlopeCheck(
        "slope", 2.0, 2.0, (0.01, 0.1), np.array([0.01, 0.1]), np.array([1e-4, 1e-2]), True
    )
    before = dict(plt.rcParams)
    axes = plotting.plot_check(check)
    assert dict(plt.rcParams) == before
    at_least("dpi", axes.figure.dpi, 150)
    texts = {text.get_text(): text.get_fontsize() for text in axes.get_legend().get_texts()}
    assert "slope 2, theory" in texts and min(texts.values()) >= 9, texts
    plt.close(axes.figure)


def test_shades_go_from_light_to_dark():
    for colour in (Colour.SGD, Colour.LIMIT):
        lightness = [seen(shade)[0] for shade in plotting.shades(colour, 5)]
        at_least("steps in lightness", -np.max(np.diff(lightness)), 4)
        close("the middle", plotting.shades(colour, 5)[2], colors.to_rgb(colour), 1e-12)
    close("one", plotting.shades("C0", 1), [colors.to_rgb("C0")], 1e-12)
    with refused(ValueError, "shades: colour must be one of matplotlib's", "'no colour'"):
        plotting.shades("no colour", 2)
    with refused(ValueError, "number must be a positive integer; got 0"):
        plotting.shades("k", 0)


def test_a_surface_and_what_can_be_seen_on_it():
    """Of a great circle of the sphere one half faces the eye: where ⟨normal, eye⟩ > 0."""
    figure = plt.figure()
    axes = plotting.surface_axes(figure, limit=2.0, height=1.5, elevation=0.0, azimuth=0.0)
    equal("limits", (*axes.get_xlim(), *axes.get_zlim()), (-2.0, 2.0, -1.5, 1.5))
    turn = np.linspace(0, 2 * np.pi, 100, endpoint=False) + 0.01
    circle = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    plotting.draw_curve(axes, circle, 3 * circle, color="k")
    drawn = np.array(axes.lines[0].get_data_3d()).T
    front = circle[:, 0] > 0
    close("in front", drawn[front], circle[front], 0)
    assert np.isnan(drawn[~front]).all(), "the far side is drawn"

    up, around = np.meshgrid(np.linspace(0.5, 2.5, 4), np.linspace(0, 1, 6), indexing="ij")
    points = np.stack([np.sin(up) * np.cos(around), np.sin(up) * np.sin(around), np.cos(up)], -1)
    norm = plt.Normalize(0, 5)
    values = np.arange(6.0) * np.ones((4, 1))  # patches have 0.5, 1.5, …
    plotting.draw_surface(axes, points, values, norm=norm, cmap="viridis", pale=0.25)
    faces = axes.collections[0].get_facecolor()
    plain = plt.get_cmap("viridis")(norm(np.tile(np.arange(5) + 0.5, 3)))
    in_order = lambda rows: sorted(
        map(tuple, np.round(rows, 5))
    )  # matplotlib has the far ones first
    expected = plain + 0.25 * (1 - plain)
    close("colours of the patches", in_order(faces), in_order(expected), 1e-4)
    with refused(ValueError, "draw_surface: points must be"):
        plotting.draw_surface(axes, points, values[1:], norm=norm, cmap="viridis")
    with refused(ValueError, "draw_curve: points and normals must be"):
        plotting.draw_curve(axes, circle, circle[1:])
    with refused(ValueError, "limit must be positive"):
        plotting.surface_axes(figure, limit=-1.0)
    plt.close(figure)


def test_light_pictures():
    """The same pixels within what few colours can show, in a third of the bytes."""
    figure, axes = plt.subplots(figsize=(4, 3), dpi=150)
    for k in range(20):
        axes.plot(np.sin(np.linspace(0, k, 200)), lw=2, color=plt.get_cmap("viridis")(k / 20))
    whole = io.BytesIO()
    figure.savefig(whole, bbox_inches="tight")
    light = plotting.light_png(figure, 64)
    picture, full = Image.open(io.BytesIO(light)), Image.open(whole)
    equal("pixels", picture.size, full.size)
    assert len(picture.convert("RGB").getcolors()) <= 64 and round(picture.info["dpi"][0]) == 150
    off = np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(full.convert("RGB"), float))
    at_most("mean error of a channel of 255", off.mean(), 2)
    at_most("bytes, of the whole", len(light) / len(whole.getvalue()), 0.5)
    with refused(ValueError, "num_colours must be from 2 to 256; got 1000"):
        plotting.light_png(figure, 1000)
    plt.close(figure)
