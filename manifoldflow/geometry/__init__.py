"""Derivatives along a manifold, its curvature, geodesics, transport and distances."""

from manifoldflow.geometry._calculus import (
    covariant_derivative as covariant_derivative,
    covariant_hessian as covariant_hessian,
    divergence as divergence,
    gradient_along as gradient_along,
    laplace_beltrami as laplace_beltrami,
    potential_gradient as potential_gradient,
    riemannian_gradient as riemannian_gradient,
)
from manifoldflow.geometry._closest import (
    closest_point as closest_point,
    closest_point_with_info as closest_point_with_info,
)
from manifoldflow.geometry._curvature import (
    mean_curvature as mean_curvature,
    ricci_curvature as ricci_curvature,
    scalar_curvature as scalar_curvature,
    second_fundamental_form as second_fundamental_form,
    sectional_curvature as sectional_curvature,
    shape_operator as shape_operator,
)
from manifoldflow.geometry._geodesics import (
    exponential_map as exponential_map,
    geodesic as geodesic,
    GeodesicOptions as GeodesicOptions,
    transport_along_geodesic as transport_along_geodesic,
    Walk as Walk,
)
from manifoldflow.geometry._logarithm import (
    distance as distance,
    logarithm_map as logarithm_map,
    logarithm_map_with_info as logarithm_map_with_info,
)
from manifoldflow.geometry._retraction import ProjectionRetraction as ProjectionRetraction
from manifoldflow.geometry._transport import parallel_transport as parallel_transport
from manifoldflow.geometry._velocities import geodesic_with_velocity as geodesic_with_velocity
