"""The return to a manifold after a step along a tangent: the orthographic retraction."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from manifoldflow import _tree
from manifoldflow._jvp import constraint_dot, filled, no_tangent
from manifoldflow._results import Info, or_nan
from manifoldflow._types import Coordinates, Flag, Point, Tangent
from manifoldflow.linalg import tangent_solve
from manifoldflow.manifolds._normal_space import AbstractNormalSpace
from manifoldflow.manifolds._search import (
    Constrained,
    Floors,
    Found,
    look,
    MAX_STEPS,
    nothing_found,
)


class _State(eqx.Module):
    """The state of a search by `orthographic_retract`."""

    coordinates: Coordinates
    found: Found
    num_steps: Int[Array, ""]
    is_done: Flag


@eqx.filter_custom_jvp
def orthographic_retract(
    manifold: Constrained,
    coordinates: Coordinates,
    vector: Tangent,
    remainder: Point,
    *,
    max_steps: Int[Array, ""] | int = MAX_STEPS,
    base: AbstractNormalSpace | None = None,
) -> tuple[Coordinates, Info]:
    """The point of Γ on the normal space at x through x + P v (the orthographic retraction).

    Each step is a Gauss-Newton step projected on the normal space at x; it shortens the
    way by the squared sine of the angle between the normal spaces here and there. If the one
    at x is given as `base`, v must be tangent.
    """
    if base is None:
        base = manifold.normal_space(_tree.join(coordinates, remainder))
        vector = base.tangent(vector)
    start = _tree.add(coordinates, vector)
    floors = Floors(start)

    def going(state: _State) -> Flag:
        return ~state.is_done & (state.num_steps < max_steps)

    def step(state: _State) -> _State:
        point = _tree.join(state.coordinates, remainder)
        space, value = manifold.normal_space(point), manifold.constraint(point)
        lift = space.pseudo_inverse(value)
        defect = _tree.norm(lift)
        back = base.pseudo_inverse(base.mv(lift))  # P⊥ of the lift
        moved = _tree.subtract(state.coordinates, back)
        # At the floor of rounding, or on the way out: keep what is there. Written so that a defect
        # of NaN, for which every comparison is False, ends the search too.
        is_done = (defect <= floors.target) | ~(defect <= 0.9 * state.found.defect)
        return _State(
            _tree.where(is_done, state.coordinates, moved),
            look(space, value, defect, floors),
            state.num_steps + 1,
            is_done,
        )

    first = _State(start, nothing_found(floors.target), jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(going, step, first)
    result = end.found.verdict(end.is_done, jnp.asarray(False))
    return end.coordinates, Info(result, end.found.defect, end.num_steps, end.num_steps + 1)


@orthographic_retract.def_jvp
def _orthographic_jvp(
    primals: tuple,
    tangents: tuple,
    *,
    max_steps: Int[Array, ""] | int = MAX_STEPS,
    base: AbstractNormalSpace | None = None,
) -> tuple:
    # The result y lies on the manifold and has P_x(y − x − v) = 0. Its derivative is
    # tangent at y (but for data that move the manifold) with
    # P_x dy = P_x(dx + dv) − dP_x(y − x − v).
    manifold, coordinates, vector, remainder = primals
    manifold_dot, coordinates_dot, vector_dot, remainder_dot = tangents
    landed, info = orthographic_retract(*primals, max_steps=max_steps, base=base)
    here = manifold.normal_space(_tree.join(coordinates, remainder)) if base is None else base
    there = manifold.normal_space(_tree.join(landed, remainder))
    gap = _tree.subtract(_tree.subtract(landed, coordinates), vector)

    def projected_gap(manifold: Constrained, x: Coordinates, remainder: Point) -> Tangent:
        return manifold.normal_space(_tree.join(x, remainder)).tangent(gap)

    _, turned = eqx.filter_jvp(
        projected_gap,
        (manifold, coordinates, remainder),
        (manifold_dot, coordinates_dot, remainder_dot),
    )
    moved = _tree.add(filled(coordinates_dot, landed), filled(vector_dot, landed))
    wanted = _tree.subtract(here.tangent(moved), filled(turned, landed))
    normal_dot = _tree.zeros_like(landed)
    drift = constraint_dot(manifold, manifold_dot, landed, remainder, remainder_dot)
    if drift is not None:
        normal_dot = _tree.scale(-1, there.pseudo_inverse(drift))
        wanted = _tree.subtract(wanted, here.tangent(normal_dot))
    # In reverse mode conjugate gradients make 0 of NaN: on the way back it passes here after them.
    tangent_dot = _oblique_lift(here, there, or_nan(wanted, info.is_successful))
    return (landed, info), (_tree.add(tangent_dot, normal_dot), no_tangent(info))


def _oblique_lift(
    here: AbstractNormalSpace, there: AbstractNormalSpace, wanted: Tangent
) -> Tangent:
    """The tangent w there whose projection here is the wanted one."""

    def mv(w: Tangent) -> Tangent:
        tangent = there.tangent(w)
        return _tree.add(there.tangent(here.tangent(tangent)), _tree.subtract(w, tangent))

    # Iteratively: w ↦ P_y P_x w + P⊥w is the identity up to the squared sine between the two
    # spaces.
    rtol = _tree.eps_of(wanted) ** 0.9
    return there.tangent(tangent_solve(mv, there.tangent(wanted), rtol=rtol))
