"""The start of a flow, and the return of its points to its manifold."""

import equinox as eqx
import jax.numpy as jnp

from manifoldflow import _tree
from manifoldflow._errors import is_traced
from manifoldflow._results import RESULTS
from manifoldflow._types import Coordinates, Point, Scalar
from manifoldflow.flows._base import AbstractFlow


def newton_corrected(
    flow: AbstractFlow, y: Coordinates, remainder: Point
) -> tuple[Coordinates, Scalar]:
    if flow.manifold is None:
        return y, jnp.zeros((), _tree.dtype_of(y))
    point, info = flow.manifold.newton_correct(_tree.join(y, remainder))
    return flow.split(point)[0], _tree.where(info.is_successful, info.defect, jnp.inf)


class Start(eqx.Module):
    """The point of the flow's manifold to start from, and the result of the search for it."""

    point: Point
    result: RESULTS


def started(flow: AbstractFlow, point: Point, max_steps: int) -> Start:
    """The start of a flow, by a program of its own that other flows need not compile again."""
    if flow.manifold is None:
        return Start(point, successful())
    # `max_steps` is meant for the flow: a small one must not end the search for its start.
    landed, info = flow.manifold.project_with_info(point, max_steps=max(100, max_steps))
    return Start(landed, info.result)


def successful() -> RESULTS:
    """The result `successful` as an array, as a search gives it: then both run the same program."""
    return _tree.where(jnp.asarray(True), RESULTS.successful, RESULTS.nonfinite)


def check_can_move(flow: AbstractFlow, point: Point) -> None:
    """Refuse noise without a dimension to move in, as far as a concrete point can tell."""
    if is_traced((flow, point)):
        return
    if flow.manifold is not None and flow.manifold.dimension(point) == 0:
        raise ValueError(
            f"{type(flow).__name__} has nothing to move: its manifold has dimension 0, as many "
            "constraints as coordinates. Use fewer examples or a wider model."
        )
