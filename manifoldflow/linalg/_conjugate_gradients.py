"""Linear equations between tangents."""

from collections.abc import Callable

import lineax as lx

from manifoldflow import _tree
from manifoldflow._types import Tangent


def tangent_solve(
    mv: Callable[[Tangent], Tangent], right: Tangent, tol: float, max_steps: int | None = None
) -> Tangent:
    """The w with mv(w) = right, for self-adjoint and positive mv, by conjugate gradients.

    In the widest dtype of the leaves, since the iteration mixes them.
    """
    dtype = _tree.dtype_of(right)

    def widened(vector: Tangent) -> Tangent:
        return _tree.cast_floats(mv(_tree.cast_like(vector, right)), dtype)

    wide = _tree.cast_floats(right, dtype)
    operator = lx.FunctionLinearOperator(
        widened, _tree.structure_of(wide), lx.positive_semidefinite_tag
    )
    solver = lx.CG(rtol=tol, atol=0.0, max_steps=max_steps)
    return _tree.cast_like(lx.linear_solve(operator, wide, solver, throw=False).value, right)
