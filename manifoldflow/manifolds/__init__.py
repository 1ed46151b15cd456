"""Manifolds of points: membership, projections, retractions, the limit of gradient flow."""

from manifoldflow.manifolds._base import AbstractManifold as AbstractManifold
from manifoldflow.manifolds._bending import bending_along as bending_along
from manifoldflow.manifolds._calculus import (
    covariant_derivative as covariant_derivative,
    covariant_hessian as covariant_hessian,
    divergence as divergence,
    gradient_along as gradient_along,
    gradient_of_rows as gradient_of_rows,
    laplace_beltrami as laplace_beltrami,
    riemannian_gradient as riemannian_gradient,
)
from manifoldflow.manifolds._closest import (
    closest_point as closest_point,
    closest_point_with_info as closest_point_with_info,
)
from manifoldflow.manifolds._curvature import (
    mean_curvature as mean_curvature,
    ricci_curvature as ricci_curvature,
    scalar_curvature as scalar_curvature,
    second_fundamental_form as second_fundamental_form,
    sectional_curvature as sectional_curvature,
    shape_operator as shape_operator,
)
from manifoldflow.manifolds._geodesics import (
    exponential_map as exponential_map,
    geodesic as geodesic,
    parallel_transport as parallel_transport,
    transport_along_geodesic as transport_along_geodesic,
    Walk as Walk,
)
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
from manifoldflow.manifolds._logarithm import (
    distance as distance,
    logarithm_map as logarithm_map,
    logarithm_map_with_info as logarithm_map_with_info,
)
from manifoldflow.manifolds._minimizer import MinimizerManifold as MinimizerManifold
from manifoldflow.manifolds._normal_space import (
    AbstractNormalSpace as AbstractNormalSpace,
    GramNormalSpace as GramNormalSpace,
    HessianNormalSpace as HessianNormalSpace,
)
from manifoldflow.manifolds._projected import Projected as Projected
from manifoldflow.manifolds._retractions import (
    AbstractRetraction as AbstractRetraction,
    inverse_retract as inverse_retract,
    LimitMapRetraction as LimitMapRetraction,
    NewtonRetraction as NewtonRetraction,
    ProjectionRetraction as ProjectionRetraction,
)
from manifoldflow.manifolds._second_derivative import (
    AbstractSecondDerivative as AbstractSecondDerivative,
)
