"""Linear equations between tangents, by conjugate gradients."""

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
    """The tangent w with Aw = b, for a self-adjoint positive map A, by conjugate gradients.

    The iteration mixes all leaves, so it runs in the widest of their dtypes. It is differentiable
    in both modes, by the equation itself and not through its iterations. Where the steps run out, w
    is the last iterate.

    Args:
        mv: v ↦ Av; linear, self-adjoint and positive definite on the tangents that it meets.
        right: b, a PyTree of real floating-point arrays.
        rtol: the bound on ‖Aw − b‖, and on each step, relative to b and to w. A Python number,
            which is compiled in.
        max_steps: iterations at most; None for ten times the size of b.

    Returns:
        w, with the structure, shapes and dtypes of b.

    Raises:
        ValueError: b has no real floating-point arrays, or Ab has another structure.

    Examples:
        >>> import jax.numpy as jnp
        >>> from manifoldflow import linalg
        >>> diagonal = lambda v: {"a": 2 * v["a"], "b": 4 * v["b"]}
        >>> right = {"a": jnp.ones(2), "b": jnp.ones(1)}
        >>> found = linalg.tangent_solve(diagonal, right, rtol=1e-6)
        >>> print(found["a"].round(4), found["b"].round(4))
        [0.5 0.5] [0.25]
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
    # Without `throw`, since an error in the program would keep it out of the cache on disk.
    return _tree.cast_like(lx.linear_solve(operator, wide, solver, throw=False).value, right)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _shapes(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return [jnp.shape(leaf) for leaf in leaves], treedef
