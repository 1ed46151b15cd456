"""Walks that pay: the same function of the data, in weights where the loss is flatter."""

from manifoldflow.walks._hold import HeldOutputs as HeldOutputs, hold_outputs as hold_outputs
from manifoldflow.walks._stochastic import StochasticWalk as StochasticWalk
