"""Pages of README and docs/ as programs: their blocks of code, what they print, where they lead."""

import decimal
import json
import pathlib
import re
from typing import Any, NamedTuple

import pytest

import processes

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TIME_LIMIT = 60.0
# Importing the package, which a program that is forked has done.
IMPORTS = 4.0


class Program(NamedTuple):
    """Blocks that are run together.

    Attributes:
        name: for messages.
        files: name → text, in the order in which they are run.
        output: the text that the page shows below, "" for none.
    """

    name: str
    files: dict[str, str]
    output: str


def programs(path: pathlib.Path) -> list[Program]:
    """Every python block of a page alone, but those with a title together, as files of a folder."""
    text, titled, found = path.read_text(encoding="utf-8"), {}, []
    name = path.relative_to(ROOT).as_posix()
    for block in BLOCK.finditer(text):
        language, title, code = block.groups()
        if language != "python":
            continue
        below = BLOCK.match(text, block.end() + len("\n\n"))
        output = below.group(3) if below and below.group(1) == "text" else ""
        if title:
            titled[title] = code
            output_of_titled = output
        else:
            found.append(Program(f"{name}[{len(found)}]", {"block.py": code}, output))
    if titled:
        found.append(Program(f"{name}[{', '.join(titled)}]", titled, output_of_titled))
    return found


def run(program: Program, folder: pathlib.Path) -> None:
    """Run the files in a fresh folder; they succeed, in time, and print what the page shows.

    Counted in processor time, which other programs on the machine hardly stretch. Compiled as
    the tests are, quickly rather than well.
    """
    code = "\n".join(program.files.values())
    for library, extra in (("flax", "models"), ("haiku", "models")):
        if re.search(rf"^(?:import|from) {library}\b", code, re.MULTILINE):
            pytest.importorskip(library, reason=f"of the `{extra}` extra, which is part of `test`")
    for name, text in program.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    seconds, printed = IMPORTS, ""
    for name in program.files:
        is_test = name.startswith("test_")
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if is_test else []
        process = processes.Running([*arguments, name], folder, {"PYTEST_ADDOPTS": ""})
        done = process.finished(10 * TIME_LIMIT)
        seconds += done.seconds
        printed += done.stdout
        assert done.returncode == 0, f"{program.name}, {name}:\n{printed}{done.stderr[-4000:]}"
    print(f"{program.name}: {seconds:.1f} s\n{printed}")
    assert seconds < TIME_LIMIT, f"{program.name}: {seconds:.1f} s, bound {TIME_LIMIT} s"
    given = _lines(printed)
    missing = [
        line for line in _lines(program.output) if not any(agree(line, each) for each in given)
    ]
    assert not missing, f"{program.name} shows lines that it does not print: {missing}\n{printed}"


def _lines(text: str) -> list[str]:
    """The lines, with one space for many; a line of … is left out."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line not in ("", "…")]


def agree(shown: str, printed: str) -> bool:
    """Whether a line begins as the page shows it, with numbers that are the same to 10 %.

    Of those below 1e-4, which are rounding errors, only that they are.
    """
    words, pattern = NUMBER.split(shown), f"({NUMBER.pattern})"
    found = re.match(pattern.join(map(re.escape, words)), printed)
    if not found:
        return False
    pairs = [(float(a), float(b)) for a, b in zip(NUMBER.findall(shown), found.groups())]
    return all(abs(a - b) <= max(0.1 * abs(a), 1e-4) for a, b in pairs)


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page; of each its rows, as header → cell."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                          for line in table.splitlines())  # fmt: skip
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def results(name: str) -> list[dict[str, Any]]:
    """The rows that a benchmark has kept."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def rounds(value: float, shown: str) -> bool:
    """Whether a number as a page shows it is a value, rounded to as many digits."""
    number = decimal.Decimal(shown.replace(",", ""))
    unit = decimal.Decimal(1).scaleb(int(number.as_tuple().exponent))
    return abs(decimal.Decimal(value) - number) <= unit / 2


def dead_links(path: pathlib.Path) -> list[str]:
    """Links of a page to files that do not exist."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(text) if not (path.parent / link).exists()]
