"""The progress that the limit map shows on its way."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from manifoldflow import _tree
from manifoldflow._run import meter_of, Report, row_reports, share_of_decades, show
from manifoldflow._types import Coordinates, Scalar


class Shown(eqx.Module):
    """A progress meter and functions to call; of none of them nothing is left in the program."""

    meter: dfx.AbstractProgressMeter
    reports: tuple[Report, ...]

    @property
    def has_meter(self) -> bool:
        return not isinstance(self.meter, dfx.NoProgressMeter)

    def init(self, dtype: Any) -> PyTree[Array]:
        """The meter's state, and what remained at first."""
        return (self.meter.init(), jnp.zeros((), dtype)) if self.has_meter else None

    def step(
        self,
        state: PyTree[Array],
        num_steps: Array,
        coordinates: Coordinates,
        remaining: Scalar,
        wanted: Scalar,
    ) -> PyTree[Array]:
        """Show the share of the way that is done."""
        show(self.reports, num_steps, coordinates, {"remaining": remaining})
        if not self.has_meter:
            return None
        inner, first = state
        first = _tree.where(num_steps == 0, remaining, first)
        share = jnp.clip(share_of_decades(first, remaining, wanted), 0, 1)
        # In the type that Diffrax's meters count in.
        share = _tree.where(remaining <= wanted, 1, share).astype(float)
        return self.meter.step(inner, share), first

    def close(self, state: PyTree[Array]) -> None:
        if self.has_meter:
            self.meter.close(state[0])


def shown_of(progress: Any) -> Shown:
    if progress is True:
        return Shown(dfx.NoProgressMeter(), (_print_step,))
    return Shown(meter_of(progress), row_reports(progress))


def _print_step(num_steps: Any, coordinates: Coordinates, found: Any) -> None:
    del coordinates
    print(f"limit_map: after {int(num_steps)} steps {float(found['remaining']):.3g} remain")
