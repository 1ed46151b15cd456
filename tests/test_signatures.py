"""What `help` shows: signatures in the user's words."""

import inspect
import pydoc

import pytest

import manifoldflow as mf
from manifoldflow import _signatures
from test_architecture import public_names

pytestmark = pytest.mark.quick

FOREIGN = "jaxtyping", "jaxlib", "manifoldflow.", "collections.abc", "typing.", "diffrax._"


def test_help_of_solve():
    # From Python 3.13 on, one line for each parameter.
    text = " ".join(pydoc.render_doc(mf.solve, renderer=pydoc.plaintext).split())
    for words in (
        "flow: AbstractFlow, point: PyTree",
        "solver: AbstractSolver | None = None",
        "key: Key | None = None",
        "observe: Mapping[str, Callable] | None = None",
        "rtol: Scalar | float | None = None",
        "-> Solution",
    ):
        assert words in text, text


def test_no_signature_names_a_module():
    """Of functions; classes show that of their `__init__`, where it is checked."""
    wrong = {
        name: str(inspect.signature(thing))
        for name, thing in public_names().items()
        if inspect.isfunction(thing)
        and any(word in str(inspect.signature(thing)) for word in FOREIGN)
    }
    assert not wrong, wrong


@pytest.mark.parametrize(
    "annotation, text",
    [
        (int | None, "int | None"),
        (list[tuple[int, ...]], "list[tuple[int, …]]"),
        (mf.AbstractLoss, "AbstractLoss"),
        (None, "None"),
        (type(None), "None"),
        ("Later", "Later"),
    ],
)
def test_texts(annotation, text):
    assert _signatures.text_of(annotation) == text
