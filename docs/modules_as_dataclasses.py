"""What Griffe cannot see: what has fields and no `__init__` takes its fields."""

from collections.abc import Iterator
from typing import Any

import griffe

BASES = {"eqx.Module", "NamedTuple", "lx.AbstractLinearOperator"}


def is_module(cls: griffe.Class) -> bool:
    """Whether a class is an `equinox.Module` or a named tuple, by itself or by inheritance."""
    above = [base for base in cls.resolved_bases if base.is_class]
    return any(str(base) in BASES for base in cls.bases) or any(map(is_module, above))


def fields(cls: griffe.Class) -> dict[str, griffe.Parameter]:
    """The parameters that the fields of a class make, those of the classes above it first."""
    found = {}
    for base in cls.resolved_bases:
        if base.is_class:
            found |= fields(base)
    for member in cls.members.values():
        if not member.is_attribute or member.annotation is None or "property" in member.labels:
            found.pop(member.name, None)
            continue
        if "AbstractVar" in str(member.annotation) or "AbstractClassVar" in str(member.annotation):
            continue
        found[member.name] = griffe.Parameter(
            member.name,
            annotation=member.annotation,
            kind=griffe.ParameterKind.positional_or_keyword,
            default=default(member.value),
        )
    return found


def default(value: Any) -> Any:
    """The default of a field, which `eqx.field(default=…)` may hold."""
    if isinstance(value, griffe.ExprCall) and str(value.function) == "eqx.field":
        options = {each.name: each.value for each in value.arguments}
        return options.get("default", options.get("default_factory"))
    return value


class ModulesAsDataclasses(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        del kwargs
        # All are found before one is changed: an `__init__` that is written is inherited.
        for cls in list(without_init(pkg)):
            own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            parameters = griffe.Parameters(own, *fields(cls).values())
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def without_init(scope: griffe.Module | griffe.Class) -> Iterator[griffe.Class]:
    for member in scope.members.values():
        if member.is_alias:
            continue
        if member.is_class and "__init__" not in member.all_members and is_module(member):
            yield member
        if member.is_class or member.is_module:
            yield from without_init(member)
