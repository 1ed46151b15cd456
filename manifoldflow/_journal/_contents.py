"""The contents of a checkpoint: arrays, and one text that describes them, with their checksums."""

import hashlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

FORMAT = 2
_ABOUT = "about"


def packed(kind: str, identity: dict[str, Any], arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays, with one more that describes them."""
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    about = {
        "format": FORMAT,
        "kind": kind,
        "identity": identity,
        "arrays": {name: _told(array) for name, array in plain.items()},
    }
    return {_ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8), **plain}


def unpacked(
    name: str, stored: dict[str, np.ndarray], kind: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of the arrays, and the arrays, checked.

    Raises:
        ValueError: the arrays are not what was packed; says how.
    """
    arrays = dict(stored)
    try:
        about = json.loads(np.asarray(arrays.pop(_ABOUT), np.uint8).tobytes())
        version, told = about["format"], about["arrays"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a checkpoint of {kind}. Give another file.") from error
    # Told apart before the checksums, so that the refusal names the version and not a damage.
    if version != FORMAT:
        age = "an older" if version < FORMAT else "a newer"
        raise ValueError(
            f"{name} is a checkpoint in the format of {age} version, {version} and not {FORMAT}. "
            "Go on with that version, or delete it."
        )
    if set(arrays) != set(told):
        raise ValueError(_damaged(name, f"it has the arrays {sorted(arrays)}, not {sorted(told)}"))
    arrays = {key: _as_told(array, told[key]) for key, array in arrays.items()}
    for key, array in arrays.items():
        if _told(array) != told[key]:
            raise ValueError(_damaged(name, f"the checksum of {key!r} does not fit"))
    return about, arrays


def _told(array: np.ndarray) -> list[Any]:
    # Over the bytes: −0.0 and other bit patterns of NaN count as different numbers.
    sum_ = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), sum_]


def _as_told(array: np.ndarray, told: list[Any]) -> np.ndarray:
    # NumPy stores types it does not know, such as bfloat16, as so many bytes.
    dtype = jnp.dtype(told[0])
    is_bytes = array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize
    return array.view(dtype) if is_bytes else array


def _damaged(name: str, how: str) -> str:
    return f"The checkpoint {name} is damaged: {how}. Delete it, or put back a copy of it."
