"""The landed network, kept on the disk: it takes long to get there."""

import os
import pathlib
import zipfile
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from manifoldflow import _tree
from manifoldflow._journal import digest


def checkpoint_of(folder: pathlib.Path) -> pathlib.Path:
    """The saves of a walk that is under way."""
    return folder / "checkpoint.npz"


def landed_of(folder: pathlib.Path) -> pathlib.Path:
    """The network that walks start from."""
    return folder / "landed.npz"


class Landed:
    """The landed network of one problem, in the folder of its walk.

    Args:
        folder: of the walk.
        what: all that the landing depends on: data, initial network, how it is trained.
    """

    def __init__(self, folder: pathlib.Path, *what: Any):
        self.path = landed_of(folder)
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(what) if eqx.is_array(leaf)]
        rest = [leaf for leaf in jax.tree.leaves(what) if isinstance(leaf, str | int | float)]
        self._identity = digest((arrays, rest, jax.__version__))

    def found(self, like: Any) -> Any | None:
        """The network that an earlier call has left here, if it was for the same problem.

        Raises:
            ValueError: a walk of something else was stopped here, and could still go on.
        """
        is_other = False
        try:
            with np.load(self.path) as stored:
                is_other = str(stored["identity"]) != self._identity
                if not is_other:
                    return self._rebuilt(stored, like)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        checkpoint = checkpoint_of(self.path.parent)
        if is_other and checkpoint.exists():
            raise ValueError(
                f"{checkpoint} belongs to a walk from another network or on other data, which was "
                "stopped. Delete it to begin anew, or choose another folder (--out)."
            )
        self.path.unlink(missing_ok=True)
        return None

    def keep(self, point: Any) -> None:
        """Write a network, whole or not at all."""
        coordinates = eqx.filter(point, eqx.is_inexact_array)
        leaves = {f"leaf_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(coordinates))}
        # A name of its own, since two calls may write at once; moved when it is whole.
        new = self.path.with_name(f"landed-{os.getpid()}.npz")
        np.savez(new, identity=np.asarray(self._identity), **leaves)
        os.replace(new, self.path)

    def _rebuilt(self, stored: Any, like: Any) -> Any:
        coordinates, rest = eqx.partition(like, eqx.is_inexact_array)
        leaves, structure = jax.tree.flatten(coordinates)
        arrays = [jnp.asarray(stored[f"leaf_{i}"]) for i in range(len(leaves))]
        return _tree.join(jax.tree.unflatten(structure, arrays), rest)
