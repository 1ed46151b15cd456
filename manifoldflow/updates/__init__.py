"""Updates: what an optimiser does with a gradient, and what is left of it for small steps."""

from manifoldflow.updates._base import AbstractUpdate as AbstractUpdate
from manifoldflow.updates._sgd import SGD as SGD
