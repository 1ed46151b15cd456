"""The distance of a leaf from where it was: the leaf itself, for all that is linear in it.

A row is U(a)ᵀδ whether a model uses w or w − w₀. As a subtraction it would be a shift (see
`_use_shift`), whose rows are as large as the leaf; under a name of its own the leaf passes through.
"""

import jax
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked


# Compiled, so that a jaxpr shows one call of this name, by which `_through` knows it.
@jax.jit
def displaced(leaf: Array, origin: Array) -> Array:
    return leaf - origin


@checked
def displacement(coordinates: PyTree[Array], origin: PyTree[Array]) -> PyTree[Array]:
    """The difference θ − θ₀, which `structured_jacobian` does not count as a use of θ.

    A model that is linear in it, such as `losses.linearized`, so has a Jacobian without n×D
    numbers. Everywhere else it is a subtraction.

    Args:
        coordinates: θ, a PyTree of arrays.
        origin: θ₀, of the same structure and shapes, and no parameter itself.

    Raises:
        ValueError: arrays that are not real, or differ in structure or shapes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> print(linalg.displacement({"a": jnp.array([3.0])}, {"a": jnp.array([1.0])})["a"])
        [2.]
    """
    _tree.split(coordinates)
    origin = _tree.as_tangent(coordinates, origin, "displacement: origin")
    return jax.tree.map(displaced, coordinates, origin)
