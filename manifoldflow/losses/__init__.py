"""Losses: value, residuals, derivatives, traces. No geometry."""

from manifoldflow.losses._base import (
    AbstractExampleLoss as AbstractExampleLoss,
    AbstractLoss as AbstractLoss,
    AbstractResidualLoss as AbstractResidualLoss,
)
from manifoldflow.losses._flipped import flipped_labels_loss as flipped_labels_loss
from manifoldflow.losses._function import (
    FunctionLoss as FunctionLoss,
    SquaredNorm as SquaredNorm,
)
from manifoldflow.losses._least_squares import LeastSquares as LeastSquares
from manifoldflow.losses._linearized import linearized as linearized
from manifoldflow.losses._per_example import PerExampleLoss as PerExampleLoss
from manifoldflow.losses._regularized import RegularizedLoss as RegularizedLoss
from manifoldflow.losses._residual_form import ResidualForm as ResidualForm
from manifoldflow.losses._shard import shard_examples as shard_examples
