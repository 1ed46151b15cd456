"""Linear equations between tangents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._errors import checked_count, checked_positive, shapes_of
from manifoldflow._types import Tangent


@checked
def tangent_solve(
    mv: Callable[[Tangent], Tangent],
    right: Tangent,
    *,
    rtol: float,
    max_steps: int | None = None,
) -> Tangent:
    """The tangent w with A w = b, for a self-adjoint positive map A, by conjugate gradients.

    In the widest dtype of the leaves, since the iteration mixes them. Differentiable in both
    modes, by the equation itself and not through its iterations. Where the steps run out, w is
    what they reached.

    Args:
        mv: v ↦ A v; linear, self-adjoint and positive definite on the tangents that it meets.
        right: b, a PyTree of real floating-point arrays.
        rtol: bound on ‖A w − b‖, and on that of each step, relative to b and to w. A number of
            Python, which is compiled in.
        max_steps: iterations at most; by default ten times the size of b.

    Returns:
        w, with the structure, shapes and dtypes of b.

    Raises:
        ValueError: if b has no real floating-point arrays, or A b has another structure.
    """
    checked_positive("tangent_solve: rtol", rtol)
    if max_steps is not None:
        max_steps = checked_count("tangent_solve: max_steps", max_steps)
    leaves = jax.tree.leaves(right)
    if not leaves or not all(_is_real(leaf) for leaf in leaves):
        raise ValueError(
            "tangent_solve: right must be a PyTree of real floating-point arrays; got "
            f"{shapes_of(right)}. A gradient of a loss is one."
        )
    dtype = _tree.dtype_of(right)

    def widened(vector: Tangent) -> Tangent:
        product = mv(_tree.cast_like(vector, right))
        if _shapes(product) != _shapes(right):
            raise ValueError(
                f"tangent_solve: mv must give tangents like right, {shapes_of(right)}; got "
                f"{shapes_of(product)}."
            )
        return _tree.cast_floats(product, dtype)

    wide = _tree.cast_floats(right, dtype)
    operator = lx.FunctionLinearOperator(
        widened, _tree.structure_of(wide), lx.positive_semidefinite_tag
    )
    solver = lx.CG(rtol=rtol, atol=0.0, max_steps=max_steps)
    return _tree.cast_like(lx.linear_solve(operator, wide, solver, throw=False).value, right)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _shapes(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return [jnp.shape(leaf) for leaf in leaves], treedef
