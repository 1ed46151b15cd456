"""Notebooks say what they show and how long they take; a cell to try; pictures for talks."""

import base64
import io
import json
import pathlib
import re

import pytest
from PIL import Image

from checks import at_least, equal

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
STYLE = 'plt.style.use("manifoldflow.plotting.talk")'


def cells(path):
    """(kind, text, outputs) of each."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in found]


IN_STYLE = [
    path for path in NOTEBOOKS if STYLE in path.read_text(encoding="utf-8").replace("\\", "")
]


@pytest.mark.parametrize("path", IN_STYLE, ids=lambda path: path.stem)
def test_a_notebook_for_talks(path):
    """All that have the style, which the others get when they are run anew."""
    found = cells(path)
    opening = found[0][1]
    assert opening.startswith("# ") and "agree" in opening, "how far it agrees is said at the start"
    assert re.search(r"Full run: \d+ CPU seconds\.", opening), "so is how long it takes"
    tries = [i for i, (_, text, _) in enumerate(found) if text.startswith("## Try yourself")]
    assert tries and tries[-1] >= len(found) - 3, "a cell to try stands near the end"
    assert found[tries[-1] + 1][0] == "code" and found[tries[-1] + 1][2], "it has run"


def test_some_notebooks_are_in_the_style():
    assert "04_geometry" in [path.stem for path in IN_STYLE]


@pytest.mark.parametrize("path", IN_STYLE, ids=lambda path: path.stem)
def test_pictures_have_enough_dots(path):
    for _, text, outputs in cells(path):
        for output in outputs:
            assert output["output_type"] != "error", text
            picture = output.get("data", {}).get("image/png")
            if picture:
                image = Image.open(io.BytesIO(base64.b64decode("".join(picture))))
                at_least("dots per inch", round(image.info["dpi"][0]), 150)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in found if cell["cell_type"] == "code"]
    equal(path.name, counts, list(range(1, len(counts) + 1)))
