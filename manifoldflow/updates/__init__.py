"""Updates: optimisers as values, which run by themselves and have a limit for small steps."""

from manifoldflow.updates._adam import Adam as Adam
from manifoldflow.updates._base import AbstractUpdate as AbstractUpdate
from manifoldflow.updates._clipped_sgd import ClippedSGD as ClippedSGD
from manifoldflow.updates._kinds import (
    AbstractLimitedUpdate as AbstractLimitedUpdate,
    AbstractPotentialUpdate as AbstractPotentialUpdate,
    AbstractPreconditionedUpdate as AbstractPreconditionedUpdate,
    AbstractRowsUpdate as AbstractRowsUpdate,
)
from manifoldflow.updates._local_sgd import LocalSGD as LocalSGD
from manifoldflow.updates._muon import Muon as Muon
from manifoldflow.updates._normalized import NormalizedGD as NormalizedGD
from manifoldflow.updates._sam import SAM as SAM
from manifoldflow.updates._scaling import (
    AbstractScalableUpdate as AbstractScalableUpdate,
    scaling_rule as scaling_rule,
    ScalingRule as ScalingRule,
)
from manifoldflow.updates._setting import Setting as Setting
from manifoldflow.updates._sgd import SGD as SGD
from manifoldflow.updates._sign_sgd import SignSGD as SignSGD
