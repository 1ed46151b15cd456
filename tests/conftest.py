"""Tests run in float64; single precision is tested by giving float32 points and data."""

import gc
import os
import pathlib
import sys

# Batched LAPACK calls of jaxlib wait inside threads of XLA's pool for other threads of it. The
# library does without most of them; tests also call some themselves.
os.environ.setdefault("PJRT_NPROC", "8")
# So that all tests can import `checks` and `zoo`, however pytest imports the tests.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from xla_flags import QUICK

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + QUICK

import jax
import pytest

import quick

jax.config.update("jax_enable_x64", True)
quick.settle()

MANY_MAPS = 10_000


def pytest_addoption(parser):
    parser.addoption(
        "--fewer-cases",
        action="store_true",
        help="try each law on one of its manifolds, in turn, and about half of each table of cases",
    )


def pytest_ignore_collect(collection_path, config):
    """Half of the time of `-m quick` would go into importing files without a quick test."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return "mark.quick" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--fewer-cases"):
        return
    tables = {}
    for item in items:
        tables.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    chosen = {item for turn, cases in enumerate(tables.values()) for item in fewer(cases, turn)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def fewer(cases, turn):
    """Some cases of a test. All where each case is the only test of something."""
    if "laws" in cases[0].path.parts:
        return [cases[turn % len(cases)]]
    if len(cases) == 1 or cases[0].get_closest_marker("every_case"):
        return cases
    rows = {}
    for case in cases:
        rows.setdefault(repr(list(case.callspec.params.values())[:-1]), []).append(case)
    # One parameter; or several that go together, so that no row has a second value.
    if len(rows) in (1, len(cases)):
        return cases[turn % 2 :: 2]
    # Every row, and in turn every value of the last parameter.
    return [row[(turn + i) % len(row)] for i, row in enumerate(rows.values())]


def num_maps():
    """Memory maps of this process; 0 where the system does not tell."""
    try:
        with open(pathlib.Path("/", "proc", "self", "maps"), "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def figures_are_closed():
    """Matplotlib keeps them, and warns of many in whichever test opens the next."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True, scope="module")
def many_programs_are_dropped():
    """Each holds memory maps, of which a process may have some 65,000: XLA crashes beyond.

    With them goes what tracing has left behind, which nobody collects meanwhile.
    """
    yield
    if num_maps() > MANY_MAPS or not num_maps():
        jax.clear_caches()
        gc.collect()
