"""The search for parts that only enter a loss normalised."""

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
    """A scale-invariant part of a network that `find_scalings` found; printable.

    Attributes:
        symmetry: θ ↦ cθ of this part.
        where: its path in the network.
        check: the `SymmetryCheck` that it passed.

    Examples:
        >>> from manifoldflow import symmetry
        >>> check = symmetry.SymmetryCheck(0.0, 0.0, 0.0, 1e-3, 0, True)
        >>> part = symmetry.ExponentialSymmetry({"direction": 1.0, "gain": 0.0})
        >>> print(str(symmetry.Scaling(part, "['direction']", check))[:20])
        ['direction'] scaled
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

    These are weights in front of a LayerNorm, GroupNorm or BatchNorm, and weights that are
    normalised themselves: ∇ℓ·θ, summed over the part, is zero on every example. All arrays, layers
    and larger parts of the network are tried, the smallest first, whatever their classes. Each
    candidate is checked at the network and at weights a tenth away. Not for use inside jit.

    SGD's noise makes such parts grow for ever where no weight decay holds them: `balance` takes
    them with `weight_decay` and `noise_scale`.

    Args:
        network: any network, of finite weights.
        example_loss: ℓ(network, example) → scalar; see `examples_of` for losses.
        data: PyTree of arrays with a leading axis of examples, more than one. Where a normalisation
            takes its statistics over a batch, a batch is an example.
        tolerance: of `check_symmetry`. The ε in a normalisation's root breaks the symmetry by its
            share of the variance.

    Returns:
        The `Scaling`s found, the smallest parts first; an empty list if there are none. Parts that
        follow from smaller ones are left out, and so are arrays without any gradient, such as
        biases in front of a normalisation.

    Raises:
        ValueError: a network with NaN or infinite weights; wrong data; a call inside jit.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jax.random as jr
        >>> from manifoldflow import symmetry
        >>> net = {"direction": jr.normal(jr.key(0), (3,)), "gain": jnp.array([2.0])}
        >>> unit = lambda w: w / jnp.linalg.norm(w)
        >>> loss = lambda p, x: (p["gain"][0] * jnp.sin(unit(p["direction"]) @ x) - 1.0) ** 2
        >>> print(
        ...     [
        ...         one.where
        ...         for one in symmetry.find_scalings(net, loss, jr.normal(jr.key(2), (9, 3)))
        ...     ]
        ... )
        ["['direction']"]
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
    # The smallest first, so that what only follows from smaller ones is left out.
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
