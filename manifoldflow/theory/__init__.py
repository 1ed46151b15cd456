"""Closed forms from the papers: oracles that see nothing of what they judge."""

from manifoldflow.theory._margin import max_margin_direction as max_margin_direction
from manifoldflow.theory._ornstein_uhlenbeck import (
    ornstein_uhlenbeck_covariance as ornstein_uhlenbeck_covariance,
)
from manifoldflow.theory._overparametrized_linear import (
    kernel_rich_interpolant as kernel_rich_interpolant,
    min_norm_interpolant as min_norm_interpolant,
    overparametrized_linear_charges as overparametrized_linear_charges,
    overparametrized_linear_flow as overparametrized_linear_flow,
    weighted_l1_interpolant as weighted_l1_interpolant,
)
from manifoldflow.theory._two_layer import (
    coherence as coherence,
    simplicity_time_bound as simplicity_time_bound,
    two_layer_minimizer as two_layer_minimizer,
)
