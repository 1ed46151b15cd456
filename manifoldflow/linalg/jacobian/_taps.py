"""Find where a model uses its parameters, and read off one example's derivatives there.

A parameter enters most models linearly: z = W·a, z = y + b, z = x ⊙ g, or a look-up.
Add τ = 0 to z. Then ∂f/∂W is known from the *tap* derivative δ = ∂f/∂τ and the other
factor a (for z = W·a it is δ ⊗ a), both far smaller than ∂f/∂W itself. Taps are plain
additions, so that everything stays differentiable to any order by plain autodiff; a custom
derivative rule would not allow forward-over-reverse.

The interpreter below evaluates the jaxpr of one example. Next to every value it carries an
`Alias` as long as the value is still a mere rearrangement of one parameter leaf.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PyTree

from manifoldflow.linalg.jacobian._interpreter import (
    Alias,
    body_of,
    Interpreter,
    Record,
    Site,
    Value,
)
from manifoldflow.linalg.jacobian._known import RULES
from manifoldflow.linalg.jacobian._use import AbstractElementwise, AbstractMatrixUse
from manifoldflow.linalg.jacobian._use_pairs import AbstractPairUse
from manifoldflow.linalg.jacobian._views import Entries, entries_of


class Group(NamedTuple):
    """Uses of one leaf that add up in one form.

    `swapped` marks matrix uses whose view is the transpose of the first one's.
    """

    sites: tuple[int, ...]
    swapped: tuple[bool, ...]


class Uses(NamedTuple):
    """Static: every site, the groups of every leaf, and the leaves with explicit rows."""

    sites: tuple[Site, ...]
    groups: dict[int, list[Group]]
    opaque: frozenset[int]
    reasons: tuple[tuple[int, str], ...] = ()  # why, where the use of a leaf raised an error


def group_sites(sites: Sequence[Site], leaf: int, shape: tuple[int, ...]) -> list[Group] | None:
    """Sort the uses of a leaf; None if groups share entries of it (cross terms would be lost)."""
    mine = [index for index, site in enumerate(sites) if site.leaf == leaf]
    if len(mine) < 2:
        return [Group((index,), (False,)) for index in mine]
    seen = {index: entries_of(sites[index].view, shape) for index in mine}
    sums = tuple(i for i in mine if isinstance(sites[i].use, AbstractElementwise))
    # Elementwise uses are rows of the leaf's size, and rows of one leaf add up whatever made them.
    groups = [Group(sums, (False,) * len(sums))] if sums else []
    for index in mine:
        if index in sums:
            continue
        for place, group in enumerate(groups):
            first = group.sites[0]
            swapped = _same_form(sites[first], sites[index], seen[first], seen[index])
            if swapped is not None:
                groups[place] = Group(group.sites + (index,), group.swapped + (swapped,))
                break
        else:
            groups.append(Group((index,), (False,)))
    return groups if _are_disjoint([[seen[i] for i in group.sites] for group in groups]) else None


def _same_form(first: Site, other: Site, seen: Entries, others: Entries) -> bool | None:
    """As `_same_entries`, for uses whose rows add up; None for all others."""
    uses = first.use, other.use
    if all(isinstance(use, AbstractMatrixUse) for use in uses):
        return _same_entries(seen, others)
    is_same = type(uses[0]) is type(uses[1]) and bool(uses[0] == uses[1])
    is_pair = isinstance(uses[0], AbstractPairUse)
    return False if is_pair and is_same and first.view == other.view else None


def _same_entries(first: Entries, other: Entries) -> bool | None:
    """False if the maps agree, True if they do after swapping the last axes, None if never."""
    if first.axes is None or other.axes is None or first.offset != other.offset:
        return None
    if first.axes == other.axes:
        return False
    batch, rows, columns = other.axes
    return True if first.axes == (batch, columns, rows) else None


def _are_disjoint(groups: list[list[Entries]]) -> bool:
    """True where it is certain that no two groups share an entry of the leaf."""
    pairs = itertools.combinations(groups, 2)
    return all(x.is_apart_from(y) for first, other in pairs for x in first for y in other)


class Model(NamedTuple):
    """A model of one example, as a function of leaves and example, and traced."""

    fn: Callable[..., Array]
    jaxpr: Any  # closed
    example: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def num_outputs(self) -> int:
        return self.jaxpr.out_avals[0].size

    def evaluate(
        self,
        interpreter: Interpreter,
        leaves: Sequence[Array],
        example: Sequence[Array],
        opaque: Any,
    ) -> Array:
        """The outputs of one example as a vector, with aliases for all leaves but `opaque`."""
        values = [
            Value(leaf, None if i in opaque else Alias(i, (), None))
            for i, leaf in enumerate(leaves)
        ]
        (output,) = interpreter.run(self.jaxpr, values + [Value(x) for x in example])
        interpreter.give_up([output])
        return output.array

    def uses(self, leaves: Sequence[Any]) -> Uses:
        """List the sites, abstractly; leaves with a use that no rule knows are opaque."""
        opaque: frozenset[int] = frozenset()
        reasons: dict[int, str] = {}
        while True:
            interpreter = Interpreter(body_of(self.jaxpr), RULES)
            evaluate = partial(self.evaluate, interpreter, opaque=opaque)
            jax.eval_shape(evaluate, leaves, self.example)
            groups: dict[int, Any] = {
                index: group_sites(interpreter.sites, index, leaf.shape)
                for index, leaf in enumerate(leaves)
                if index not in opaque | interpreter.opaque
            }
            refused = interpreter.opaque | {
                index for index, found in groups.items() if found is None
            }
            reasons |= interpreter.reasons
            if not refused:
                return Uses(tuple(interpreter.sites), groups, opaque, tuple(reasons.items()))
            # Explicit rows for one leaf change how others are met: the list is made anew until it
            # is stable.
            opaque = opaque | refused


def trace(fn: Callable[..., Any], params: PyTree[Any], inputs: PyTree[Any]) -> Model:
    """Trace `fn(params, example)` for one example to a jaxpr with vector output."""
    leaves, treedef = jax.tree.flatten(params)
    columns, inputs_treedef = jax.tree.flatten(inputs)
    example = tuple(jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)) for x in columns)
    structures = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)

    def flat(leaves: Any, columns: Any) -> Array:
        output = fn(
            jax.tree.unflatten(treedef, leaves), jax.tree.unflatten(inputs_treedef, columns)
        )
        return _as_vector(output)

    return Model(flat, jax.make_jaxpr(flat)(structures, example), example)


def _as_vector(output: Any) -> Array:
    outputs = jax.tree.leaves(output)
    if len(outputs) != 1 or not jnp.issubdtype(jnp.result_type(outputs[0]), jnp.floating):
        got = [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in outputs]
        raise ValueError(
            "structured_jacobian needs a function that returns one real floating-point array "
            f"per example, got {got}. Concatenate several outputs, or select one."
        )
    return jnp.ravel(outputs[0])


def read_taps(
    model: Model, uses: Uses, leaves: Sequence[Array], example: Sequence[Array]
) -> tuple[tuple[Inexact[Array, "k ..."], ...], dict[int, Array], list[Record]]:
    """One example: tap derivatives and explicit rows, each with leading axis k, and records."""
    # At τ = 0 the model is what it was; only the derivative by τ is read.
    zeros = tuple(jnp.zeros(site.tap.shape, site.tap.dtype) for site in uses.sites)
    dense = {i: leaves[i] for i in sorted(uses.opaque)}

    def tapped(taps: tuple[Array, ...], dense: dict[int, Array]) -> Any:
        interpreter = Interpreter(body_of(model.jaxpr), RULES, taps)
        merged = [dense.get(i, leaf) for i, leaf in enumerate(leaves)]
        output = model.evaluate(interpreter, merged, example, uses.opaque)
        if tuple(interpreter.sites) != uses.sites:  # the derivative of a tap not met would be zero
            raise ValueError(
                f"the tapped interpreter met {interpreter.sites}, listed were {uses.sites}"
            )
        return output, interpreter.records

    output, pullback, records = jax.vjp(tapped, zeros, dense, has_aux=True)
    if output.size == 1:  # no need for a batched backward pass
        found = pullback(jnp.ones_like(output))
        # Those of a weight and of its bias stay one array.
        one = {id(x): x[None] for x in jax.tree.leaves(found)}
        deltas, rows = jax.tree.map(lambda x: one[id(x)], found)
    else:
        deltas, rows = jax.vmap(pullback)(jnp.eye(output.size, dtype=output.dtype))
    return deltas, rows, records


def read_rows(
    model: Model, leaves: Sequence[Array], example: Sequence[Array]
) -> list[Inexact[Array, "k ..."]]:
    """One example: explicit rows for every leaf, from the function itself."""
    return jax.jacrev(model.fn)(list(leaves), list(example))
