"""Evaluate a model's jaxpr and know which values are still a parameter, rearranged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from manifoldflow import _mesh
from manifoldflow.linalg.jacobian._views import View


class Alias(NamedTuple):
    """`value = scale · view(leaf)`; the scale is an array without axes, or None for 1."""

    leaf: int
    view: View
    scale: Any


class Value(NamedTuple):
    array: Any
    alias: Any = None  # an Alias; None where no leaf enters linearly


class Site(NamedTuple):
    """One use of one leaf, which is seen there through a view.

    Within scans `steps` holds their lengths, outermost first: leading axes of the tap.
    """

    leaf: int
    use: Any  # an AbstractUse
    view: View
    tap: jax.ShapeDtypeStruct
    steps: tuple[int, ...] = ()


class Record(NamedTuple):
    """The extra values of a site beside its tap derivative: the other factor and a scalar."""

    factor: Any
    scale: Any


def times(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a * b


Rule = Callable[..., list[Value] | None]
"""(interpreter, equation, inputs) → outputs, or None where the rule does not apply."""


class Interpreter:
    """One evaluation of a model's jaxpr that meets its taps in a fixed order.

    Without taps it only lists the sites and the leaves it cannot treat (`opaque`, some with
    the reason); with taps it adds them in the same order and keeps a record per site.
    """

    def __init__(self, template: Any, rules: dict[str, Rule], taps: Sequence[Array] | None = None):
        self.template = template
        self.rules = rules
        self.taps = taps
        self.sites: list[Site] = []
        self.records: list[Record | None] = []
        self.opaque: set[int] = set()
        self.reasons: dict[int, str] = {}

    def within(self, taps: Sequence[Array] | None = None) -> "Interpreter":
        """A interpreter through a body inside."""
        return Interpreter(self.template, self.rules, taps)

    def run(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        """Evaluate a closed jaxpr."""
        body = body_of(jaxpr)
        env: dict[Any, Value] = {}
        env.update(zip(body.constvars, map(Value, jaxpr.consts), strict=True))
        env.update(zip(body.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return Value(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in body.eqns:
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in body.outvars]

    def equation(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        """Evaluate one equation by its rule; without a rule its leaves are opaque."""
        if all(value.alias is None for value in inputs):
            return self.plain(eqn, inputs)
        rule = self.rules.get(eqn.primitive.name)
        outputs = self.by_rule(rule, eqn, inputs) if rule is not None else None
        if outputs is None:
            outputs = self.plain(eqn, inputs)
            # Integers, as of a comparison or a shape, have no derivative that could be lost.
            if any(is_differentiable(value.array) for value in outputs):
                self.give_up(inputs)
        return outputs

    def by_rule(self, rule: Rule, eqn: Any, inputs: list[Value]) -> list[Value] | None:
        """The answer of a rule; one that raises while sites are being listed gives its leaves up.

        The parameters of an equation are private to JAX, and change with its versions. The tapped
        interpreter must meet the sites that were listed, so that there an error ends it.
        """
        if self.taps is not None:
            return rule(self, eqn, inputs)
        num_sites, num_records = len(self.sites), len(self.records)
        try:
            return rule(self, eqn, inputs)
        except Exception:
            # What the rule listed before it failed would be a tap that the second pass never meets.
            del self.sites[num_sites:], self.records[num_records:]
            self.give_up(inputs)
            return None

    def plain(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Evaluate an equation as JAX would, whatever functions its parameters hold."""
        pairs = zip(eqn.invars, inputs, strict=True)
        named = {var: value for var, value in pairs if not isinstance(var, jex.Literal)}
        jaxpr = self.template.replace(
            constvars=[], invars=list(named), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
        )
        orders = [_order(value.alias, var) for var, value in named.items()]
        fn = _mesh.layer(jex.jaxpr_as_fun(closed(jaxpr)), orders)
        return [Value(output) for output in fn(*(value.array for value in named.values()))]

    def give_up(self, values: Sequence[Value], reason: str | None = None) -> None:
        """These leaves are used in a way no rule knows: explicit rows for them."""
        leaves = {value.alias.leaf for value in values if value.alias is not None}
        self.opaque |= leaves
        if reason is not None:
            self.reasons |= dict.fromkeys(leaves, reason)

    def tap(self, z: Array, alias: Alias, use: Any, factor: Any, view: View) -> Array:
        """Register a site on `z` and add its tap."""
        tap = jax.ShapeDtypeStruct(jnp.shape(z), jnp.result_type(z))
        (tau,) = self.register([Site(alias.leaf, use, view, tap)])
        self.records.append(Record(factor, alias.scale))
        return z if tau is None else z + tau

    def register(self, sites: list[Site]) -> list[Any]:
        """Append sites; their taps, or None each while they are only listed."""
        start = len(self.sites)
        self.sites.extend(sites)
        if self.taps is None:
            return [None] * len(sites)
        return list(self.taps[start : start + len(sites)])


def _order(alias: Alias | None, variable: Any) -> tuple[int, ...] | None:
    """The axes of a leaf as they stand here, if they were transposed at most."""
    if alias is None or any(step[0] != "transpose" for step in alias.view):
        return None
    order = tuple(range(len(variable.aval.shape)))
    for _, permutation in alias.view:
        order = tuple(order[axis] for axis in permutation)
    return order


def body_of(jaxpr: Any) -> Any:
    """The equations of a closed jaxpr; from JAX 0.11 on every jaxpr is closed."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def closed(jaxpr: Any) -> Any:
    """A jaxpr with its constants, of which an open one has none."""
    return jaxpr if hasattr(jaxpr, "consts") else jex.ClosedJaxpr(jaxpr, ())


def is_differentiable(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)
