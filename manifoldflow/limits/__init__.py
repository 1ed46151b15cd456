"""The limit map Φ of gradient flow, and its derivatives on the manifold."""

from manifoldflow.limits._limit_map import (
    limit_map as limit_map,
    limit_map_with_info as limit_map_with_info,
)
from manifoldflow.limits._limit_map_derivatives import (
    limit_map_derivative as limit_map_derivative,
    limit_map_second_derivative as limit_map_second_derivative,
    limit_map_second_derivative_parts as limit_map_second_derivative_parts,
    normal_second_derivative_parts as normal_second_derivative_parts,
    SecondDerivative as SecondDerivative,
)
from manifoldflow.limits._retraction import LimitMapRetraction as LimitMapRetraction
