"""Docstrings begin with a plain line, and every public name has an example that runs.

The examples run in double precision, whose digits they show.
"""

import ast
import doctest
import inspect
import io
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

from test_architecture import modules, PACKAGE, parsed, public_names, sources

ROOMS = ["manifoldflow", *sorted(m.__name__ for m in modules() if "._" not in m.__name__)]

# Such a line says what is asked, and not what is given.
QUESTION = re.compile(r"(How|What|Whatever|Whether|Where|Which|Why|Who|Whoever|When)\b")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def questions(tree: ast.Module) -> Iterator[str]:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and QUESTION.match(text):
            yield f"{getattr(node, 'name', '')}: {text.splitlines()[0]}"


def test_docstrings_begin_plainly():
    """With what is given, subject first."""
    found = [
        f"{path.relative_to(PACKAGE)}: {question}"
        for path in sources(PACKAGE)
        for question in questions(parsed(path))
    ]
    assert not found, "\n".join(found)


def test_a_question_is_seen():
    tree = ast.parse('"""Whether."""\ndef plain():\n    """It."""\ndef f():\n    """How so?"""\n')
    assert list(questions(tree)) == [": Whether.", "f: How so?"]


def named_in(room: str) -> dict[str, Any]:
    """Name → object, for what this room exports; at the root, what no other room does.

    Left out are rooms themselves, and old names: aliases of objects with another name.
    """
    names = public_names()
    elsewhere = {id(obj) for name, obj in names.items() if name.count(".") > 1}
    return {
        name.rpartition(".")[2]: obj
        for name, obj in names.items()
        if name.rpartition(".")[0] == room
        and not isinstance(obj, types.ModuleType)
        and obj.__name__ == name.rpartition(".")[2]
        and not (room == "manifoldflow" and id(obj) in elsewhere)
    }


def docstring(obj: Any) -> str:
    """What was written for the object itself, not for its base class."""
    text = vars(obj).get("__doc__") if isinstance(obj, type) else obj.__doc__
    return inspect.cleandoc(text or "")


def run_examples(name: str, text: str) -> tuple[int, str]:
    """The number of statements in the examples, and a report of those that went wrong."""
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, None, 0)
    said = io.StringIO()
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.write)
    return len(test.examples), said.getvalue()


@pytest.mark.every_case
@pytest.mark.parametrize("room", ROOMS)
def test_examples_run(room):
    """Each stands on its own, and gives what it says that it gives."""
    if room == "manifoldflow.plotting":
        pytest.importorskip("matplotlib")
    faults = []
    for name, obj in named_in(room).items():
        text = docstring(obj)
        count, report = run_examples(f"{room}.{name}", text)
        if not count or not re.search(r"^Examples:$", text, re.MULTILINE):
            faults.append(f"{room}.{name} has no example in a section `Examples:`")
        faults += [report] if report else []
    assert not faults, "\n".join(faults)


def test_rooms_are_looked_into():
    found = {f"{room}.{name}" for room in ROOMS for name in named_in(room)}
    assert {"manifoldflow.split", "manifoldflow.losses.LeastSquares"} <= found
    assert "manifoldflow.LeastSquares" not in found
    assert not any(name.rpartition(".")[2] == "Walk" for name in found)


@pytest.mark.parametrize(
    "text", [">>> 1 + 1\n3", ">>> undefined\n1", ">>> import warnings\n>>> warnings.warn('x')\n"]
)
def test_a_bad_example_is_seen(text):
    assert run_examples("bad", text)[1]
