"""Flows on manifolds and towards them, and how they are solved."""

from manifoldflow.flows._base import AbstractFlow as AbstractFlow
from manifoldflow.flows._checkpoint import load_checkpoint as load_checkpoint
from manifoldflow.flows._gradient import (
    GradientFlow as GradientFlow,
    RiemannianGradientFlow as RiemannianGradientFlow,
)
from manifoldflow.flows._limit_diffusion import LimitDiffusion as LimitDiffusion
from manifoldflow.flows._options import Stationary as Stationary
from manifoldflow.flows._projected import Projected as Projected
from manifoldflow.flows._solve import solve as solve
