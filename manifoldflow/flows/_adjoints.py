"""The ways in which derivatives go through a solve, and the errors where they do not."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx

from manifoldflow._modes import backwards_only, forwards_only
from manifoldflow._results import Solution
from manifoldflow.flows._options import Options

_FORWARDS = (
    "solve takes derivatives backwards (jax.grad, jax.vjp), unless it is told otherwise. For "
    "jax.jvp and jax.jacfwd give it adjoint=diffrax.ForwardMode(), which goes forwards only; for "
    "jax.hessian adjoint=diffrax.DirectAdjoint(), which goes both ways and keeps all steps."
)
_TWICE = (
    "solve takes first derivatives, unless it is told otherwise. For jax.grad of jax.grad and "
    "jax.hessian give it adjoint=diffrax.DirectAdjoint(), which keeps all steps; or "
    "adjoint=diffrax.ForwardMode(), and take both derivatives by jax.jacfwd."
)
_BACKWARDS = (
    "solve with adjoint=diffrax.ForwardMode() takes derivatives forwards only (jax.jvp, "
    "jax.jacfwd). For jax.grad and jax.vjp leave `adjoint` out, or give it "
    "adjoint=diffrax.DirectAdjoint(), which goes both ways."
)


def through(options: Options, follow: Callable[..., Solution], *given: Any) -> Solution:
    """`follow(*given, options)`, with a sentence for derivatives that its adjoint does not have."""
    # Scans go both ways, whatever the adjoint.
    if options.solver is None:
        return follow(*given, options)
    if isinstance(options.adjoint, dfx.RecursiveCheckpointAdjoint):
        given = backwards_only(given, forwards=_FORWARDS, twice=_TWICE)
    solution = follow(*given, options)
    if isinstance(options.adjoint, dfx.ForwardMode):
        solution = forwards_only(solution, backwards=_BACKWARDS)
    return solution
