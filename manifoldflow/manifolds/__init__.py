"""Manifolds of points: membership, projections, retractions, the limit of gradient flow."""

from manifoldflow.manifolds._base import AbstractManifold as AbstractManifold
from manifoldflow.manifolds._calculus import riemannian_gradient as riemannian_gradient
from manifoldflow.manifolds._level_set import (
    LevelSet as LevelSet,
    ZeroLossManifold as ZeroLossManifold,
)
from manifoldflow.manifolds._limit_map import (
    limit_map as limit_map,
    limit_map_with_info as limit_map_with_info,
)
from manifoldflow.manifolds._limit_map_derivatives import (
    limit_map_derivative as limit_map_derivative,
    limit_map_second_derivative as limit_map_second_derivative,
    limit_map_second_derivative_parts as limit_map_second_derivative_parts,
    normal_second_derivative_parts as normal_second_derivative_parts,
)
from manifoldflow.manifolds._minimizer import MinimizerManifold as MinimizerManifold
from manifoldflow.manifolds._normal_space import (
    AbstractNormalSpace as AbstractNormalSpace,
    GramNormalSpace as GramNormalSpace,
    HessianNormalSpace as HessianNormalSpace,
)
from manifoldflow.manifolds._second_derivative import (
    AbstractSecondDerivative as AbstractSecondDerivative,
)
