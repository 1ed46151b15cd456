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
    """The symmetry θ ↦ e^{λA}θ of a per-example loss, with a symmetric generator A.

    ℓ(e^{λA}θ, z) = ℓ(θ, z) for all λ and z; equivalently ∇ℓ·Aθ = 0.

    Args:
        generator: A, given in one of five ways: elementwise weights, a PyTree like the point or a
            prefix of it, whose leaves broadcast against the point's (None is 0); a linear function
            θ ↦ Aθ on PyTrees like the point's coordinates; a symmetric matrix (D, D) for points
            that are vectors; a `lineax` operator, in the order of `jax.flatten_util.ravel_pytree`;
            the value of `rescaling`, `scaling`, `double_rotation` or `low_rank`.

    Raises:
        ValueError: a generator of another kind, or with entries that are not finite.

    Assumes:
        The loss has the symmetry and A is symmetric. `check_symmetry` tests both.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> opposite = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})  # the product uw stays
        >>> moved = opposite.act({"u": jnp.array(1.0), "w": jnp.array(6.0)}, jnp.log(2.0))
        >>> print({name: round(float(value), 5) for name, value in moved.items()})
        {'u': 2.0, 'w': 3.0}

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
        """The generator A for points with the coordinates of this one."""
        return resolved(self.generator, _tree.split(point)[0])

    def velocity(self, point: Point) -> Tangent:
        """The direction Aθ of the orbit at a point."""
        coordinates, _ = _tree.split(point)
        return resolved(self.generator, coordinates).mv(coordinates)

    @eqx.filter_jit
    def act(self, point: Point, parameter: Any) -> Point:
        """The point e^{λA}θ.

        Args:
            point: θ.
            parameter: λ, a number. Generators that are functions are right to rounding for |λ|·‖A‖
                up to 36.

        Returns:
            A point like θ.
        """
        coordinates, remainder = _tree.split(point)
        # In the point's precision: a float64 λ would promote every leaf that it multiplies.
        parameter = jnp.asarray(parameter, _tree.dtype_of(coordinates))
        moved = resolved(self.generator, coordinates).exp_mv(parameter, coordinates)
        return _tree.join(moved, remainder)


def _as_array(leaf: Any) -> Any:
    # True is an int for Python, and no weight.
    is_number = isinstance(leaf, np.ndarray | int | float) and not isinstance(leaf, bool)
    return jnp.asarray(real_numbers("The generator", leaf), float) if is_number else leaf


def _is_generator(generator: Any) -> bool:
    """True for a function, and for numbers in a PyTree if all that are known are finite."""
    if callable(generator) or isinstance(generator, AbstractGenerator | lx.AbstractLinearOperator):
        return True
    leaves = [leaf for leaf in jax.tree.leaves(generator) if eqx.is_array(leaf)]
    known = [np.asarray(leaf) for leaf in leaves if not is_traced(leaf)]
    return bool(leaves) and all(leaf.size and np.all(np.isfinite(leaf)) for leaf in known)


Symmetries = ExponentialSymmetry | Sequence[ExponentialSymmetry]
"""One symmetry, or several that commute."""


@shown
def symmetries_of(symmetry: Symmetries) -> tuple[ExponentialSymmetry, ...]:
    """The symmetries as a tuple: one symmetry, or several that commute.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of them.

    Returns:
        A tuple of at least one.

    Raises:
        ValueError: anything else, or an empty sequence.

    Examples:
        >>> from manifoldflow import symmetry
        >>> one = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> len(symmetry.symmetries_of(one)), len(symmetry.symmetries_of([one, one]))
        (1, 2)
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
    """The single value for one symmetry, all k of them for several."""
    return values[0] if isinstance(symmetry, ExponentialSymmetry) else values


@checked
def act_together(symmetries: Sequence[ExponentialSymmetry], point: Point, parameters: Any) -> Point:
    """The point e^{λ₁A₁ + … + λₖAₖ}θ, for symmetries that commute.

    Args:
        symmetries: k of them.
        point: θ.
        parameters: λ, (k,), in the order of the symmetries, as `noise_equilibrium` returns them.

    Returns:
        A point like θ.

    Raises:
        ValueError: no symmetry, or another number of parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> pairs = [
        ...     symmetry.ExponentialSymmetry(jnp.array(a)) for a in ([1.0, -1, 0], [0, 1.0, -1])
        ... ]
        >>> there = symmetry.act_together(pairs, jnp.ones(3), jnp.log(jnp.array([2.0, 4.0])))
        >>> print(there.round(5), round(float(jnp.prod(there)), 5))
        [2.   2.   0.25] 1.0
    """
    symmetries = symmetries_of(symmetries)
    values = jnp.asarray(real_numbers("act_together: parameters", parameters))
    if values.shape != (len(symmetries),):
        raise ValueError(
            f"act_together: parameters must be one number for each of the {len(symmetries)} "
            f"symmetries; got shape {values.shape}."
        )
    # One after the other, which is e^{ΣλA} only for symmetries that commute.
    for symmetry, parameter in zip(symmetries, values):
        point = symmetry.act(point, parameter)
    return point


@checked
def noether_charge(symmetry: Symmetries, point: Point) -> Float[Array, "..."]:
    """The charge C = ½θᵀAθ, which gradient flow conserves and SGD does not.

    Its gradient is Aθ. For a rescaling of two layers it is half the difference of their squared
    norms.

    Args:
        symmetry: an `ExponentialSymmetry`, or a sequence of k of them.
        point: θ.

    Returns:
        A scalar, or (k,).

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import symmetry
        >>> opposite = symmetry.ExponentialSymmetry({"u": 1.0, "w": -1.0})
        >>> print(symmetry.noether_charge(opposite, {"u": jnp.array(3.0), "w": jnp.array(1.0)}))
        4.0

    References:
        [Ziyin2024, eq. (6)], which prints θᵀAθ; with the ½ its eqs. (5), (7) and (9) hold.
    """
    coordinates, _ = _tree.split(point)

    def charge(one: ExponentialSymmetry) -> Scalar:
        return _tree.inner(coordinates, one.velocity(point)) / 2

    return like(symmetry, jnp.stack([charge(one) for one in symmetries_of(symmetry)]))
