"""The stochastic integral that a Diffrax solver approximates, and terms that know their own."""

from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import jax

Form = Literal["ito", "stratonovich"]


class AbstractVectorField(eqx.Module):
    """A vector field that knows the form of the equation it belongs to; None without noise."""

    form: eqx.AbstractVar[Form | None]


def form_of(solver: dfx.AbstractSolver) -> Form:
    """The sense of the integral that a solver approximates, by its marker class."""
    ito = isinstance(solver, dfx.AbstractItoSolver)
    if ito == isinstance(solver, dfx.AbstractStratonovichSolver):
        raise ValueError(
            f"{type(solver).__name__} is marked neither as an Itô nor as a Stratonovich solver. "
            "For stochastic flows use e.g. diffrax.Euler() (Itô) or diffrax.EulerHeun() "
            "(Stratonovich)."
        )
    return "ito" if ito else "stratonovich"


def check_form(terms: Any, solver: dfx.AbstractSolver) -> None:
    """Refuse an Itô solver for Stratonovich terms and the other way round."""
    is_field = lambda node: isinstance(node, AbstractVectorField)
    for node in jax.tree.leaves(terms, is_leaf=is_field):
        if is_field(node) and node.form is not None and node.form != form_of(solver):
            raise ValueError(
                f"{type(solver).__name__} solves {form_of(solver)} equations, but the terms were "
                f"made for the {node.form} form. Use flow.terms(point, path, "
                f'form="{form_of(solver)}").'
            )
