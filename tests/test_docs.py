"""The pages of docs/: their examples run, their links lead somewhere, and nothing is left out."""

import re
import sys

import pytest

import manifoldflow as mf
import pages
from test_architecture import public_names

DOCS = pages.ROOT / "docs"
sys.path.append(str(DOCS))
import hooks

PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = [program for page in PAGES for program in pages.programs(page)]
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.every_case
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_example_runs(program, tmp_path):
    """Each stands alone, needs less than a minute, and prints what the page shows."""
    pages.run(program, tmp_path)


def test_links_lead_somewhere():
    missing = {page.name: pages.dead_links(page) for page in PAGES}
    assert not any(missing.values()), missing


def test_every_public_name_is_on_a_page():
    """By the pages of the packages, as they are written into the site."""
    shown = {package: hooks.package_page(package) for package in hooks.packages()}
    missing = [
        name
        for name in public_names()
        for package, _, last in [name.rpartition(".")]
        if not re.search(rf"^::: {re.escape(name)}$", shown[package], re.MULTILINE)
        and f"[`{last}`]" not in shown[package]
    ]
    assert not missing, f"public names that are on no page: {missing}"


def test_every_name_of_another_package_is_linked_to_its_page():
    """What a package shows by a link is written out on the page that the link leads to."""
    for package in hooks.packages():
        for home in re.findall(r"\]\[([\w.]+)\]", hooks.package_page(package)):
            page = hooks.package_page(home.rpartition(".")[0])
            assert f"::: {home}\n" in page, f"{package} links to {home}, which is not there"


def test_every_result_is_explained():
    """`When things fail` has a section for each member of RESULTS, with its first sentence."""
    text = " ".join(TEXTS["failures.md"].split())
    for name in result_names():
        assert f"### `{name}`" in text, f"failures.md has no section on RESULTS.{name}"
        sentence = re.split(r"(?<=[.?!]) ", mf.RESULTS[getattr(mf.RESULTS, name)])[0]
        assert " ".join(sentence.split()) in text, f"failures.md does not have: {sentence}"


def result_names():
    """All members, by the enumeration itself."""
    return list(mf.RESULTS._name_to_item)


def test_results_are_found():
    assert {"successful", "diverged", "unstable"} <= set(result_names())


def test_gallery_has_every_notebook():
    for notebook in hooks.notebooks():
        found = re.search(rf"{notebook.name}#picture-(\d+)\)$", TEXTS["gallery.md"], re.MULTILINE)
        assert found, f"gallery.md shows no picture of {notebook.name}"
        pictures = [name for name in hooks.notebook_pages(notebook) if not name.endswith(".md")]
        assert int(found[1]) <= len(pictures), f"{notebook.name} has {len(pictures)} pictures"


def test_every_citation_has_its_reference():
    """Keys as LiWangArora2022, wherever they are cited."""
    key = re.compile(r"\[([A-Z]\w+[a-z](?:19|20)\d\d)[\],;]")
    folders = "manifoldflow", "tests", "docs", "notebooks"
    files = [path for folder in folders for path in (pages.ROOT / folder).rglob("*.*")]
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix in (".py", ".md", ".ipynb")]
    cited = {found for text in texts for found in key.findall(text)}
    listed = set(re.findall(r"^- \*\*(\w+)\*\*", TEXTS["references.md"], re.MULTILINE))
    assert {"LiWangArora2022", "Ziyin2024"} <= cited
    assert cited <= listed, f"cited, and not in references.md: {sorted(cited - listed)}"


def test_citation_file_has_every_reference():
    """CITATION.cff has as many papers as references.md, with the same years."""
    listed = re.findall(r"^- \*\*[A-Za-z]+(\d{4})\*\*", TEXTS["references.md"], re.MULTILINE)
    citation = (pages.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^    year: (\d{4})$", citation, re.MULTILINE)) == sorted(listed)


@pytest.mark.parametrize(
    ("shown", "printed", "agree"),
    [
        ("tr 31.2 of 1e-07", "tr 31.0 of 8e-06", True),
        ("tr 31.2", "tr 26.0", False),
        ("4 passed", "4 passed in 3.2s", True),
        ("holds: True", "holds: False", False),
        ("η = 0.1: 5", "η = 0.1", False),
    ],
)
def test_shown_lines_are_compared(shown, printed, agree):
    assert pages.agree(shown, printed) == agree
