"""The README: its examples run, its links lead somewhere."""

import pytest

import pages

README = pages.ROOT / "README.md"
PROGRAMS = pages.programs(README)


def test_there_is_an_example():
    assert PROGRAMS, "README.md has no python block"


@pytest.mark.every_case
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_example_runs(number, tmp_path):
    """Every block stands alone, needs less than a minute, and prints what is shown."""
    pages.run(PROGRAMS[number], tmp_path)


def test_example_needs_no_extra():
    """What CI runs from the built wheel, with the library's own dependencies alone."""
    extras = "matplotlib", "sklearn", "flax", "haiku", "models.digits"
    code = "".join(text for program in PROGRAMS for text in program.files.values())
    assert not [extra for extra in extras if extra in code]


def test_links_lead_somewhere():
    missing = pages.dead_links(README)
    assert not missing, f"README.md links to files that do not exist: {missing}"


def test_names_the_test_command():
    assert "python -m pytest" in README.read_text(encoding="utf-8")
