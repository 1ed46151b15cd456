"""Flows on manifolds and towards them, and how they are solved."""

from manifoldflow._journal import load_checkpoint as load_checkpoint
from manifoldflow._run import Stationary as Stationary
from manifoldflow.flows._base import (
    AbstractDiffusion as AbstractDiffusion,
    AbstractFlow as AbstractFlow,
)
from manifoldflow.flows._brownian import BrownianMotion as BrownianMotion
from manifoldflow.flows._gradient import (
    GradientFlow as GradientFlow,
    RiemannianGradientFlow as RiemannianGradientFlow,
)
from manifoldflow.flows._iteration_limit import (
    IterationCheck as IterationCheck,
    IterationLimit as IterationLimit,
)
from manifoldflow.flows._limit_diffusion import LimitDiffusion as LimitDiffusion
from manifoldflow.flows._noether import NoetherFlow as NoetherFlow
from manifoldflow.flows._sgd_diffusion import SGDDiffusion as SGDDiffusion
from manifoldflow.flows._solve import solve as solve
from manifoldflow.flows._subsample import (
    DriftEstimate as DriftEstimate,
    subsampled_drift as subsampled_drift,
)
from manifoldflow.flows._weight_decay import WeightDecayFlow as WeightDecayFlow
