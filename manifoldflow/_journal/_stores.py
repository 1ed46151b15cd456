"""The places where a journal is kept: an .npz file, or an Orbax checkpoint manager."""

import abc
import contextlib
import importlib
import os
from typing import Any

import equinox as eqx
import numpy as np

from manifoldflow._journal._files import (
    check_space,
    make_place,
    path_of,
    read_whole,
    remove_leftovers,
    write_whole,
)
from manifoldflow._journal._locks import locked

Place = str | os.PathLike[str] | Any
"""A path, or an `orbax.checkpoint.CheckpointManager`."""


class AbstractStore(eqx.Module):
    """Keeps the latest of several dictionaries of arrays."""

    @abc.abstractmethod
    def has_any(self) -> bool:
        """True where there is something to read."""

    @abc.abstractmethod
    def read(self, kind: str) -> dict[str, np.ndarray]:
        """The arrays that were written last; `kind` names them in messages."""

    @abc.abstractmethod
    def write(self, arrays: dict[str, np.ndarray], step: int) -> None:
        """Take these in the place of what was written before."""

    @abc.abstractmethod
    def name(self) -> str:
        """The name of the place, for messages."""

    @abc.abstractmethod
    def opened(self, num_bytes: int) -> contextlib.AbstractContextManager[None]:
        """Keep others out; nobody writes without. Fails at once where writing would fail."""


class NpzStore(AbstractStore):
    """One .npz file, whole at any moment."""

    path: str

    def has_any(self) -> bool:
        return os.path.lexists(self.path)

    def read(self, kind: str) -> dict[str, np.ndarray]:
        return read_whole(self.path, kind)

    def write(self, arrays: dict[str, np.ndarray], step: int) -> None:
        del step
        write_whole(self.path, arrays)

    def name(self) -> str:
        return self.path

    @contextlib.contextmanager
    def opened(self, num_bytes: int):
        make_place(self.path)
        with locked(self.path) as is_alone:
            # Leftovers of another run that is still writing are not ours to remove.
            if is_alone:
                remove_leftovers(self.path)
            check_space(self.path, num_bytes)
            yield


class OrbaxStore(AbstractStore):
    """Orbax's manager: keeps as many steps as it was told, where it was told."""

    manager: Any

    def has_any(self) -> bool:
        return self.manager.latest_step() is not None

    def read(self, kind: str) -> dict[str, np.ndarray]:
        del kind
        self.manager.wait_until_finished()
        step = self.manager.latest_step()
        if step is None:
            raise OSError(f"There is no checkpoint in {self.name()}. Give another folder.")
        try:
            arrays = self.manager.restore(step, args=_orbax().args.StandardRestore())
            return {name: np.asarray(array) for name, array in arrays.items()}
        except Exception as error:  # Orbax raises many kinds for folders that are not whole
            raise ValueError(
                f"The checkpoint {self.name()} is damaged: Orbax cannot restore its step {step} "
                f"({type(error).__name__}). Delete that step, or give another folder."
            ) from error

    def write(self, arrays: dict[str, np.ndarray], step: int) -> None:
        try:
            self.manager.save(step, args=_orbax().args.StandardSave(arrays), force=True)
        except Exception as error:  # of many kinds, also those of the save before
            raise OSError(f"{type(error).__name__} of Orbax") from error

    def name(self) -> str:
        return str(self.manager.directory)

    @contextlib.contextmanager
    def opened(self, num_bytes: int):
        del num_bytes
        yield


def _orbax() -> Any:
    # Only here, where a manager was given: Orbax is an extra.
    return importlib.import_module("orbax.checkpoint")


def store_of(option: str, place: Place) -> AbstractStore:
    """The store for what was given as `checkpoint` or `resume`."""
    if isinstance(place, str | os.PathLike):
        return NpzStore(path_of(place))
    if all(callable(getattr(place, name, None)) for name in ("save", "restore", "latest_step")):
        return OrbaxStore(place)
    raise ValueError(
        f"{option} must be the path of an .npz file or an orbax.checkpoint.CheckpointManager "
        f"(pip install manifoldflow[orbax]); got a {type(place).__name__}."
    )
