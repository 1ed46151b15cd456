"""Training beyond zero loss: differential geometry of zero-loss manifolds in JAX.

loss ─► manifold ─┬─► flow ─► solve ─► Solution
         noise ───┘
"""

import importlib as _importlib
import typing as _typing

from manifoldflow import (
    ensembles as ensembles,
    geometry as geometry,
    limits as limits,
    linalg as linalg,
    manifolds as manifolds,
    symmetry as symmetry,
    updates as updates,
)
from manifoldflow._clock import (
    AbstractClock as AbstractClock,
    DecayClock as DecayClock,
    GradientClock as GradientClock,
    LimitClock as LimitClock,
    SAMClock as SAMClock,
)
from manifoldflow._mesh import mesh as mesh, shard_parameters as shard_parameters
from manifoldflow._results import Info as Info, RESULTS as RESULTS, Solution as Solution
from manifoldflow._run import LiveTable as LiveTable
from manifoldflow._tree import split as split
from manifoldflow.ensembles import ensemble as ensemble, member_keys as member_keys
from manifoldflow.flows import (
    AbstractFlow as AbstractFlow,
    BrownianMotion as BrownianMotion,
    GradientFlow as GradientFlow,
    IterationLimit as IterationLimit,
    LimitDiffusion as LimitDiffusion,
    load_checkpoint as load_checkpoint,
    NoetherFlow as NoetherFlow,
    RiemannianGradientFlow as RiemannianGradientFlow,
    SGDDiffusion as SGDDiffusion,
    solve as solve,
    Stationary as Stationary,
    subsampled_drift as subsampled_drift,
    WeightDecayFlow as WeightDecayFlow,
)
from manifoldflow.geometry import (
    closest_point as closest_point,
    covariant_derivative as covariant_derivative,
    covariant_hessian as covariant_hessian,
    distance as distance,
    divergence as divergence,
    exponential_map as exponential_map,
    geodesic as geodesic,
    GeodesicOptions as GeodesicOptions,
    laplace_beltrami as laplace_beltrami,
    logarithm_map as logarithm_map,
    mean_curvature as mean_curvature,
    parallel_transport as parallel_transport,
    ProjectionRetraction as ProjectionRetraction,
    ricci_curvature as ricci_curvature,
    riemannian_gradient as riemannian_gradient,
    scalar_curvature as scalar_curvature,
    second_fundamental_form as second_fundamental_form,
    sectional_curvature as sectional_curvature,
    shape_operator as shape_operator,
    transport_along_geodesic as transport_along_geodesic,
    Walk as Walk,
)
from manifoldflow.limits import (
    limit_map as limit_map,
    limit_map_derivative as limit_map_derivative,
    limit_map_second_derivative as limit_map_second_derivative,
    limit_map_with_info as limit_map_with_info,
    LimitMapRetraction as LimitMapRetraction,
)
from manifoldflow.losses import (
    AbstractLoss as AbstractLoss,
    AbstractResidualLoss as AbstractResidualLoss,
    FunctionLoss as FunctionLoss,
    LeastSquares as LeastSquares,
    linearized as linearized,
    PerExampleLoss as PerExampleLoss,
    RegularizedLoss as RegularizedLoss,
    shard_examples as shard_examples,
)
from manifoldflow.manifolds import (
    AbstractManifold as AbstractManifold,
    AbstractRetraction as AbstractRetraction,
    inverse_retract as inverse_retract,
    LevelSet as LevelSet,
    MinimizerManifold as MinimizerManifold,
    NewtonRetraction as NewtonRetraction,
    OutputManifold as OutputManifold,
    Projected as Projected,
    ZeroLossManifold as ZeroLossManifold,
)
from manifoldflow.noise import (
    AbstractNoise as AbstractNoise,
    CustomNoise as CustomNoise,
    FlippedLabels as FlippedLabels,
    HessianNoise as HessianNoise,
    IsotropicNoise as IsotropicNoise,
    LabelNoise as LabelNoise,
    MinibatchNoise as MinibatchNoise,
    OnlineBatch as OnlineBatch,
    ResampledLabels as ResampledLabels,
)

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from manifoldflow import (
        diagnostics as diagnostics,
        models as models,
        optimize as optimize,
        theory as theory,
        walks as walks,
    )
    from manifoldflow.diagnostics import (
        explain as explain,
        largest_stable_learning_rate as largest_stable_learning_rate,
        plan as plan,
        report as report,
    )
    from manifoldflow.optimize import (
        minimize as minimize,
        RiemannianGradientDescent as RiemannianGradientDescent,
        RiemannianOptax as RiemannianOptax,
        RiemannianTrustRegion as RiemannianTrustRegion,
    )
    from manifoldflow.sgd import SAMGradient as SAMGradient, simulate as simulate
    from manifoldflow.walks import walk as walk


def __getattr__(name: str) -> _typing.Any:
    """Imports rooms that many programs never enter when they, or their names, are asked for."""
    rooms = {
        "diagnostics": ("explain", "largest_stable_learning_rate", "plan", "report"),
        "models": (),
        "optimize": (
            "minimize",
            "RiemannianGradientDescent",
            "RiemannianOptax",
            "RiemannianTrustRegion",
        ),
        "sgd": ("SAMGradient", "simulate"),
        "theory": (),
        "walks": ("walk",),
    }
    for room, names in rooms.items():
        if name == room or name in names:
            with _importlib.import_module("manifoldflow._garbage").rare_collections():
                module = _importlib.import_module(f"manifoldflow.{room}")
            found = module if name == room else getattr(module, name)
            return globals().setdefault(name, found)
    raise AttributeError(f"module 'manifoldflow' has no attribute {name!r}")
