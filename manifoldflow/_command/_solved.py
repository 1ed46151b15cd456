"""A solve whose failure is told in words of the command line."""

import re
from typing import Any

import jax

import manifoldflow as mf


def solved(flow: mf.AbstractFlow, start: Any, **options: Any) -> mf.Solution:
    """`solve`, with errors that name no option which the command does not have.

    Raises:
        ValueError: the walk did not reach its end; says where it stopped, and why.
    """
    try:
        walk = mf.solve(flow, start, throw=False, **options)
    except ValueError as error:
        elsewhere = "choose another folder (--out)"
        raise ValueError(re.sub(r"give this \w+ another file", elsewhere, str(error))) from error
    # Rows of the table come by callbacks, which may be late: all are to stand above what follows.
    jax.effects_barrier()
    if bool(walk.result == mf.RESULTS.successful):
        return walk
    raise ValueError(
        f"the walk stopped before its end: {plainly(str(mf.RESULTS[walk.result]))} Ask for a "
        "shorter walk (--end-time), another --seed or a wider model (--width)."
    )


def plainly(message: str) -> str:
    """The sentences of a message that name nothing in the library."""
    sentences = re.findall(r"[^.]+\.", message)
    return " ".join(s.strip() for s in sentences if "`" not in s)
