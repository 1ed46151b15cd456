"""Manifolds of points: a constraint, its normal space, and ways back to it."""

from manifoldflow.manifolds._base import (
    AbstractManifold as AbstractManifold,
    AbstractStationaryManifold as AbstractStationaryManifold,
)
from manifoldflow.manifolds._level_set import (
    LevelSet as LevelSet,
    ZeroLossManifold as ZeroLossManifold,
)
from manifoldflow.manifolds._local import AbstractLocalGeometry as AbstractLocalGeometry
from manifoldflow.manifolds._local_gram import GramGeometry as GramGeometry
from manifoldflow.manifolds._local_hessian import HessianGeometry as HessianGeometry
from manifoldflow.manifolds._minimizer import MinimizerManifold as MinimizerManifold
from manifoldflow.manifolds._normal_space import (
    AbstractNormalSpace as AbstractNormalSpace,
    GramNormalSpace as GramNormalSpace,
    HessianNormalSpace as HessianNormalSpace,
)
from manifoldflow.manifolds._outputs import OutputManifold as OutputManifold
from manifoldflow.manifolds._projected import Projected as Projected
from manifoldflow.manifolds._retractions import (
    AbstractLandingRetraction as AbstractLandingRetraction,
    AbstractRetraction as AbstractRetraction,
    inverse_retract as inverse_retract,
    NewtonRetraction as NewtonRetraction,
)
