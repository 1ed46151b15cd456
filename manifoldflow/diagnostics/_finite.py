"""A report is of finite numbers, and says of which leaf it is not."""

import math
from typing import Any

import jax
import numpy as np

from manifoldflow._types import Coordinates


def name_of(path: Any) -> str:
    """A leaf, as messages and tables call it."""
    return jax.tree_util.keystr(path).removesuffix(".value") or "the point"


def refuse_nonfinite(coordinates: Coordinates) -> None:
    """Refuse a model with NaN or inf in it."""
    named = jax.tree_util.tree_leaves_with_path(coordinates)
    wrong = [name_of(path) for path, leaf in named if not np.all(np.isfinite(np.asarray(leaf)))]
    if wrong:
        raise ValueError(
            f"report needs a model of finite numbers; got NaN or inf in {', '.join(wrong)}. "
            "Take the last point before training went wrong."
        )


def refuse_infinite(value: Any, norm: Any) -> None:
    """Refuse a loss, or a gradient, that is not finite at the model."""
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise ValueError(
            f"report needs a loss that is finite at the model; got the loss {float(value):g} with "
            f"a gradient of length {float(norm):g}. See whether the model overflows, or give it in "
            "double precision."
        )
