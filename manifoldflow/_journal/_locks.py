"""One run at a time on a file: the others are told who it is."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator

from manifoldflow._journal._files import cannot_write

try:
    import fcntl
except ImportError:  # Windows: files are whole there as well, but not locked
    fcntl = None


@contextlib.contextmanager
def locked(path: str) -> Iterator[bool]:
    """Hold `path + ".lock"`, whose text says who holds it.

    The operating system gives the lock free when its process ends, however that ends. Where a
    file system knows no locks there is none; yields whether there is.

    Raises:
        OSError: another run holds it; says which.
    """
    descriptor = _acquired(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # Removed while it is held: whoever opened it meanwhile sees that it is gone.
            with contextlib.suppress(OSError):
                os.remove(_name(path))
            os.close(descriptor)


def _acquired(path: str) -> int | None:
    if fcntl is None:
        return None
    # Between opening and locking the file its holder may have removed it: then once more.
    while True:
        try:
            descriptor = os.open(_name(path), os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise OSError(
                f"The checkpoint {path} is in use by {holder or 'another run'}. Wait for it to "
                "end, or give this run another file."
            ) from error
        except OSError:
            os.close(descriptor)
            return None
        if _is_there(descriptor, path):
            # Without room for the text it is a lock all the same.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _me().encode())
            return descriptor
        os.close(descriptor)


def _is_there(descriptor: int, path: str) -> bool:
    """True where the file that was locked is still the one of this name."""
    try:
        there = os.stat(_name(path))
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _me() -> str:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _name(path: str) -> str:
    return path + ".lock"
