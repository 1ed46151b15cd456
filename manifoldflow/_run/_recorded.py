"""Runs that are written down leg by leg, and go on from there to the last bit.

A leg starts from what the journal keeps, and from nothing else, and one program makes all the
legs of a run: so no bit can depend on where it was cut. What is shown is shown between the legs,
and so is no part of that program.
"""

import abc
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow._errors import is_traced
from manifoldflow._journal import Journal, Place, store_of
from manifoldflow._run._reports import Report, tell

State = TypeVar("State")


class Save(NamedTuple):
    """The content of a journal after some of the steps of a run.

    Attributes:
        step: the number of steps.
        time: on the clock of the run.
        row: coordinates, observables, numbers to go on with.
        state: the rest that the next leg starts from.
        must_write: True if it is to be written, whatever that costs.
        is_told: False where the run has ended before, so that it is not shown.
    """

    step: int
    time: Any
    row: tuple[PyTree[Array], PyTree[Array], PyTree[Array]]
    state: PyTree[Array]
    must_write: bool
    is_told: bool = True


class Leg(NamedTuple):
    """The place that a leg has come to.

    Attributes:
        state: the start of the next one.
        share: the part of the run that is done; None if it ended on the way.
        save: None where nothing is kept, so that a run that goes on comes here once more.
    """

    state: Any
    share: Any
    save: Save | None


class AbstractRun(eqx.Module, Generic[State]):
    """A run as its journal sees it."""

    meter: eqx.AbstractVar[dfx.AbstractProgressMeter]
    reports: eqx.AbstractVar[tuple[Report, ...]]

    @abc.abstractmethod
    def start(self) -> Leg:
        """The way to the first save, which is the start."""

    @abc.abstractmethod
    def again(self, journal: Journal, state: PyTree[Array], step: int) -> State:
        """The state to go on from: the journal's last save, or the state after so many steps."""

    @abc.abstractmethod
    def legs(self, state: State, journal: Journal) -> Iterator[Leg]:
        """The legs from save to save, up to the end."""


def check_concrete(kind: str, given: Any) -> None:
    """Refuses files for values that are known only when a program runs: Python writes them."""
    if is_traced(given):
        raise ValueError(
            f"`checkpoint` needs concrete values: call `{kind}` outside jit and vmap, and the same "
            "where a run is taken up from another file."
        )


def recorded(
    run: AbstractRun[State], journal: Journal, checkpoint: Place | None, resume: Place | None = None
) -> State:
    """The last state of a run, from wherever its journal has got to.

    Args:
        run: the run.
        journal: collects its saves.
        checkpoint: the place to write them to, and to read from if they are there; or None.
        resume: the place to read from instead; there must be something.
    """
    shown = run.meter.init()
    with journal.opened(checkpoint) as target:
        # `resume` is read only; the run is written to `checkpoint` from there on.
        source = target if resume is None else store_of("resume", resume)
        if source is not None and (resume is not None or source.has_any()):
            state = run.again(journal, *journal.read(source))
        else:
            first = run.start()
            state = first.state
            if first.save is not None:
                _keep(run, journal, target, first.save)
        for leg in run.legs(state, journal):
            state = leg.state
            if leg.save is not None:
                _keep(run, journal, target, leg.save)
            if leg.share is not None:
                shown = run.meter.step(shown, jnp.asarray(leg.share, float))
    run.meter.close(shown)
    return state


def _keep(run: AbstractRun[Any], journal: Journal, target: Any, save: Save) -> None:
    journal.add(save.row, save.step, save.time)
    # Written before it is shown: a callback that raises must not cost the save.
    if target is not None:
        journal.write(target, save.state, must=save.must_write)
    if save.is_told:
        tell(run.reports, save.time, *save.row[:2])
