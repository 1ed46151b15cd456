"""The results of searches and solves, and the messages of those that fail."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._types import Coordinates, Flag, Point, Scalar

Value = TypeVar("Value", bound=PyTree[Any])


class RESULTS(eqx.Enumeration):
    """The ways in which a search or a solve can end: `successful`, or the reason for a failure.

    Compare members with `==`; `RESULTS[member]` is the message. Equinox compares no members of two
    enumerations, so that this one has the results of the whole package, grouped by who gives them.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> empty = mf.LevelSet(lambda x: x @ x + 1)
        >>> _, info = empty.project_with_info(jnp.array([1.0, 2.0]))
        >>> print(info.result == mf.RESULTS.not_on_manifold)
        True
        >>> mf.RESULTS[info.result]
        'No point of the manifold was found: ...'
    """

    # Whoever searches, solves or moves gives these.
    successful = ""
    nonfinite = (
        "NaN or infinity appeared. Look at the model and its derivatives at the start: the root "
        "or the norm of 0 has no derivative. If all is finite there, it came on the way: start "
        "elsewhere, and follow flows in smaller steps."
    )

    # Searches for a point of a manifold, and all that begins with one: `project`, `retract`,
    # `closest_point`, `limit_map`, `solve`, `minimize`, geodesics.
    not_on_manifold = (
        "No point of the manifold was found: the constraint could not be lowered to "
        "tolerance. The start may lie in another basin, the set may be empty, or the "
        "constraints may contradict each other (repeated inputs with different targets), or the "
        "model computes in less precision than its parameters have (bfloat16 inside). Try "
        "another start; `limit_map`, which follows gradient flow, finds what projections miss."
    )
    rank_zero = (
        "The constraint's Jacobian vanishes there, so that the set has no normal space. "
        "Write the constraint so that its derivative has full rank on the set, e.g. f in "
        "place of f²."
    )
    not_a_minimum = (
        "A stationary point was found whose Hessian is not positive on the normal space: "
        "a saddle. Check the rank that the manifold was given, or start elsewhere."
    )
    rank_too_small = (
        "The loss curves upwards in more directions than the manifold's `rank`: its minimisers "
        "are a smaller set. Count them with `manifold.rank(point)`, and build the manifold anew."
    )

    # Whatever goes by steps: the first where the caller may say how many, the second where not.
    max_steps_reached = (
        "The step limit was reached first. Raise `max_steps`. If more steps do not help, they are "
        "refused all along: look at the model where it stopped, or use float64."
    )
    out_of_steps = (
        "It did not end within its fixed number of steps. Look at the model there, use "
        "float64, or start nearer to the result."
    )

    # What Diffrax steps: `solve`, geodesics, transport; and `limit_map`.
    step_too_small = (
        "The adaptive step size fell below what the precision can resolve: the path runs into a "
        "kink, a pole or a loss of rank, or float64 is needed."
    )

    # `limit_map`.
    not_smooth = (
        "The loss is not smooth here; use `manifold.project`, or smooth activations (tanh, GELU, "
        "softplus in place of ReLU). Gradient flow runs along a kink, where steps only go to and "
        "fro across it, so that its limit is not found."
    )

    # `solve`.
    stopped_early = "The run was ended by `until` before its time."
    bad_end_time = "end_time must be positive and finite."

    # `simulate`.
    diverged = (
        "SGD diverged: a coordinate is not finite, or 10⁸ times larger than any at the start "
        '(or than 1). `stats["diverged_at"]` is the step that did it. Lower the learning '
        "rate: for plain SGD it must stay below 2 over the largest eigenvalue of the Hessian. "
        "At step 0, look at the model at the start, and whether the optimizer divides by the "
        "norm of a gradient that is zero there."
    )
    bad_learning_rate = "learning_rate must be positive and finite, momentum in [0, 1)."

    # `minimize`.
    stalled = (
        "The gradient stopped falling at the level of rounding, above the tolerance that was asked "
        "for. Loosen the tolerance, or use float64."
    )

    # `logarithm_map` and `inverse_retract`.
    no_geodesic = (
        "Shooting found no geodesic between the two points. Both must lie on one piece of the "
        "manifold, nearer to each other than its radius of curvature times π; go by points "
        "between them."
    )
    not_retracted = (
        "No tangent was found whose retraction is the other point. They must be nearer to each "
        "other than the radius of curvature of the manifold."
    )

    # `symmetry`.
    not_a_symmetry = (
        "The loss does not have this symmetry, or several symmetries do not commute: ∇ℓ·Aθ is "
        "far from zero. `symmetry.check_symmetry` says by how much."
    )
    no_equilibrium = (
        "There is no balance: along a symmetry noise (or decay) pushes to one side only. "
        "Give weight_decay > 0 and noise_scale, take kind='norm', or leave that symmetry out "
        "of `symmetries`."
    )

    # Eigenvalues.
    not_converged = (
        "The eigenvalues were not found to tolerance: their residuals say how far from an "
        "eigenvalue each of them may be. Allow more products, ask for fewer, or use float64."
    )

    # The stability of SGD.
    flat = (
        "The Gauss-Newton matrix vanishes there: no output changes with the coordinates, no step "
        "moves, and every learning rate is stable. Look at the model, and at what is trainable."
    )
    unstable = (
        "SGD of this learning rate leaves the minimum, in the mean square, so that nothing is "
        "stationary. Take it below `mf.largest_stable_learning_rate`, or larger batches."
    )


def without_step_limit(result: RESULTS) -> RESULTS:
    """The result for callers that cannot choose the number of steps of a search inside them."""
    is_limit = result == RESULTS.max_steps_reached
    return _tree.where(is_limit, RESULTS.out_of_steps, result)


def from_diffrax(result: dfx.RESULTS, reached: PyTree[Array]) -> RESULTS:
    """The member of `RESULTS` for one of Diffrax's solves, from its result and its last state.

    Steps of a fixed size never fail in Diffrax's eyes, whatever they run into.
    """
    ours = RESULTS.nonfinite
    for theirs, mine in (
        (dfx.RESULTS.successful, RESULTS.successful),
        (dfx.RESULTS.event_occurred, RESULTS.stopped_early),
    ):
        ours = _tree.where((result == theirs) & _tree.all_finite(reached), mine, ours)
    for theirs, mine in (
        (dfx.RESULTS.max_steps_reached, RESULTS.max_steps_reached),
        (dfx.RESULTS.dt_min_reached, RESULTS.step_too_small),
    ):
        ours = _tree.where(result == theirs, mine, ours)
    return ours


class Info(eqx.Module):
    """The record of a search: its result, its last defect and its cost.

    Attributes:
        result: a member of `RESULTS`.
        defect: ‖J†f‖ at the end, an estimate of the distance to the manifold.
        num_steps: accepted steps.
        num_factorizations: Gram matrices or Hessians factorised, shifted copies not counted.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> circle = mf.LevelSet(lambda x: x @ x - 1)
        >>> _, info = circle.project_with_info(jnp.array([3.0, 4.0]))
        >>> print(info.is_successful, info.defect < 1e-6, info.num_steps < 20)
        True True True
    """

    result: RESULTS
    defect: Scalar
    num_steps: Int[Array, ""]
    num_factorizations: Int[Array, ""]

    @property
    def is_successful(self) -> Bool[Array, "..."]:
        """True where the search reached its tolerance."""
        return self.result == RESULTS.successful


def or_nan(value: Value, is_there: Flag, of: Any = None) -> Value:
    """The value, with NaN leaves and NaN derivatives where the search for it has failed.

    By a product: a `where` would give what it leaves out the derivative zero, as if all were
    well. Integers and truth values become 0.

    Args:
        value: a PyTree of arrays.
        is_there: False where the value is missing.
        of: the arguments it was computed from, for searches that may stop before using some of
            them: else the derivatives in reverse mode would be zero in those.
    """
    leaves = jax.tree.leaves(value)
    # One factor for each dtype, and not one program for each leaf.
    factors = {
        dtype: jax.lax.select(is_there, jnp.ones((), dtype), jnp.asarray(_missing(dtype), dtype))
        for dtype in {leaf.dtype for leaf in leaves}
    }
    value = jax.tree.map(lambda leaf: leaf * factors[leaf.dtype], value)
    if of is None:
        return value
    return _tied(value, eqx.filter(of, eqx.is_inexact_array), is_there)


@eqx.filter_custom_jvp
def _tied(value: Any, of: Any, is_there: Flag) -> Any:
    del of, is_there
    return value


@_tied.def_jvp
def _tied_jvp(primals: tuple, tangents: tuple) -> tuple:
    # Zero or NaN times all that moves, added to all that depends on it.
    value, _, is_there = primals
    value_dot, of_dot, _ = tangents
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(of_dot))
    dtype = jnp.result_type(total, float)
    drag = total * jax.lax.select(is_there, jnp.zeros((), dtype), jnp.full((), jnp.nan, dtype))

    def moved(leaf: Array | None, dot: Array | None) -> Array | None:
        if leaf is None or not eqx.is_inexact_array(leaf):
            return dot
        return jnp.full_like(leaf, 0) + drag.astype(leaf.dtype) + (0 if dot is None else dot)

    dots = jax.tree.map(moved, value, value_dot, is_leaf=lambda leaf: leaf is None)
    return value, dots


def _missing(dtype: Any) -> float:
    return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0


def delivered(
    value: Value, result: RESULTS, throw: bool, detail: Callable[[], str] | None = None
) -> Value:
    """The value that a search has found, or an error if it failed and `throw` is set.

    Never inside the search's own program: callers that do not want the error run the same one, and
    programs with `error_if` are not cached on disk. Only under a trace it must be part of one.

    Args:
        value: NaN where the search failed.
        result: the end of the search.
        throw: raise if it failed.
        detail: words to follow the message, where it is raised at once.
    """
    if not throw:
        return value
    fine = RESULTS.successful, RESULTS.stopped_early
    if is_traced(result):
        return result.error_if(value, (result != fine[0]) & (result != fine[1]))
    result = jax.device_get(result)  # NumPy compares it without a program
    if not any(result == one for one in fine):
        raise eqx.EquinoxRuntimeError(f"{RESULTS[result]}{detail() if detail else ''}")
    return value


class Solution(eqx.Module):
    """A path on (or towards) a manifold, at the saved times.

    Attributes:
        times: (saves,), the start included, on the clock of the flow.
        points: the coordinates at those times, each leaf with a leading axis `saves`.
        observables: name → array with a leading axis `saves`.
        stats: num_steps, num_rejected, num_gradients, num_factorizations, max_defect; for
            `minimize` num_hessian_products and gradient_norm as well.
        result: a member of `RESULTS`.
        clock: the formula of `times` in the learning rates of the steps, where that is known.
        final: the user's object at the end of the path.

    Examples:
        >>> import jax.numpy as jnp
        >>> import manifoldflow as mf
        >>> flow = mf.GradientFlow(mf.FunctionLoss(lambda x: jnp.sum(x**2) / 2))
        >>> walk = mf.solve(flow, jnp.array([1.0]), end_time=1.0, num_saves=2)
        >>> print(walk.times, walk.points[:, 0].round(3), walk.is_successful)
        [0.  0.5 1. ] [1.    0.607 0.368] True
        >>> print(walk.final.round(3), walk.point(1).round(3))
        [0.368] [0.607]
    """

    times: Float[Array, " saves"]
    points: Coordinates
    observables: Mapping[str, PyTree[Array]]
    stats: Mapping[str, Array]
    result: RESULTS
    final_coordinates: Coordinates
    frozen: PyTree[Array]
    remainder: _tree.Static = eqx.field(static=True)
    clock: str | None = eqx.field(static=True)

    def __init__(
        self,
        *,
        times: Array,
        points: Coordinates,
        observables: Mapping[str, PyTree[Array]],
        stats: Mapping[str, Array],
        result: RESULTS,
        final_coordinates: Coordinates,
        remainder: Point,
        clock: str | None = None,
    ):
        self.clock = clock
        self.times = times
        self.points = points
        self.observables = dict(observables)
        self.stats = dict(stats)
        self.result = result
        self.final_coordinates = final_coordinates
        self.frozen, static = eqx.partition(remainder, eqx.is_array)
        self.remainder = _tree.Static(static)

    def _rebuild(self, coordinates: Coordinates) -> Point:
        return eqx.combine(coordinates, self.frozen, self.remainder.tree)

    @property
    def final(self) -> Point:
        """The user's object at the end of the path."""
        return self._rebuild(self.final_coordinates)

    def point(self, index: int) -> Point:
        """The user's object at save number `index`; negative counts from the end."""
        return self._rebuild(jax.tree.map(lambda leaf: leaf[index], self.points))

    @property
    def is_successful(self) -> Bool[Array, "..."]:
        """True where the path reached its end, or was stopped early on request."""
        return (self.result == RESULTS.successful) | (self.result == RESULTS.stopped_early)


Observables = Mapping[str, Callable[[Point], PyTree[Any]]]


def delivered_solution(
    solution: Solution, throw: bool, detail: Callable[[], str] | None = None
) -> Solution:
    """The result of `delivered`, for a whole solution."""
    final = delivered(solution.final_coordinates, solution.result, throw, detail)
    return eqx.tree_at(lambda s: s.final_coordinates, solution, final)
