"""Signatures as `help` shows them: in the words of those who call, not of the type checker."""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import AbstractArray, PyTree


class _Shown:
    """An annotation that is shown as a text, without quotes, which is made when it is asked for."""

    __slots__ = ("annotation",)

    def __init__(self, annotation: Any):
        self.annotation = annotation

    def __repr__(self) -> str:
        return text_of(self.annotation)


Function = TypeVar("Function", bound=Callable[..., Any])


def shown(fn: Function) -> Function:
    """The function, whose `help` is readable."""
    fn.__signature__ = readable(inspect.signature(fn))
    return fn


def readable(signature: inspect.Signature) -> inspect.Signature:
    """The same signature with annotations that are short to read."""
    empty = inspect.Parameter.empty

    def as_text(annotation: Any) -> Any:
        # A signature that is readable already stays as it is.
        is_done = annotation is empty or isinstance(annotation, _Shown)
        return annotation if is_done else _Shown(annotation)

    parameters = [
        parameter.replace(annotation=as_text(parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    result = as_text(signature.return_annotation)
    return signature.replace(parameters=parameters, return_annotation=result)


def text_of(annotation: Any) -> str:
    """The annotation without the names of modules; arrays by their shapes."""
    if annotation in (None, type(None)):
        return "None"
    if annotation is Any or isinstance(annotation, str):
        return str(annotation).removeprefix("typing.")
    if isinstance(annotation, typing.TypeVar):
        return text_of(annotation.__bound__) if annotation.__bound__ else "Any"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if np.number in arguments:  # of `ArrayLike`: every kind of number, by its shortest name
            arguments = [a for a in arguments if a not in (np.number, int, complex)]
        return " | ".join(dict.fromkeys(map(text_of, arguments)))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin is Callable or annotation is Callable:
        return "Callable"
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return _array(annotation)
    if isinstance(annotation, type) and issubclass(annotation, PyTree):
        return "PyTree"
    # Classes of compiled modules have the name of the module in theirs.
    name = getattr(origin or annotation, "__name__", str(annotation)).rpartition(".")[2]
    inner = ", ".join("…" if a is ... else text_of(a) for a in arguments)
    return f"{name}[{inner}]" if inner else name


def _array(annotation: Any) -> str:
    dtypes = annotation.dtypes
    if "prng_key" in dtypes or tuple(dtypes) == ("uint32",):
        return "Key"
    if annotation.dim_str == "...":
        return "Array"
    return f'Array["{annotation.dim_str}"]' if annotation.dim_str else "Scalar"
