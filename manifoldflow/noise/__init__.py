"""Noise: the random part of SGD's gradients, sampled and as a covariance."""

from manifoldflow.noise._base import (
    AbstractBatchNoise as AbstractBatchNoise,
    AbstractDataNoise as AbstractDataNoise,
    AbstractNoise as AbstractNoise,
    AbstractShortNoise as AbstractShortNoise,
    AbstractStochasticGradient as AbstractStochasticGradient,
    Batch as Batch,
    checked_noise as checked_noise,
    short_limit as short_limit,
)
from manifoldflow.noise._custom import CustomNoise as CustomNoise
from manifoldflow.noise._flipped import FlippedLabels as FlippedLabels
from manifoldflow.noise._hessian import HessianNoise as HessianNoise
from manifoldflow.noise._isotropic import IsotropicNoise as IsotropicNoise
from manifoldflow.noise._label import LabelNoise as LabelNoise
from manifoldflow.noise._minibatch import MinibatchNoise as MinibatchNoise
from manifoldflow.noise._online import OnlineBatch as OnlineBatch
from manifoldflow.noise._resampled import ResampledLabels as ResampledLabels
from manifoldflow.noise._short_limit import (
    hessian_trace as hessian_trace,
    LocalHessian as LocalHessian,
    log_determinant as log_determinant,
    ShortLimit as ShortLimit,
)
