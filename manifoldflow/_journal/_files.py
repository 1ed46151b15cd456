"""Files of arrays that are whole or refused: written aside and moved, read by their checksum."""

import contextlib
import errno
import glob
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

# A zip archive may end with a comment. Ours holds the checksum of all that is before it.
_MARK = b"manifoldflow sha256 "
_NUM_END = len(_MARK) + 64
_PROBE = bytes(4096)


def path_of(path: str | os.PathLike[str]) -> str:
    """The path with .npz at its end, as NumPy would write it."""
    path = os.fsdecode(path)
    if "\0" in path or not os.path.basename(path):
        raise ValueError(f"A checkpoint needs the name of a file, as 'run.npz'; got {path!r}.")
    return path if path.endswith(".npz") else path + ".npz"


def write_whole(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file: whatever moment the program is killed at, there is a whole one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. The file that was there
            before is untouched.
    """
    buffer, plain = io.BytesIO(), cast(dict[str, Any], arrays)
    np.savez(buffer, **plain)
    # The archive's last two bytes say how long its comment is.
    content = buffer.getvalue()[:-2] + _NUM_END.to_bytes(2, "little")
    with _aside(path) as partial:
        _write(partial, content + _MARK + hashlib.sha256(content).hexdigest().encode())
        # Atomic within a folder: readers see the old file or the new one, nothing between.
        os.replace(partial, path)
    _settle(_folder(path))


def read_whole(path: str, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a file that `write_whole` wrote; `kind` is what it should be, for messages.

    Raises:
        ValueError: it is not whole, or something else; says what.
        OSError: it cannot be read; says why.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise OSError(
            f"The checkpoint {path} cannot be read: {because(error)}. Give another file, or mend "
            "this one's permissions."
        ) from error
    body, end = content[:-_NUM_END], content[-_NUM_END:]
    if not end.startswith(_MARK):
        raise ValueError(f"{path} {_what_else(content, kind)} Delete it, or give another file.")
    if end[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise ValueError(
            f"The checkpoint {path} is damaged: its checksum does not fit its {len(content)} "
            "bytes. Delete it, or put back a copy of it."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def make_place(path: str) -> None:
    """Make the folder of a file.

    Raises:
        OSError: it cannot be made, or there is a folder in the place of the file.
    """
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "there is a folder of this name")
        os.makedirs(_folder(path), exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_space(path: str, num_bytes: int) -> None:
    """Makes sure that a file can be written here, before any time is spent.

    Args:
        path: of the file.
        num_bytes: its size in the end. It is written anew beside the old one.

    Raises:
        OSError: no permission, no space.
    """
    try:
        with _aside(path) as partial:
            _write(partial, _PROBE)
            os.remove(partial)
        free = shutil.disk_usage(_folder(path)).free
        there = os.path.getsize(path) if os.path.exists(path) else 0
    except OSError as error:
        raise cannot_write(path, error) from error
    # The old file, if there is one, is replaced and gives its space back.
    needed = 2 * num_bytes - there
    if free < needed:
        raise OSError(
            f"The checkpoint {path} cannot be written: it takes {_megabytes(needed)} MB with the "
            f"copy that is written first, and {_megabytes(free)} MB are free. Make room, ask for "
            "fewer saves, or give another path."
        )


def remove_leftovers(path: str) -> None:
    """Removes what killed runs were just writing; for the holder of the lock."""
    for name in glob.glob(glob.escape(path) + ".*.partial"):
        with contextlib.suppress(OSError):
            os.remove(name)


def because(error: OSError) -> str:
    """The words of an error of the operating system, in short."""
    return error.strerror or str(error).partition("\n")[0] or type(error).__name__


def cannot_write(path: str, error: OSError) -> OSError:
    """The error to raise where a file cannot even be begun."""
    return OSError(f"The checkpoint {path} cannot be written: {because(error)}. Give another path.")


def _write(path: str, content: bytes) -> None:
    # Not by `tempfile`, whose files nobody else may read.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(content)
        # Before the file is moved its bytes must be on the disk: after a power cut a file of zeros
        # would have the right name.
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _aside(path: str) -> Iterator[str]:
    """A name in the same folder that nobody else uses, with nothing left under it."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def _settle(folder: str) -> None:
    """Have the folder's new entry on the disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def _what_else(content: bytes, kind: str) -> str:
    """The kind of a file that does not end as ours do."""
    if not content:
        return f"is empty, not a checkpoint of {kind}."
    names: set[Any] = set()
    # NumPy raises whatever a broken archive makes it stumble over.
    with contextlib.suppress(Exception):
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            names = set(stored.files)
    if {"times", "velocity", "point_0"} <= names or {"step", "fingerprint", "state_0"} <= names:
        return "is a checkpoint in the format of an older version, which cannot be gone on from."
    if "about" in names:
        return "is a checkpoint that something else has rewritten: it lacks its checksum."
    if names or not (content.startswith(b"PK") or _MARK in content):
        return f"is not a checkpoint of {kind}."
    return f"is cut off or damaged, no whole checkpoint of {kind}."


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g}"
