"""Find where a model uses its parameters, and read off one example's derivatives there.

A parameter enters most models linearly: z = W·a, z = y + b, z = x ⊙ g, or a look-up.
Add τ = 0 to z. Then ∂f/∂W is known from the *tap* derivative δ = ∂f/∂τ and the other
factor a (for z = W·a it is δ ⊗ a), both far smaller than ∂f/∂W itself. Taps are plain
additions, so that everything stays differentiable to any order by plain autodiff; a custom
derivative rule would not allow forward-over-reverse.

The walk below evaluates the jaxpr of one example. Next to every value it carries an
`Alias` as long as the value is still a mere rearrangement of one parameter leaf.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, PyTree

from manifoldflow.linalg._tap_rules import RULES
from manifoldflow.linalg._walk import (
    Alias,
    index_map,
    Record,
    Site,
    Value,
    Walk,
)


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


def group_sites(sites: Sequence[Site], leaf: int, shape: tuple[int, ...]) -> list[Group] | None:
    """Sort the uses of a leaf; None if groups share entries of it (cross terms would be lost)."""
    mine = [index for index, site in enumerate(sites) if site.leaf == leaf]
    if len(mine) < 2:
        return [Group((index,), (False,)) for index in mine]
    maps = {index: index_map(sites[index].view, shape) for index in mine}
    sums = tuple(index for index in mine if sites[index].kind in ("sum", "product"))
    groups = [Group(sums, (False,) * len(sums))] if sums else []
    for index in mine:
        if index in sums:
            continue
        for place, group in enumerate(groups):
            swapped = (
                _same_entries(maps[group.sites[0]], maps[index]) if place >= bool(sums) else None
            )
            if swapped is not None:
                groups[place] = Group(group.sites + (index,), group.swapped + (swapped,))
                break
        else:
            groups.append(Group((index,), (False,)))
    entries = [
        np.unique(np.concatenate([maps[i].ravel() for i in group.sites])) for group in groups
    ]
    disjoint = sum(map(len, entries)) == len(np.unique(np.concatenate(entries)))
    return groups if disjoint else None


def _same_entries(first: np.ndarray, other: np.ndarray) -> bool | None:
    """False if the maps agree, True if they do after swapping the last axes, None if never."""
    if np.array_equal(first, other):
        return False
    return True if np.array_equal(first, np.swapaxes(other, 1, 2)) else None


class Model(NamedTuple):
    """A traced model of one example."""

    jaxpr: jex.ClosedJaxpr
    num_leaves: int
    example: tuple[jax.ShapeDtypeStruct, ...]

    def evaluate(
        self, walk: Walk, leaves: Sequence[Array], example: Sequence[Array], opaque: Any
    ) -> Array:
        """The outputs of one example as a vector, with aliases for all leaves but `opaque`."""
        values = [
            Value(leaf, None if i in opaque else Alias(i, (), None))
            for i, leaf in enumerate(leaves)
        ]
        (output,) = walk.run(self.jaxpr, values + [Value(x) for x in example])
        walk.give_up([output])
        return output.array

    def uses(self, leaves: Sequence[Any]) -> Uses:
        """List the sites, abstractly; leaves with a use that no rule knows are opaque."""
        opaque: frozenset[int] = frozenset()
        while True:
            walk = Walk(self.jaxpr.jaxpr, RULES)
            evaluate = partial(self.evaluate, walk, opaque=opaque)
            jax.eval_shape(evaluate, leaves, self.example)
            groups: dict[int, Any] = {
                index: group_sites(walk.sites, index, leaf.shape)
                for index, leaf in enumerate(leaves)
                if index not in opaque | walk.opaque
            }
            refused = walk.opaque | {index for index, found in groups.items() if found is None}
            if not refused:
                return Uses(tuple(walk.sites), groups, opaque)
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

    return Model(jax.make_jaxpr(flat)(structures, example), len(leaves), example)


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
    zeros = tuple(jnp.zeros(site.tap.shape, site.tap.dtype) for site in uses.sites)
    dense = {i: leaves[i] for i in sorted(uses.opaque)}

    def tapped(taps: tuple[Array, ...], dense: dict[int, Array]) -> Any:
        walk = Walk(model.jaxpr.jaxpr, RULES, taps)
        merged = [dense.get(i, leaf) for i, leaf in enumerate(leaves)]
        return model.evaluate(walk, merged, example, uses.opaque), walk.records

    output, pullback, records = jax.vjp(tapped, zeros, dense, has_aux=True)
    if output.size == 1:  # no need for a batched backward pass
        deltas, rows = jax.tree.map(lambda x: x[None], pullback(jnp.ones_like(output)))
    else:
        deltas, rows = jax.vmap(pullback)(jnp.eye(output.size, dtype=output.dtype))
    return deltas, rows, records
