"""Any Diffrax solver, made to end every step on a manifold.

The only file that knows the private side of Diffrax solvers: each hook that is
forwarded here has a test of its own.
"""

from typing import Any, Protocol, runtime_checkable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from manifoldflow import _tree
from manifoldflow._boundary import checked
from manifoldflow._results import Info
from manifoldflow._run import check_form
from manifoldflow._types import Coordinates, Point, Scalar


@runtime_checkable
class Reachable(Protocol):
    """All that `Projected` needs of a manifold."""

    def split(self, point: Point) -> tuple[Coordinates, Point]: ...

    def newton_correct(self, point: Point) -> tuple[Point, Info]: ...


class _ProjectedState(eqx.Module):
    """The state of the wrapped solver, and the records of the projections so far."""

    inner: PyTree[Any]
    num_factorizations: Int[Array, ""]
    max_defect: Scalar


class Projected(dfx.AbstractWrappedSolver):
    """A Diffrax solver that projects the state on a manifold after each of its steps.

    The order of the solver is kept if the vector field is tangent to the manifold; with a
    field that is not, it drops to first order. A step that cannot be projected is rejected by
    adaptive controllers, and shows as a non-finite state to the others.

    Args:
        solver: any Diffrax solver for the terms at hand.
        manifold: the set on which every accepted step ends; a manifold, or its tangent bundle.
        like: a point of the kind that is moved, if it has leaves that are not
            coordinates (an Equinox module's activation); the state itself if not.

    Examples:
        >>> import diffrax as dfx
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.models.Sphere(1).manifold
        >>> turn = dfx.ODETerm(lambda t, x, args: jnp.stack([-x[1], x[0]]))
        >>> solver, start = mf.Projected(dfx.Euler(), circle), jnp.array([1.0, 0.0])
        >>> end = dfx.diffeqsolve(turn, solver, 0.0, 1.0, 0.1, start).ys[-1]
        >>> print(f"{jnp.linalg.norm(end):.6f}")  # Euler's method alone gives 1.05
        1.000000
    """

    solver: dfx.AbstractSolver
    manifold: Reachable
    like: Point

    @checked
    def __init__(self, solver: dfx.AbstractSolver, manifold: Reachable, like: Point = None):
        self.solver = solver
        self.manifold = manifold
        self.like = like

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        # Solvers that need more than a Brownian increment (SPaRK, ShARK) say so here.
        return self.solver.term_compatible_contr_kwargs

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def scan_kind(self):
        # ForwardMode and DirectAdjoint set this field of Runge-Kutta solvers.
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args) -> _ProjectedState:
        check_form(terms, self.solver)
        inner = self.solver.init(terms, t0, t1, y0, args)
        zero = jnp.zeros((), _tree.dtype_of(y0))
        return _ProjectedState(inner, jnp.asarray(0), zero)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        # True: solvers that reuse their last stage must evaluate it anew, at the
        # projected state.
        y1, error, dense_info, inner, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state.inner, True
        )
        y1, info = self._project(y1)
        # NaN and an infinite error are the only ways in which Diffrax lets a solver reject its own
        # step.
        landed = info.is_successful
        y1 = jax.tree.map(lambda leaf: _tree.where(landed, leaf, jnp.nan), y1)
        if error is not None:
            error = jax.tree.map(lambda leaf: _tree.where(landed, leaf, jnp.inf), error)
        if "y1" in dense_info:
            dense_info = {**dense_info, "y1": y1}
        state = _ProjectedState(
            inner,
            solver_state.num_factorizations + info.num_factorizations,
            jnp.maximum(solver_state.max_defect, jax.lax.stop_gradient(info.defect)),
        )
        return y1, error, dense_info, state, result

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def _project(self, y: Coordinates) -> tuple[Coordinates, Any]:
        remainder = None if self.like is None else self.manifold.split(self.like)[1]
        point = y if remainder is None else _tree.join(y, remainder)
        landed, info = self.manifold.newton_correct(point)
        return self.manifold.split(landed)[0], info
