"""Exponential symmetries of a loss, and the charges that gradient flow conserves."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import described, is_traced, real_numbers
from manifoldflow._signatures import shown
from manifoldflow._types import Point, Scalar, Tangent
from manifoldflow.symmetry._generators import AbstractGenerator, resolved


class ExponentialSymmetry(eqx.Module):
    """θ ↦ e^{λA}θ with a symmetric A, under which a per-example loss does not change.

    ℓ(e^{λA}θ, z) = ℓ(θ, z) for all λ and z, that is, ∇ℓ·Aθ = 0.

    Args:
        generator: A, as one of
            a PyTree of elementwise weights like the point or a prefix of it, whose leaves
            broadcast against the point's (None is 0);
            a linear function θ ↦ Aθ on PyTrees like the point's coordinates;
            a symmetric matrix (D, D), as an array for points that are vectors or as a
            `lineax` operator, in the order of `jax.flatten_util.ravel_pytree`;
            or what `rescaling`, `scaling`, `double_rotation` … build.

    Assumes:
        The loss has the symmetry and A is symmetric: `check_symmetry` tests both.

    References:
        [Ziyin2024, Definition 4.1].
    """

    generator: Any

    @checked
    def __init__(self, generator: Any):
        # Numbers as arrays, so that other weights do not retrace.
        generator = jax.tree.map(_as_array, generator)
        if not _is_generator(generator):
            raise ValueError(
                "ExponentialSymmetry: generator must be finite weights like the point, a linear "
                f"function, a symmetric matrix, or what `rescaling` and its kin build; got "
                f"{described(generator)}."
            )
        self.generator = _tree.as_pytree_callable(generator) if callable(generator) else generator

    def at(self, point: Point) -> AbstractGenerator:
        """The generator for points like this one."""
        return resolved(self.generator, _tree.split(point)[0])

    def velocity(self, point: Point) -> Tangent:
        """Aθ, the direction of the orbit at a point."""
        coordinates, _ = _tree.split(point)
        return resolved(self.generator, coordinates).mv(coordinates)

    @eqx.filter_jit
    def act(self, point: Point, parameter: Any) -> Point:
        """e^{λA}θ.

        Args:
            point: θ.
            parameter: λ, a number. Generators that are functions are right to rounding for
                |λ|·‖A‖ up to 36.
        """
        coordinates, remainder = _tree.split(point)
        parameter = jnp.asarray(parameter, _tree.dtype_of(coordinates))
        moved = resolved(self.generator, coordinates).exp_mv(parameter, coordinates)
        return _tree.join(moved, remainder)


def _as_array(leaf: Any) -> Any:
    is_number = isinstance(leaf, np.ndarray | int | float) and not isinstance(leaf, bool)
    return jnp.asarray(real_numbers("The generator", leaf), float) if is_number else leaf


def _is_generator(generator: Any) -> bool:
    """A function, or numbers in a PyTree, of which all that are known are finite."""
    if callable(generator) or isinstance(generator, AbstractGenerator | lx.AbstractLinearOperator):
        return True
    leaves = [leaf for leaf in jax.tree.leaves(generator) if eqx.is_array(leaf)]
    known = [np.asarray(leaf) for leaf in leaves if not is_traced(leaf)]
    return bool(leaves) and all(leaf.size and np.all(np.isfinite(leaf)) for leaf in known)


Symmetries = ExponentialSymmetry | Sequence[ExponentialSymmetry]
"""One symmetry, or several that commute."""


@shown
def symmetries_of(symmetry: Symmetries) -> tuple[ExponentialSymmetry, ...]:
    """One symmetry, or several that commute, as a tuple.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of them.

    Raises:
        ValueError: anything else, or none.
    """
    if not isinstance(symmetry, ExponentialSymmetry | Sequence):
        raise ValueError(
            f"Expected an ExponentialSymmetry or a sequence of them; got {described(symmetry)}. "
            "Wrap the generator: ExponentialSymmetry(A)."
        )
    found = (symmetry,) if isinstance(symmetry, ExponentialSymmetry) else tuple(symmetry)
    if not found or not all(isinstance(s, ExponentialSymmetry) for s in found):
        raise ValueError(
            "Expected an ExponentialSymmetry or a sequence of them; got "
            f"{[type(s).__name__ for s in found]}. Wrap the generator: ExponentialSymmetry(A)."
        )
    return found


def like(symmetry: Symmetries, values: Float[Array, " k"]) -> Float[Array, "..."]:
    """A scalar for one symmetry, (k,) for several."""
    return values[0] if isinstance(symmetry, ExponentialSymmetry) else values


@checked
def act_together(symmetries: Sequence[ExponentialSymmetry], point: Point, parameters: Any) -> Point:
    """e^{λ₁A₁ + … + λₖAₖ}θ for symmetries that commute.

    Args:
        symmetries: k of them.
        point: θ.
        parameters: λ, (k,), as `noise_equilibrium` finds them.
    """
    symmetries = symmetries_of(symmetries)
    values = jnp.asarray(real_numbers("act_together: parameters", parameters))
    if values.shape != (len(symmetries),):
        raise ValueError(
            f"act_together: parameters must be one number for each of the {len(symmetries)} "
            f"symmetries; got shape {values.shape}."
        )
    for symmetry, parameter in zip(symmetries, values):
        point = symmetry.act(point, parameter)
    return point


@checked
def noether_charge(symmetry: Symmetries, point: Point) -> Float[Array, "..."]:
    """C = ½θᵀAθ, which gradient flow conserves and SGD does not; (k,) for k symmetries.

    Its gradient is Aθ. For a rescaling of two layers it is half the difference of their
    squared norms.

    References:
        [Ziyin2024, eq. (6)], which prints θᵀAθ; with the ½ its eqs. (5), (7) and (9) hold.
    """
    coordinates, _ = _tree.split(point)

    def charge(one: ExponentialSymmetry) -> Scalar:
        return _tree.inner(coordinates, one.velocity(point)) / 2

    return like(symmetry, jnp.stack([charge(one) for one in symmetries_of(symmetry)]))
