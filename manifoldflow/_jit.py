"""Compilation of parts: one program where a part is called alone, none of its own elsewhere."""

from collections.abc import Callable
from typing import Any, cast, TypeVar

import equinox as eqx

Function = TypeVar("Function", bound=Callable[..., Any])


def jit_part(fn: Function) -> Function:
    """`equinox.filter_jit` for what is mostly called from within other programs.

    There it leaves no call behind, but it is traced only once, however often it is used. Called
    alone it is one program instead of one for each of its operations.
    """
    return cast(Function, eqx.filter_jit(fn, inline=True))  # pyright: ignore[reportCallIssue]
