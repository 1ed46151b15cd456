"""Searches that are written to a file as they go, and go on from it to the last bit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._journal import (
    Identity,
    Journal,
    observables_of,
    parts_of,
    Place,
    program,
    start_of,
)
from manifoldflow._results import Info, RESULTS, Solution
from manifoldflow._run import AbstractRun, check_concrete, Leg, recorded, Report, Save
from manifoldflow._types import Coordinates, Flag, Point, Scalar
from manifoldflow.manifolds import AbstractManifold
from manifoldflow.optimize._base import AbstractMethod, Attempt, Problem, Work
from manifoldflow.optimize._search import (
    attempted,
    begun,
    landed,
    Options,
    share_of,
    shown,
    solution_of,
    State,
    Tally,
)

# At the start of a leg the function and the normal space are computed anew, one attempt's worth.
_ATTEMPTS_OF_A_LEG = 8


class _Place(eqx.Module):
    """The stored part of a search: all but what one gradient at the coordinates gives."""

    coordinates: Coordinates
    inner: PyTree[Array]
    is_done: Flag
    gradient_norm: Scalar
    tally: Tally


class _Here(eqx.Module):
    """The state of a leg."""

    place: _Place
    result: RESULTS
    is_fine: Flag
    share: Scalar
    row: tuple[Coordinates, dict[str, PyTree[Array]], tuple[()]]


def minimize_to_file(
    problem: Problem, coordinates: Coordinates, options: Options, checkpoint: Place
) -> Solution:
    """The search leg by leg, from wherever a file has got to."""
    check_concrete("minimize", (problem, coordinates, options))
    start, info = landed(problem, coordinates, options.max_steps)
    # What is shown is shown between the legs, and one program makes them for any bound.
    quiet = dataclasses.replace(options, meter=dfx.NoProgressMeter(), reports=(), max_steps=1)
    first = _begin(problem, start, info, quiet)
    journal = Journal(
        "minimize", _identity(problem, coordinates, quiet), first.row, first.place, None
    )
    run = _Search(options.meter, options.reports, problem, quiet, first, options.max_steps)
    here = recorded(run, journal, checkpoint)
    return _end(problem, quiet, start, here)


class _Search(AbstractRun[_Here]):
    """A search by legs of some attempts."""

    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]
    problem: Problem
    options: Options
    first: _Here
    max_steps: int

    def start(self) -> Leg:
        return self._leg_to(self.first)

    def again(self, journal: Journal, state: _Place, step: int) -> _Here:
        """A search that had ended there had ended well."""
        result = _tree.where(state.is_done, RESULTS.successful, RESULTS.max_steps_reached)
        return eqx.tree_at(lambda h: (h.place, h.result), self.first, (state, result))

    def legs(self, state: _Here, journal: Journal) -> Iterator[Leg]:
        while not state.place.is_done and state.place.tally.num_attempts < self.max_steps:
            whole = int(state.place.tally.num_attempts) // _ATTEMPTS_OF_A_LEG + 1
            last = min(whole * _ATTEMPTS_OF_A_LEG, self.max_steps)
            bounds = jnp.asarray(last), jnp.asarray(self.max_steps)
            state = _leg(self.problem, self.options, state.place, *bounds)
            yield self._leg_to(state)

    def _leg_to(self, here: _Here) -> Leg:
        """A save after whole legs and at an end that is a good one.

        Any other might not be the end if more attempts were allowed, or fewer.
        """
        tally, is_done = here.place.tally, bool(here.place.is_done)
        step, is_good = int(tally.num_attempts), bool(here.result == RESULTS.successful)
        is_kept = is_good if is_done else step % _ATTEMPTS_OF_A_LEG == 0
        save = Save(step, tally.num_steps, here.row, here.place, must_write=is_done)
        return Leg(here, here.share, save if is_kept else None)


@eqx.filter_jit
def _begin(problem: Problem, start: Coordinates, info: Info, options: Options) -> _Here:
    state, is_fine = begun(problem, start, info, options)
    return _here(problem, options, state, is_fine, 1)


@eqx.filter_jit
def _leg(problem: Problem, options: Options, place: _Place, last: Array, most: Array) -> _Here:
    """Up to `last` attempts, from what is stored; the one gradient more is counted."""
    again = place.tally.work + Work(num_gradients=1, num_factorizations=1)
    tally = eqx.tree_at(lambda t: t.work, place.tally, again)
    result = _tree.where(place.is_done, RESULTS.successful, RESULTS.max_steps_reached)
    state = State(problem.at(place.coordinates), place.inner, result, place.is_done, tally, None)
    state = attempted(problem, options, state, last)
    return _here(problem, options, state, jnp.asarray(True), most)


def _here(problem: Problem, options: Options, state: State, is_fine: Flag, most: Any) -> _Here:
    iterate = state.iterate
    norm = iterate.gradient_norm
    return _Here(
        _Place(iterate.coordinates, state.inner, state.is_done, norm, state.tally),
        state.result,
        is_fine,
        share_of(options, state, most),
        (iterate.coordinates, shown(problem, options, state), ()),
    )


@eqx.filter_jit
def _end(problem: Problem, options: Options, start: Coordinates, here: _Here) -> Solution:
    place = here.place
    ends = start, place.coordinates
    return solution_of(
        problem, options, ends, place.gradient_norm, place.tally, here.result, here.is_fine
    )


def _identity(problem: Problem, coordinates: Coordinates, options: Options) -> Identity:
    """The identity of this search among others: all that its steps depend on."""
    point, manifold, fn = problem.point(coordinates), problem.manifold, problem.fn
    return Identity(
        {
            **start_of(coordinates, problem.remainder),
            **parts_of("manifold", manifold),
            **parts_of("function", fn),
            **parts_of("method", options.method),
            **parts_of("gradient_tolerance", options.gradient_tolerance),
        },
        observables_of(options.observe, point),
        {
            "manifold": program(_constraint, manifold, point),
            "function": program(_value, problem, coordinates),
            "method": program(_attempt, options.method, problem, coordinates),
        },
    )


@eqx.filter_jit
def _constraint(manifold: AbstractManifold, point: Point) -> PyTree[Array]:
    return manifold.constraint(point)


@eqx.filter_jit
def _value(problem: Problem, coordinates: Coordinates) -> Scalar:
    return problem.value(coordinates)


@eqx.filter_jit
def _attempt(method: AbstractMethod, problem: Problem, coordinates: Coordinates) -> Attempt:
    first = problem.at(coordinates)
    return method.step(problem, first, method.init(problem, first))
