"""Every public name says in one plain line what it is, and shows it in an example that runs."""

import doctest
import inspect
import io
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

from test_architecture import modules, public_names

# Rooms whose docstrings are still to be written.
PENDING = {"linalg", "diagnostics", "symmetry", "theory"}
ROOMS = ["manifoldflow", *sorted(m.__name__ for m in modules() if "._" not in m.__name__)]
ROOMS = [room for room in ROOMS if PENDING.isdisjoint(room.split("."))]

MAX_FIRST_LINE = 100
# A first line that begins with one of these says what is asked, and not what is given.
RIDDLE = re.compile(r"(How|What|Whatever|Whether|Where|Which|Why|Who|Whoever|When)\b")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def named_in(room: str) -> dict[str, Any]:
    """Name → object, for what this room exports; at the root, what no other room does.

    Left out are rooms themselves, and old names: aliases of objects with another name.
    """
    elsewhere = {
        id(obj) for name, obj in public_names().items() if name.rpartition(".")[0] != "manifoldflow"
    }
    return {
        name.rpartition(".")[2]: obj
        for name, obj in public_names().items()
        if name.rpartition(".")[0] == room
        and not isinstance(obj, types.ModuleType)
        and getattr(obj, "__name__", None) == name.rpartition(".")[2]
        and not (room == "manifoldflow" and id(obj) in elsewhere)
    }


def docstring(obj: Any) -> str:
    """What was written for the object itself, not for its base class."""
    text = vars(obj).get("__doc__") if isinstance(obj, type) else obj.__doc__
    return inspect.cleandoc(text or "")


def documented(name: str, obj: Any) -> Iterator[tuple[str, str]]:
    """The docstrings of an object and, of a class, of its public methods and properties."""
    yield name, docstring(obj)
    for member, value in vars(obj).items() if isinstance(obj, type) else ():
        text = getattr(value, "__doc__", None)
        is_written = isinstance(value, property) or callable(value)
        if not member.startswith("_") and is_written and isinstance(text, str):
            yield f"{name}.{member}", inspect.cleandoc(text)


def fault_of(text: str) -> str | None:
    first = text.split("\n", maxsplit=1)[0]
    if not first:
        return "has no first line"
    if RIDDLE.match(first):
        return f"begins with a question: {first}"
    if len(first) > MAX_FIRST_LINE:
        return f"has a first line of {len(first)} characters"
    return None


@pytest.mark.parametrize("room", ROOMS)
def test_first_lines_are_plain(room):
    texts = [pair for name, obj in named_in(room).items() for pair in documented(name, obj)]
    faults = [f"{room}.{name} {fault}" for name, text in texts if (fault := fault_of(text))]
    assert not faults, "\n".join(faults)


def output_of(name: str, text: str) -> tuple[int, str]:
    """How many lines of an example were run, and a report of those that went wrong."""
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, None, 0)
    said = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.write)
    return len(test.examples), said.getvalue()


@pytest.mark.parametrize("room", ROOMS)
def test_examples_run(room):
    """Each stands on its own, and gives what it says that it gives."""
    if room == "manifoldflow.plotting":
        pytest.importorskip("matplotlib")
    faults = []
    for name, obj in named_in(room).items():
        count, report = output_of(f"{room}.{name}", docstring(obj))
        if not count:
            faults.append(f"{room}.{name} has no example")
        elif not re.search(r"^Examples:$", docstring(obj), re.MULTILINE):
            faults.append(f"{room}.{name} has an example outside of a section `Examples:`")
        faults += [report] if report else []
    assert not faults, "\n".join(faults)


def test_rooms_are_looked_into():
    found = {f"{room}.{name}" for room in ROOMS for name in named_in(room)}
    assert {"manifoldflow.split", "manifoldflow.losses.LeastSquares"} <= found
    assert "manifoldflow.LeastSquares" not in found
    assert not any(name.rpartition(".")[2] == "Walk" for name in found)


@pytest.mark.parametrize(
    ("text", "word"),
    [("What a loss is.", "question"), ("", "no first line"), ("x" * 101, "101 characters")],
)
def test_a_bad_first_line_is_seen(text, word):
    assert word in str(fault_of(text))


@pytest.mark.parametrize(
    "text", [">>> 1 + 1\n3", ">>> undefined\n1", ">>> import warnings\n>>> warnings.warn('x')\n"]
)
def test_a_bad_example_is_seen(text):
    assert output_of("bad", text)[1]
