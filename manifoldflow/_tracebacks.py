"""Tracebacks that end with the user's own line, and a sentence.

Between a call and what was wrong with it lie a hundred lines of frames of this package, of Equinox
and of Diffrax. None of them is the user's to mend. JAX hides its own, and says so below the
sentence. `JAX_TRACEBACK_FILTERING=off` shows all.
"""

import os
import types
from typing import Any

import diffrax
import equinox as eqx
import jax
import jaxtyping
import lineax
import optimistix

_HERE = os.path.dirname(__file__) + os.sep
_HIDDEN = (_HERE,) + tuple(
    os.path.dirname(str(package.__file__)) + os.sep
    for package in (jax, eqx, diffrax, lineax, optimistix, jaxtyping)
)
# What Equinox writes around the sentence of an error inside a program.
_BEFORE, _AFTER = "equinox.EquinoxRuntimeError: ", "\n\n-------------------\n\nAn error occurred"


def shortened(error: Exception) -> Exception:
    """The error to raise in place of one that leaves the package: itself, if it is none of ours.

    Else with the frames of its user alone, and nothing below its sentence.
    """
    if _shows_all():
        return error
    text = str(error)
    if isinstance(error, eqx.EquinoxRuntimeError) and _BEFORE in text and _AFTER in text:
        sentence = text.partition(_BEFORE)[2].rpartition(_AFTER)[0]
        return _marked(eqx.EquinoxRuntimeError(sentence))
    if not _is_ours(error):
        return error
    return _marked(with_few_frames(error))


def with_few_frames(error: Exception) -> Exception:
    """The same error, with the frames of its user alone and without JAX's note about its own."""
    if _shows_all():
        return error
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if "JAX has removed its internal frames" not in note]
    return error.with_traceback(_of_users(error.__traceback__))


def _shows_all() -> bool:
    return getattr(jax.config, "jax_traceback_filtering", None) == "off"


def _marked(error: Any) -> Any:
    error.is_manifoldflow = True
    return error


def _is_ours(error: Exception) -> bool:
    """A sentence of this package, raised by itself."""
    if hasattr(error, "is_manifoldflow"):
        return True
    if not isinstance(error, ValueError | eqx.EquinoxRuntimeError):
        return False
    last = error.__traceback__
    # An error of the user's model, raised below our frames, keeps its whole traceback.
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_filename.startswith(_HERE)


def _of_users(frames: types.TracebackType | None) -> types.TracebackType | None:
    if frames is None:
        return None
    rest = _of_users(frames.tb_next)
    if frames.tb_frame.f_code.co_filename.startswith(_HIDDEN):
        return rest
    return types.TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)
