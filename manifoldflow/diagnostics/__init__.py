"""Checks of assumptions, of derivatives and of learning rates, and the cost of a computation."""

from manifoldflow.diagnostics._certify import (
    Certificate as Certificate,
    Certificates as Certificates,
    certify as certify,
)
from manifoldflow.diagnostics._checks import (
    check_geodesic as check_geodesic,
    check_gradient as check_gradient,
    check_hessian as check_hessian,
    check_retraction as check_retraction,
    GeodesicCheck as GeodesicCheck,
)
from manifoldflow.diagnostics._convexity import (
    check_geodesic_convexity as check_geodesic_convexity,
    ConvexityCheck as ConvexityCheck,
)
from manifoldflow.diagnostics._cost import (
    explain as explain,
    Explanation as Explanation,
)
from manifoldflow.diagnostics._dimension import (
    check_dimension as check_dimension,
    DimensionCheck as DimensionCheck,
)
from manifoldflow.diagnostics._entries import (
    LeafTrace as LeafTrace,
    LeftOut as LeftOut,
    Quantity as Quantity,
)
from manifoldflow.diagnostics._kernel import (
    kernel_change as kernel_change,
    KernelChange as KernelChange,
)
from manifoldflow.diagnostics._plan import Plan as Plan, plan as plan
from manifoldflow.diagnostics._potential import (
    GradientFlowCheck as GradientFlowCheck,
    is_gradient_flow as is_gradient_flow,
)
from manifoldflow.diagnostics._program import Message as Message
from manifoldflow.diagnostics._report import Report as Report, report as report
from manifoldflow.diagnostics._slopes import SlopeCheck as SlopeCheck
from manifoldflow.diagnostics._stability import (
    largest_stable_learning_rate as largest_stable_learning_rate,
    stationary_covariance as stationary_covariance,
    StationaryCovariance as StationaryCovariance,
)
