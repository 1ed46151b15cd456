"""The search for the rescaling symmetries of a network, by the gradients of its examples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._errors import checked_positive, refuse_nonfinite
from manifoldflow._types import Coordinates, Key, Point, Tangent
from manifoldflow.symmetry._check import check_symmetry, default_tolerance, SymmetryCheck
from manifoldflow.symmetry._gradients import checked_examples, ExampleLoss, num_examples
from manifoldflow.symmetry._paths import layer_names, Leaf, leaves_of
from manifoldflow.symmetry._products import ProductSymmetry
from manifoldflow.symmetry._relations import along, Relation, relations, total_relations
from manifoldflow.symmetry._shares import plain_slices, Shares, shares_of
from manifoldflow.symmetry._symmetry import ExponentialSymmetry


class Rescaling(eqx.Module):
    """A rescaling symmetry that `find_rescalings` found; printable.

    Attributes:
        symmetry: the first layer grows, the second shrinks `degree` times as fast.
        first: the path of the first layer in the network, or of several.
        second: the path of the second layer, or of several.
        neuron: the output (channel, feature) of the first layer, or None for all together.
        degree: p of the activation between them, φ(cz) = cᵖφ(z).
        check: the `SymmetryCheck` that it passed.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> check = symmetry.SymmetryCheck(0.0, 0.0, 0.0, 1e-11, 0, True)
        >>> pair = symmetry.ExponentialSymmetry({"in": 1.0, "out": -1.0})
        >>> found = symmetry.Rescaling(pair, "['in']", "['out']", None, 1.0, check)
        >>> print(str(found)[:32])
        ['in'] against ['out'], degree 1
    """

    symmetry: ExponentialSymmetry
    first: str = eqx.field(static=True)
    second: str = eqx.field(static=True)
    neuron: int | None = eqx.field(static=True)
    degree: float = eqx.field(static=True)
    check: SymmetryCheck = eqx.field(static=True)

    def __str__(self) -> str:
        which = "" if self.neuron is None else f", neuron {self.neuron}"
        return f"{self.first} against {self.second}{which}, degree {self.degree:g}; {self.check}"


class Search(NamedTuple):
    """A network with its examples, and the shares measured on them."""

    points: list[Point]  # the network, and weights a tenth away
    example_loss: ExampleLoss
    data: PyTree[Array]
    leaves: list[Leaf]
    shares: Shares
    tolerance: float

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in self.leaves]

    def verified(self, symmetry: ExponentialSymmetry | ProductSymmetry) -> SymmetryCheck | None:
        """The worst of the checks at all points, if all hold."""
        checks = []
        for point in self.points:
            checks.append(
                check_symmetry(
                    symmetry, self.example_loss, point, self.data, tolerance=self.tolerance
                )
            )
            if not checks[-1]:
                return None
        return max(checks, key=lambda check: check.defect)


def search(
    network: Point,
    example_loss: ExampleLoss,
    data: PyTree[Any],
    tolerance: float | None,
    name: str,
) -> Search:
    """Measures the shares of all slices at the network and at weights a tenth away."""
    data, example_loss = checked_examples(data), _tree.as_pytree_callable(example_loss)
    coordinates, remainder = _tree.split(network)
    refuse_nonfinite(name, coordinates)
    if tolerance is None:
        tolerance = default_tolerance(network)
    tolerance = float(checked_positive(f"{name}: tolerance", tolerance))
    # With few examples relations hold by chance; other weights make more equations.
    num_others = 1 if num_examples(data) >= 16 else 3
    keys = [jax.random.key(seed) for seed in range(num_others)]
    others = [_tree.join(_shaken(coordinates, key), remainder) for key in keys]
    shares = shares_of(example_loss, [network, *others], data, plain_slices(coordinates))
    losses = shares.losses[: len(shares.losses) // (1 + num_others)]
    if not np.all(np.isfinite(losses)):
        raise ValueError(
            f"{name} needs a loss that is finite at the network; got {losses.max()} for an "
            "example. If it overflows, give the network in double precision."
        )
    points = [network, others[0]]
    return Search(points, example_loss, data, leaves_of(coordinates), shares, tolerance)


@checked_concrete
def find_rescalings(
    network: Point,
    example_loss: ExampleLoss,
    data: PyTree[Any],
    *,
    per_neuron: bool = False,
    tolerance: float | None = None,
) -> list[Rescaling]:
    """The rescalings of layers against one another that leave a loss unchanged.

    Nothing is read off classes, activations or the order of layers: the network may be any PyTree
    of arrays. The search uses the gradients of the examples. Where slice j of some leaves grows by
    c and slice j of others shrinks by c⁻ᵖ, as the outputs of a layer and the inputs of the next
    about an activation of degree p, ∇ℓ·(the former) = p·∇ℓ·(the latter) on every example. Such
    relations are looked for between the axes of all leaves, also where flattening or heads cut an
    axis into parts. Each candidate is checked at the network and at weights a tenth away.

    So it finds dense layers, convolutions channel by channel, the weights of a normalisation
    against all that read it, branches and streams of residual networks, and the heads of attention.
    Layers whose neurons are mixed between them, or which have one neuron, are found as a whole. Not
    for use inside jit.

    Args:
        network: any network, of finite weights.
        example_loss: ℓ(network, example) → scalar; see `examples_of` for losses.
        data: PyTree of arrays with a leading axis of examples, more than one. Where a normalisation
            takes its statistics over a batch, a batch is an example.
        per_neuron: True for one symmetry for each neuron or channel; False for one for each layer.
        tolerance: of `check_symmetry`.

    Returns:
        The `Rescaling`s found, in order; an empty list if there are none. Layers and neurons
        without any gradient (dead ReLUs) are left out: nothing can be told of them. So are parts
        that are scale invariant by themselves (`find_scalings`). Grouped convolutions are found as
        a whole only.

    Raises:
        ValueError: a network with NaN or infinite weights; wrong data; a call inside jit.

    Examples:
        >>> import jax
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> net = {"in": jr.normal(jr.key(0), (3, 2)), "out": jr.normal(jr.key(1), (3,))}
        >>> loss = lambda p, x: (p["out"] @ jax.nn.relu(p["in"] @ x) - 1.0) ** 2
        >>> (found,) = symmetry.find_rescalings(net, loss, jr.normal(jr.key(2), (16, 2)))
        >>> print(found.first, found.second, found.degree)
        ['in'] ['out'] 1.0
    """
    found = search(network, example_loss, data, tolerance, "find_rescalings")
    bound = found.tolerance**0.5
    by_neuron = relations(found.shares, found.shapes, bound)
    if per_neuron:
        each = [_neurons(found, relation) for relation in by_neuron]
        return [one for several in each for one in several]
    known: list[tuple[Relation, Rescaling]] = []
    for relation in by_neuron:
        known += _first_found(found, [relation])
    # Where neurons are mixed on the way, only the layers as a whole can be told.
    grown = {s.leaf for relation, _ in known for s in relation.first}
    for several in total_relations(found.shares, found.leaves, grown, bound):
        known += _first_found(found, several)
    order = lambda pair: min(s.leaf for s in pair[0].first)
    return [one for _, one in sorted(known, key=order)]


def _first_found(found: Search, several: Sequence[Relation]) -> list[tuple[Relation, Rescaling]]:
    """The first of some relations that is a symmetry, if one is."""
    for relation in several:
        rescaling = _verified(found, relation, None)
        if rescaling is not None:
            return [(relation, rescaling)]
    return []


def _neurons(found: Search, relation: Relation) -> list[Rescaling]:
    """The rescalings of the neurons that have a gradient."""
    largest = np.max(sum(np.abs(along(found.shares, s)) for s in relation.second), axis=0)
    live = np.flatnonzero(largest > found.tolerance * np.max(largest))
    # A random combination is a symmetry only where each of them is.
    rates = np.zeros(relation.length)
    rates[live] = np.random.default_rng(0).uniform(0.5, 1.5, size=len(live))
    together = found.verified(_symmetry(found, relation, rates))
    several = [_verified(found, relation, int(neuron), together) for neuron in live]
    return [one for one in several if one is not None]


def _verified(
    found: Search, relation: Relation, neuron: int | None, check: SymmetryCheck | None = None
) -> Rescaling | None:
    """The rescaling of a relation, if it holds, which a check may have said already."""
    rates = np.ones(1) if neuron is None else np.eye(relation.length)[neuron]
    symmetry = _symmetry(found, relation, rates)
    if not any(np.any(weight) for weight in jax.tree.leaves(symmetry.generator)):
        return None  # what grows and what shrinks are the same array
    check = found.verified(symmetry) if check is None else check
    if check is None:
        return None
    first, second = (
        layer_names(found.leaves, [s.leaf for s in side])
        for side in (relation.first, relation.second)
    )
    return Rescaling(symmetry, first, second, neuron, relation.degree, check)


def _symmetry(found: Search, relation: Relation, rates: np.ndarray) -> ExponentialSymmetry:
    """The symmetry of a relation, with a rate for each number, or one for all of them."""
    weights = [np.zeros((1,) * len(shape)) for shape in found.shapes]
    for sign, side in ((1.0, relation.first), (-relation.degree, relation.second)):
        for leaf, view in side:
            shape = found.shapes[leaf]
            spread = rates[0] if len(rates) == 1 else view.spread(jnp.asarray(rates), shape)
            weights[leaf] = weights[leaf] + sign * np.asarray(spread)
    coordinates, _ = _tree.split(found.points[0])
    like = jax.tree.leaves(coordinates)
    leaves = [jnp.asarray(weight, leaf.dtype) for weight, leaf in zip(weights, like)]
    return ExponentialSymmetry(jax.tree.unflatten(jax.tree.structure(coordinates), leaves))


@eqx.filter_jit
def _shaken(coordinates: Coordinates, key: Key) -> Tangent:
    """The coordinates with every leaf moved by a tenth of its size, where chance relations break.

    Leaves that are zero, such as fresh biases, are moved by a tenth of the mean size: else they
    tell nothing.
    """
    noise = _tree.probe_like(key, coordinates)
    mean = _tree.norm(coordinates) / _tree.size(coordinates) ** 0.5

    def shaken(leaf: Array, kick: Array) -> Array:
        size = jnp.sqrt(jnp.mean(leaf**2))
        return (leaf + 0.1 * jnp.where(size > 0, size, mean) * kick).astype(leaf.dtype)

    return jax.tree.map(shaken, coordinates, noise)
