"""Noise: what SGD adds to the gradient, sampled and as a covariance."""

from manifoldflow.noise._base import AbstractNoise as AbstractNoise
from manifoldflow.noise._isotropic import IsotropicNoise as IsotropicNoise
from manifoldflow.noise._label import LabelNoise as LabelNoise
