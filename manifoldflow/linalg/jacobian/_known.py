"""All that is known from the start of how leaves are used: these files register it."""

from manifoldflow.linalg.jacobian import (
    _through as _through,
    _use_convolution as _use_convolution,
    _use_look_up as _use_look_up,
    _use_matrix_product as _use_matrix_product,
    _use_scale as _use_scale,
    _use_scan as _use_scan,
    _use_shift as _use_shift,
)
from manifoldflow.linalg.jacobian._use import RULES as RULES
