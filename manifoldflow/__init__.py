"""Where SGD goes after the loss is zero: geometry of zero-loss manifolds in JAX.

loss ─► manifold ─┬─► flow ─► solve ─► Solution
         noise ───┘
"""

from manifoldflow import (
    diagnostics as diagnostics,
    ensembles as ensembles,
    linalg as linalg,
    models as models,
    theory as theory,
)
from manifoldflow._solution import Info as Info, RESULTS as RESULTS, Solution as Solution
from manifoldflow._tree import split as split
from manifoldflow.diagnostics import explain as explain, plan as plan
from manifoldflow.ensembles import ensemble as ensemble, member_keys as member_keys
from manifoldflow.flows import (
    AbstractFlow as AbstractFlow,
    BrownianMotion as BrownianMotion,
    GradientFlow as GradientFlow,
    LimitDiffusion as LimitDiffusion,
    load_checkpoint as load_checkpoint,
    Projected as Projected,
    RiemannianGradientFlow as RiemannianGradientFlow,
    SGDDiffusion as SGDDiffusion,
    solve as solve,
    Stationary as Stationary,
    subsampled_drift as subsampled_drift,
)
from manifoldflow.losses import (
    AbstractLoss as AbstractLoss,
    AbstractResidualLoss as AbstractResidualLoss,
    FunctionLoss as FunctionLoss,
    LeastSquares as LeastSquares,
    PerExampleLoss as PerExampleLoss,
    shard_examples as shard_examples,
)
from manifoldflow.manifolds import (
    AbstractManifold as AbstractManifold,
    LevelSet as LevelSet,
    limit_map as limit_map,
    limit_map_derivative as limit_map_derivative,
    limit_map_second_derivative as limit_map_second_derivative,
    limit_map_with_info as limit_map_with_info,
    MinimizerManifold as MinimizerManifold,
    riemannian_gradient as riemannian_gradient,
    ZeroLossManifold as ZeroLossManifold,
)
from manifoldflow.noise import (
    AbstractNoise as AbstractNoise,
    CustomNoise as CustomNoise,
    IsotropicNoise as IsotropicNoise,
    LabelNoise as LabelNoise,
    MinibatchNoise as MinibatchNoise,
    ResampledLabels as ResampledLabels,
)
from manifoldflow.sgd import SAMGradient as SAMGradient, simulate as simulate

__version__ = "0.1.0"
