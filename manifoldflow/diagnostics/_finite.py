"""The refusal of a report on a loss that is not finite."""

import math
from typing import Any


def refuse_infinite(value: Any, norm: Any) -> None:
    """Refuse a loss, or a gradient, that is not finite at the model."""
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise ValueError(
            f"report needs a loss that is finite at the model; got the loss {float(value):g} with "
            f"a gradient of length {float(norm):g}. See whether the model overflows, or give it in "
            "double precision."
        )
