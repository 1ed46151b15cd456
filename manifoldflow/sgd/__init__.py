"""SGD itself, by any Optax optimiser: the iteration that the limiting flows are the limit of."""

from manifoldflow.sgd._sam import SAMGradient as SAMGradient
from manifoldflow.sgd._simulate import simulate as simulate
