"""The findings of the doctor: lines of a report that can be pasted where others read it."""

import getpass
import pathlib
import re
from typing import NamedTuple


class Finding(NamedTuple):
    """A finding, its remedy if there is one, and a mark if it has to be mended."""

    text: str
    remedy: str = ""
    is_wrong: bool = False

    def __str__(self) -> str:
        if not self.remedy:
            return f"- {without_names(self.text)}"
        mark = "**WRONG**" if self.is_wrong else "note"
        return f"- {mark}: {without_names(self.text)}. {without_names(self.remedy)}"


def without_names(text: str) -> str:
    """The text with ~ for the home folder, and without the user's name in other paths."""
    for home in {str(pathlib.Path.home()), str(pathlib.Path.home().resolve())}:
        if home != pathlib.Path(home).anchor:
            text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    try:
        user = re.escape(getpass.getuser())
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<=[/\\]){user}(?![\w.-])", "USER", text)
