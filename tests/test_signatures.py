"""What `help` shows: signatures in the user's words."""

import inspect
import pydoc
import re

import numpy as np
import pytest
from jax.typing import ArrayLike
from jaxtyping import Float, Num

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


def test_every_signature_is_readable():
    """No default without a text of its own, no annotation that is a rest of another one."""
    wrong = {
        name: str(inspect.signature(thing))
        for name, thing in public_names().items()
        if inspect.isfunction(thing) and re.search(r"<|: \"|> \"", str(inspect.signature(thing)))
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
        (Float[np.ndarray, "..."], "Array"),
        (Float[np.ndarray, "n d"], 'Array["n d"]'),
        (Num[ArrayLike, "..."] | None, "Array | float | None"),
    ],
)
def test_texts(annotation, text):
    assert _signatures.text_of(annotation) == text
