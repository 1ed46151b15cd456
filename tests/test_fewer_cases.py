"""`--fewer-cases` leaves cases out, and no test, no row of a table and no value for ever."""

import dataclasses
import itertools
import pathlib
from types import SimpleNamespace

import pytest

import conftest
from checks import equal


@dataclasses.dataclass(eq=False)
class Case:
    """What `--fewer-cases` asks of a test of pytest's."""

    path: pathlib.Path
    name: str
    originalname: str
    callspec: SimpleNamespace
    marks: tuple

    def get_closest_marker(self, name):
        return name in self.marks or None


def table(*parameters, name="test_it", folder="theorems", marks=()):
    """The cases of one test, as pytest collects them: one for each combination."""
    path = pathlib.Path("tests", folder, "test_file.py")
    return [
        Case(path, f"{name}{case}", name, SimpleNamespace(params=dict(enumerate(case))), marks)
        for case in itertools.product(*parameters)
    ]


def values(cases):
    return [tuple(case.callspec.params.values()) for case in cases]


def chosen(items, asked=True):
    """What is left of them, and what pytest is told to be left out."""
    items, told = list(items), []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    config = SimpleNamespace(getoption=lambda name: asked and name == "--fewer-cases", hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    return items, told


@pytest.mark.parametrize("turn", range(6))
def test_every_row_and_every_value_is_kept(turn):
    """One case of each row; the values of the last parameter come in turn."""
    for rows, last in (("abc", (1, 2, 3)), ("abc", (1, 2)), ("abcde", (1, 2, 3))):
        kept = values(conftest.fewer(table(rows, last), turn))
        equal("rows", [row for row, _ in kept], list(rows))
        equal("values", {value for _, value in kept}, set(last))


def test_every_row_of_several_parameters_is_kept():
    kept = values(conftest.fewer(table("ab", "xy", (1, 2)), 0))
    equal("rows", [row[:-1] for row in kept], list(itertools.product("ab", "xy")))


def test_turns_go_through_all_of_a_table():
    for parameters in (("ab",), ("abc",), ("abcdefg",), ("ab", (1, 2, 3))):
        cases = table(*parameters)
        turns = [values(conftest.fewer(cases, turn)) for turn in range(3)]
        equal("cases of three turns", set().union(*turns), set(values(cases)))
        assert all(len(kept) <= len(cases) / 2 + 0.5 for kept in turns), turns


def test_parameters_that_go_together_are_one_table():
    cases = [case for case in table("abcd", "abcd") if len(set(case.callspec.params.values())) == 1]
    turns = [values(conftest.fewer(cases, turn)) for turn in range(3)]
    equal("cases", turns, [[("a", "a"), ("c", "c")], [("b", "b"), ("d", "d")], turns[0]])


@pytest.mark.parametrize("cases", [table([1]), table("abcdefg", marks=["every_case"])])
def test_all_cases_where_each_is_the_only_test(cases):
    for turn in range(3):
        equal("cases", conftest.fewer(cases, turn), cases)


def test_laws_are_tried_on_one_manifold_each_in_turn():
    cases = table("abc", folder="laws", marks=["every_case"])
    kept = [values(conftest.fewer(cases, turn)) for turn in range(4)]
    equal("manifolds", kept, [[("a",)], [("b",)], [("c",)], [("a",)]])


def test_each_test_has_another_turn():
    """The manifolds of a law, the other half of a table; what is left out is told."""
    tables = [table("abcd", name=name) for name in ("test_one", "test_two")]
    laws = [table("xyz", name=name, folder="laws") for name in ("test_one", "test_two")]
    items = list(itertools.chain(*tables, *laws))
    kept, told = chosen(items)
    equal("cases", "".join(*zip(*values(kept))), "acbdzx")
    equal("what is left out", [each for each in items if each not in kept], told)
    equal("nothing without the option", chosen(items, asked=False), (items, []))
