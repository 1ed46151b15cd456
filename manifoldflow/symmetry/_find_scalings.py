"""Finding what only enters a loss normalised."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked_concrete
from manifoldflow._types import Point
from manifoldflow.symmetry._check import default_tolerance, SymmetryCheck
from manifoldflow.symmetry._find import search
from manifoldflow.symmetry._gradients import ExampleLoss
from manifoldflow.symmetry._symmetry import ExponentialSymmetry


class Scaling(eqx.Module):
    """A part of a network that was found to be scale invariant.

    Attributes:
        symmetry: θ ↦ cθ of this part.
        where: its path in the network.
        check: how well the symmetry holds.
    """

    symmetry: ExponentialSymmetry
    where: str = eqx.field(static=True)
    check: SymmetryCheck = eqx.field(static=True)

    def __str__(self) -> str:
        return f"{self.where} scaled; {self.check}"


@checked_concrete
def find_scalings(
    network: Point,
    example_loss: ExampleLoss,
    data: PyTree[Any],
    *,
    tolerance: float = 1e-3,
) -> list[Scaling]:
    """The parts of a network that may be multiplied by any number without changing a loss.

    Weights in front of a LayerNorm, GroupNorm or BatchNorm, or that are normalised themselves:
    ∇ℓ·θ is zero on every example, summed over the part. All arrays, layers and larger parts of the
    network are tried, the smallest first, whatever their classes; what they propose is checked at
    the network and at weights a tenth away. Not for use inside jit.

    SGD's noise makes such parts grow for ever where no weight decay holds them: `balance` takes
    them with `weight_decay` and `noise_scale`.

    Args:
        network: any network.
        example_loss: ℓ(network, example) → scalar; see `examples_of` for losses.
        data: PyTree of arrays with a leading axis of examples, more than one. Where a
            normalisation takes its statistics over a batch, a batch is an example.
        tolerance: of `check_symmetry`. The ε in a normalisation's root breaks the symmetry
            by its share of the variance.

    Returns:
        What was found, the smallest parts first; an empty list if nothing was. Without what
        follows from smaller ones, and arrays without any gradient, as biases in front of a
        normalisation.
    """
    found = search(network, example_loss, data, tolerance, "find_scalings")
    coordinates, _ = _tree.split(network)
    sizes = found.shares.sizes
    live = {i for i, size in enumerate(sizes) if size > default_tolerance(network) * sizes.max()}
    parts = {leaf.path: {number} for number, leaf in enumerate(found.leaves)}
    for number, leaf in enumerate(found.leaves):
        for parent in leaf.parents:
            parts.setdefault(parent, set()).add(number)
    scalings, known = [], set()
    for where, numbers in sorted(parts.items(), key=lambda part: len(part[1])):
        rest = sorted((numbers & live) - known)
        if not rest:
            continue
        left = np.abs(found.shares.totals[:, rest].sum(axis=1)).max()
        if not left <= found.tolerance * sizes[rest].sum():
            continue
        weights = [
            jnp.full((1,) * leaf.ndim, float(i in rest), leaf.dtype)
            for i, leaf in enumerate(jax.tree.leaves(coordinates))
        ]
        symmetry = ExponentialSymmetry(jax.tree.unflatten(jax.tree.structure(coordinates), weights))
        check = found.verified(symmetry)
        if check is not None:
            scalings.append(Scaling(symmetry, where, check))
            known |= set(rest)
    return scalings
