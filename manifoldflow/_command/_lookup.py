"""Functions of the user's own, by module:function."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from manifoldflow._command._examples import some
from manifoldflow._command._waiting import Waiting


def looked_up(option: str, place: str) -> Callable[..., Any]:
    """The function of a module, which may lie in the current folder.

    Args:
        option: that asks for it, for messages.
        place: `module:function`.

    Raises:
        ValueError: there is no such module or function, or importing it fails.
    """
    name, _, attribute = place.partition(":")
    if name.endswith(".py") or os.sep in name:
        proposed = os.path.basename(name).removesuffix(".py")
        raise ValueError(
            f"{option} {place}: write the module as `import` does, {option} "
            f"{proposed}:{attribute or 'FUNCTION'}, in the folder of {os.path.basename(name)}."
        )
    if not all(part.isidentifier() for part in name.split(".")) or not attribute.isidentifier():
        raise ValueError(
            f"{option} takes MODULE:FUNCTION, e.g. {option} train:build for `build` in train.py; "
            f"got {place}."
        )
    module = _imported(option, name)
    if not hasattr(module, attribute):
        functions = [n for n in vars(module) if n[0] != "_" and _is_own(getattr(module, n), name)]
        raise ValueError(
            f"{option} {place}: {name} has no {attribute}; "
            + (f"it has {some(functions)}." if functions else "it has no functions of its own.")
        )
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(
            f"{option} {place}: {attribute} must be a function; got a {type(found).__name__}. "
            f"Write `def build(): return {attribute}` and give {name}:build."
        )
    return found


def failed(what: str, error: Exception) -> ValueError:
    """A failure of a user's code: what it says, and in which line of it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    where = (
        f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    )
    first = next(iter(str(error).strip().splitlines()), "")
    return ValueError(f"{what} fails: {type(error).__name__}: {first}{where}")


def _imported(option: str, name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with Waiting(f"importing {name}"):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise failed(f"{option}: importing {name}", error) from error
        raise ValueError(
            f"{option}: there is no module {error.name}, neither here, in {folder}, nor among what "
            "is installed."
        ) from None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):
            error = RuntimeError("it ends the program; keep that below __name__ == '__main__'")
        raise failed(f"{option}: importing {name}", error) from error


def _is_own(value: Any, module: str) -> bool:
    return callable(value) and getattr(value, "__module__", "") == module


def _is_users(frame: traceback.FrameSummary) -> bool:
    """True for a file that belongs to no library, nor to Python itself."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    is_library = "site-packages" in frame.filename or frame.filename.startswith((here, "<"))
    return not is_library and not frame.filename.startswith(os.path.dirname(os.__file__))
